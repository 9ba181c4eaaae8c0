/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

/*
 * The pool of threads for everything that can wait: opens, closing what clients sent, scans of
 * /proc, io_uring unregistration. The loop itself never blocks.
 *
 * Each user has a queue of its own, and at most OFFLOAD_RUNNING_PER_USER of its jobs run at once, so
 * a user whose jobs hang (closing a file of a dead FUSE server) holds up nobody else. The steps that
 * end a user's pins have a second queue, and threads, of their own: they never stand behind his hanging
 * closes. The broker's own jobs (user NULL) have theirs.
 */

#define OFFLOAD_RUNNING_PER_USER 4U
#define OFFLOAD_CLIENT_THREADS   32U /* started on demand, ended after 10 s without work */
#define OFFLOAD_STEP_THREADS     16U
#define OFFLOAD_SYSTEM_THREADS   4U

struct user;
struct offload;
struct offload_queue;

/* Embedded as the first member of what a job works on. */
struct job {
	void (*run)(struct job *job);  /* on a thread of the pool; touches nothing but the job */
	void (*done)(struct job *job); /* on the loop, afterwards; the job is the callee's again */
	struct user *user;             /* offload's: a reference, and one LIMIT_UNFINISHED */
	struct offload_queue *queue;   /* offload's */
	STAILQ_ENTRY(job) link;        /* offload's */
};

STAILQ_HEAD(job_list, job);

/* Embedded in struct user, one for what it asks for and one for the steps against its pins; all zero to
 * begin with. Owned by offload. */
struct offload_queue {
	struct job_list jobs;
	unsigned n_running;
	bool queued; /* is in its lane's list of queues with something to run */
	TAILQ_ENTRY(offload_queue) link;
};

/*
 * thread_init, if not NULL, runs first on every thread that serves clients' jobs (it drops
 * privileges); a negative return aborts the process.
 */
int offload_new(sd_event *event, int (*thread_init)(void), struct offload **ret);

/*
 * Ends the pool: jobs that run are waited for a moment; what is queued and has not begun is dropped with
 * its done() called on the caller's thread. Jobs that hang are left behind for the process's exit to end:
 * their number is returned, and what they use must stay.
 */
unsigned offload_free(struct offload *o);

/*
 * Queues a job. user: who caused it, charged with one LIMIT_UNFINISHED and referenced until done()
 * has returned; NULL for the broker's own. Returns 0, or -EDQUOT with nothing done if the user has
 * LIMIT_UNFINISHED jobs already. Never allocates. On the loop only.
 */
int offload_submit(struct offload *o, struct user *user, struct job *job);

/* The same, whatever the user's limit says. */
void offload_submit_force(struct offload *o, struct user *user, struct job *job);

/* A step towards the end of the user's pins: whatever the limit says, and whatever else of his hangs. */
void offload_submit_step(struct offload *o, struct user *user, struct job *job);

/*
 * Closes a descriptor on the pool. Always accepted: charged to the user past the limit if need be;
 * with no memory one of a few spare jobs serves, and when these are used up it is closed here and
 * now. fd < 0 is ignored. Returns -1, for `x->fd = offload_close(…)`.
 */
int offload_close(struct offload *o, struct user *user, int fd);

/* Jobs queued or running, of all users and the broker. */
unsigned offload_unfinished(const struct offload *o);
