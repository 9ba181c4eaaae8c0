/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

/*
 * The pool of threads for everything that can wait: opens, closing what clients sent, scans of
 * /proc, io_uring unregistration. The loop itself never blocks.
 *
 * Work of a kind has a lane of its own: threads that nothing else waits for. In each lane a user has a queue
 * of its own, and only so many of its jobs run at once, so a user whose jobs hang (closing a file of a
 * dead FUSE server) holds up nobody else, and itself nowhere else. Threads are started on demand, and ended
 * after 10 s without work.
 */

enum offload_lane {
	OFFLOAD_CLIENTS,     /* what users ask for */
	OFFLOAD_STEPS,       /* towards the end of their pins: looking, detaching */
	OFFLOAD_REAPS,       /* the last closes of contexts, with which their pins end */
	OFFLOAD_SIGNALS,     /* to their processes */
	OFFLOAD_CLOSES,      /* of other descriptors that they sent: these may hang for ever */
	OFFLOAD_CONNECTIONS, /* of their connections, with what lies unread in them */
	OFFLOAD_FILES,       /* closes of data files */
	OFFLOAD_SETTLES,     /* opens that settle leases: who listens to opens can hold them up */
	OFFLOAD_SYSTEM,      /* what else the broker does */
	OFFLOAD_LANES,
};

#define OFFLOAD_RUNNING_PER_USER 4U /* at most, in a lane */
#define OFFLOAD_CLOSES_PER_USER 2U
#define OFFLOAD_CLIENT_THREADS   128U

struct closer;
struct user;
struct offload;
struct offload_queue;

/* Embedded as the first member of what a job works on. */
struct job {
	void (*run)(struct job *job);  /* on a thread of the pool; touches nothing but the job */
	void (*done)(struct job *job); /* on the loop, afterwards; the job is the callee's again */
	struct user *user;             /* offload's: a reference, and one LIMIT_UNFINISHED if charged */
	bool charged;                  /* offload's */
	struct offload_queue *queue;   /* offload's */
	STAILQ_ENTRY(job) link;        /* offload's */
};

STAILQ_HEAD(job_list, job);

/* Embedded in struct user, one for each lane; all zero to begin with. Owned by offload. */
struct offload_queue {
	struct job_list jobs;
	unsigned n_running;
	bool queued; /* is in its lane's list of queues with something to run */
	TAILQ_ENTRY(offload_queue) link;
};

int offload_new(sd_event *event, struct offload **ret);

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
/* The same for a job that closes a context for good, by interruptible_close(). */
void offload_submit_reap(struct offload *o, struct user *user, struct job *job);
/* The same for a signal to a process of the user's. */
void offload_submit_signal(struct offload *o, struct user *user, struct job *job);

/* Any lane, charged with nothing. */
void offload_submit_uncharged(struct offload *o, enum offload_lane lane, struct user *user,
			      struct job *job);
/* It is being freed: a job that is submitted now is done without having run. */
bool offload_is_closed(const struct offload *o);

struct closer *offload_get_closer(struct offload *o);

/* Jobs queued or running, and descriptors to be closed, of all users and the broker. */
unsigned offload_unfinished(const struct offload *o);
