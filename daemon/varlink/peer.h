/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/core/client.h"
#include "daemon/core/notice.h"
#include "daemon/kernel/process.h"
#include "daemon/manager/notify.h"
#include "daemon/util/refusal.h"
#include "daemon/util/schedule.h"
#include "daemon/varlink/intake.h"
#include "protocol/connection.h"
#include "protocol/interface.h"

struct broker;
struct rpc;
struct user;

/*
 * One connection to the socket. It answers one call after the other: while one is under way on the
 * offload pool, or streams, nothing more is read from it.
 */
struct peer {
	struct rpc *rpc; /* rpc::peers */
	struct broker *broker;
	struct user *user;             /* reference; one LIMIT_CLIENTS, until the connection is closed */
	struct process process;        /* owned; who connected */
	struct connection *connection; /* owned; NULL: closed, kept for a job's sake */
	int fd;                        /* its number */
	struct intake intake;
	sd_event_source *io;
	uint32_t revents;              /* of io, which is off until the turn that it waits for */
	struct session session;        /* its client: NULL before Hello */
	bool pending;                  /* a call is under way, or being read */
	bool watching;                 /* the call is Watch */
	bool oneway;                   /* the call wants no reply */
	struct notifier_waiter
		told; /* nothing more is sent or answered until the manager has been told */
	bool failed;                   /* to be closed on its next turn */

	/* a List call that is under way */
	int (*list)(struct peer *peer); /* sends the next few; 0 when that was all, 1 if there is more */
	uint64_t list_after, list_file, list_client;
	struct notice_place missed; /* Watch: as far as it has been told what began before */

	unsigned n_refs; /* the registry's, and one for each job */
	LIST_ENTRY(peer) of_rpc;
	struct scheduled turn;
};

LIST_HEAD(peer_list, peer);

/* What handles calls, right or wrong. */
struct request;
typedef void (*peer_handler)(struct peer *peer, struct request *request, struct fds *fds);

/* Takes the accepted descriptor over, whatever it returns: it may have been sent others already, and is closed
 * on the pool. */
int peer_new(struct rpc *rpc, int fd, peer_handler handler);
struct peer *peer_ref(struct peer *peer);
struct peer *peer_unref(struct peer *peer);
/* Ends the connection, at once. The caller's reference, if it has one, stays. */
void peer_close(struct peer *peer);

/*
 * The reply to the call under way tells of what the service manager is to keep: it goes out when
 * that has gone to the manager, as what its receiver knows of has to outlive this process.
 */
void peer_hold(struct peer *peer);
/* Replies to the call under way; fds are taken over. A failure ends the connection on its next turn. */
void peer_reply(struct peer *peer, const struct schema *schema, const void *out, const int *fds,
		size_t n_fds);
void peer_reply_more(struct peer *peer, const struct schema *schema, const void *out);
/* The same in two steps, for many: the text of the reply, which any thread can make, and sending it, which fails with r if that is negative.
 * at_once: what the socket takes is written before it returns. */
int peer_format(const struct schema *schema, const void *out, bool more, struct text **ret);
void peer_send_text(struct peer *peer, int r, struct text *text, bool at_once);
void peer_error(struct peer *peer, const char *interface, const struct schema *schema,
		const void *out);
void peer_refuse(struct peer *peer, int r, const struct refusal *refusal);

/* For intake: connection_read() has returned this; what is to be waited for has changed; it gives way to others of
 * its user, and ends on its next turn. */
void peer_read(struct peer *peer, int r);
void peer_set_events(struct peer *peer);
void peer_give_way(struct peer *peer);

/* A call that was pending has been answered: goes on with the next. */
void peer_done(struct peer *peer);
