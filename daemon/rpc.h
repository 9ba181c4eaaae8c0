/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-event.h>

#include "protocol/interface.h"

/* The Varlink face: translates calls into what broker functions decide, and nothing more. */

struct broker;
struct client;
struct rpc;

int rpc_new(struct broker *broker, struct rpc **ret);
struct rpc *rpc_free(struct rpc *rpc);

/* Takes a listening socket over. */
int rpc_listen(struct rpc *rpc, int fd);

/* To every connection that watches for the client. */
void rpc_send_notice(struct client *client, const struct msg_notice *notice);
