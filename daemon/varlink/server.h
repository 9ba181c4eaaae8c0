/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <sys/queue.h>

#include "daemon/core/observer.h"
#include "daemon/varlink/peer.h"

/* The Varlink face: translates calls into what broker functions decide, and nothing more. */

struct broker;

struct rpc {
	struct observer observer; /* of notices */
	struct broker *broker;
	struct schedule *schedule; /* of the peers */
	LIST_HEAD(, listener) listeners;
	struct peer_list peers;
};

int rpc_new(struct broker *broker, struct rpc **ret);
struct rpc *rpc_free(struct rpc *rpc);

/* Takes a listening socket over. */
int rpc_listen(struct rpc *rpc, int fd);
