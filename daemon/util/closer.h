/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/util/offload.h"

/*
 * Descriptors that are to be closed on the pool, in a list for each user and kind. Nothing is
 * allocated for it, so nothing ever has to be closed on the loop.
 */

enum closer_kind {
	CLOSER_RECEIVED,   /* sent by a client; without a user: a data file */
	CLOSER_CONNECTION, /* to a client: what lies unread in it may carry descriptors */
	CLOSER_KINDS,
};

#define CLOSER_WORKERS 4U

struct closer_queue;

struct closer_worker {
	struct job job;
	struct closer_queue *queue;
	bool busy;
};

/* Embedded in struct user, all zero to begin with; owned by closer. */
struct closer_queue {
	struct closer *closer;
	enum closer_kind kind;
	struct user *user;     /* reference, while anything is unfinished; NULL: the broker's own */
	int first, last;       /* numbers plus 1 */
	unsigned n_unfinished; /* listed, being closed, or closed and still charged */
	unsigned n_closed;     /* of them, those that are still charged */
	bool queued;           /* is among those with any */
	struct closer_worker workers[CLOSER_WORKERS];
	TAILQ_ENTRY(closer_queue) link;
};

int closer_new(sd_event *event, struct offload *offload, struct closer **ret);
/* The loop asks no more; … */
void closer_detach(struct closer *closer);
/* … and no thread uses it any more. */
void closer_free(struct closer *closer);

/*
 * Closes a descriptor on the pool. user: who sent it, and was charged one LIMIT_DESCRIPTORS for it, which
 * is discharged once it is closed. Until then the user is charged one LIMIT_UNFINISHED as well, past the
 * limit if need be. NULL: it is a data file's, or another that no client has sent. fd < 0 is ignored.
 * Returns -1, for `x->fd = offload_close(…)`. On the loop only.
 */
int offload_close(struct offload *o, struct user *user, int fd);

/*
 * The same for a connection. One LIMIT_CLIENTS that the user has been charged is discharged once it
 * is closed; NULL: it is not known whose it is.
 */
int offload_close_connection(struct offload *o, struct user *user, int fd);

/* Accounts for what has been closed. */
void closer_collect(struct closer *closer);
unsigned closer_unfinished(const struct closer *closer);

/*
 * For threads that do what can wait as long as a stranger pleases, unless a signal comes: SO_LINGER makes
 * a close do so. Between start and stop one can be had every now and then: between interrupts_begin(),
 * which returns false where there are none, and interrupts_end(), and by interruptible_close().
 */
void interrupter_start(void);
void interrupter_stop(void);
bool interrupts_begin(uint64_t usec);
void interrupts_end(void);
void interruptible_close(int fd);
