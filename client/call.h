/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "internal.h"

/* Messages on any connection to the broker; call.c and request.c know of each other. */

static inline void connection_freep(struct connection **c)
{
	connection_free(*c);
}

static inline void json_putp(json_object **o)
{
	json_object_put(*o);
}

/* The connection closes what it has sent, so it gets copies. */
int connection_send_copies(
	struct connection *c, json_object *message, const int *fds, size_t n_fds);
/*
 * Waits for the next message, sending what is queued meanwhile. *ret_unread: on failure, whether it
 * is certain that the broker has not seen the end of what was queued. A peer that closes with
 * something unread makes the kernel say ECONNRESET; after a request read whole it is a plain end.
 */
int connection_await(struct connection *c, uint64_t until_usec, json_object **ret,
	struct fds *ret_fds, bool *ret_unread);
bool is_broken_connection(int r);

/* Takes an answer apart. Without an error in it, reply->out is filled. */
int reply_read(pinbroker *pb, int method, void *out, struct reply *reply);

/* Everything that can go wrong on the way, as opposed to what the broker refuses. */
int error_transport(const pinbroker *pb, int method, int r);
int error_dial(const pinbroker *pb, int r);
