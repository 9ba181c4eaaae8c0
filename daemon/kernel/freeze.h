/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "daemon/kernel/process.h"

/*
 * Everybody who has a context: the client, and whoever was forked from it or sent a copy. Between
 * looking at a handle and destroying it none of them may run, as the handle could be another's by
 * then.
 */
struct holders {
	int fd;            /* the context's, not owned */
	uid_t uid;         /* the client's */
	uint64_t end_usec; /* of the time that stopping them may take */
	int result;        /* why one of them could not be stopped */
	size_t n, n_allocated;
	struct holder *list; /* owned; those that stand still */
};

/*
 * Stops them all, and the client, if it is alive, in any case. -EPERM: somebody has the context
 * whom the client could not have stopped itself; -EACCES: somebody may have it, but cannot be looked
 * into; -ETIMEDOUT. holders_continue() is to follow,
 * whatever the result: it has those go on that were not stopped before. (scan)
 */
int holders_stop(int fd, const struct process *client, bool client_alive, uint64_t timeout_usec,
		 struct holders *ret);
void holders_continue(struct holders *holders);

/* The run before ended between the two: has those go on that stand still. (scan) */
void holders_continue_left(int fd, const struct process *client);
