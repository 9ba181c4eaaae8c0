/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/core/context.h"
#include "daemon/util/offload.h"
#include "daemon/util/turn.h"

/* Between context.c, which knows what a context is, and context-job.c and context-reap.c, which do
 * the work on it. */

/*
 * Work on a context's descriptor, which stays open until the job has come back. The context may
 * have lost its client by then.
 */
struct context_job {
	struct job job;
	struct broker *broker;
	struct context *context;
	const struct context_ops *ops;
	int fd;
	struct process holder; /* a copy */
	bool holder_dead;
	uint64_t revocation; /* 0: none */

	/* reap */
	uint64_t n_pages; /* that the pins have, and that should be freed */
	uint64_t n_bound; /* those of them of which it is known where they are */
	bool let_go;      /* a living holder has let go of all of them */
	bool connected;   /* look: the holder is */
	pid_t manager;    /* the service manager's, if it has a copy; else 0 */
	pid_t found;      /* somebody else who holds it, before and now; or negative errno */
	bool all;         /* it is not enough that he does; out: all were looked through */
	struct process heir; /* who has it of the same user, if the holder is dead; pidfd -1: nobody */
	int barrier;      /* owned; hangs up when the manager's copy has gone; -1: it has none */
	bool closed;      /* ours is closed, too */
	bool ended;       /* and so its pins have ended */
	struct context_doubt doubt;

	int result;
	size_t n_wanted; /* detach: of the handles */
	bool reaped;     /* detach: it has been looked before who else holds it */

	/* what is done in slices: before the job runs, or with its results */
	sd_event_source *source;
	bool (*part)(struct context_job *job, const struct slice *slice);
	void (*rest)(struct context_job *job);
	uint64_t after; /* this pin */
	size_t i;       /* handle */

	size_t n_handles;
	struct handle handles[];
};

struct context_job *context_job_new(struct context *context, size_t n_handles);
void context_job_free(struct context_job *job);
/* Does as much of `part` as fits into a slice, and what is left in the turns that follow, until it
 * returns false; then the rest. */
void context_job_do(struct context_job *job,
	bool (*part)(struct context_job *job, const struct slice *slice),
	void (*rest)(struct context_job *job));

/* All that use its descriptor have come back: the reap that waited for that begins. */
void context_start_reap(struct context *context);
/* After a look in vain. */
void context_check_later(struct context *context);
/* After a reap in vain: true if a detach for the revocation is under way. */
bool context_detach_now(struct context *context, uint64_t revocation);

/* The service manager's copy is to be closed. */
void context_drop_copy(struct context *context);

/* What they waited for has come. */
void context_wake(struct context_waiters *waiters);
