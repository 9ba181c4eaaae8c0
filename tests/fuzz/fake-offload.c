/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/closer.h"
#include "daemon/util/user.h"
#include "fake-kernel.h"
#include "protocol/macro.h"

/* The pool without threads, and closes at once. */

struct offload {
	struct job_list waiting, completed;
	unsigned n_unfinished;
	bool closed;
};

int offload_new(sd_event *event, struct offload **ret)
{
	struct offload *o = calloc(1, sizeof(*o));

	if (!o)
		return -ENOMEM;
	STAILQ_INIT(&o->waiting);
	STAILQ_INIT(&o->completed);
	*ret = o;
	return 0;
}

static void submit(struct offload *o, struct user *user, struct job *job, bool charged)
{
	job->user = user ? user_ref(user) : NULL;
	job->charged = charged;
	o->n_unfinished += charged;
	if (o->closed)
		STAILQ_INSERT_TAIL(&o->completed, job, link);
	else
		STAILQ_INSERT_TAIL(&o->waiting, job, link);
}

int offload_submit(struct offload *o, struct user *user, struct job *job)
{
	if (user && user_charge(user, LIMIT_UNFINISHED, 1) < 0)
		return -EDQUOT;
	submit(o, user, job, true);
	return 0;
}

void offload_submit_force(struct offload *o, struct user *user, struct job *job)
{
	if (user)
		user_charge_force(user, LIMIT_UNFINISHED, 1);
	submit(o, user, job, true);
}

void offload_submit_step(struct offload *o, struct user *user, struct job *job)
{
	offload_submit_force(o, user, job);
}

void offload_submit_reap(struct offload *o, struct user *user, struct job *job)
{
	offload_submit_force(o, user, job);
}

void offload_submit_signal(struct offload *o, struct user *user, struct job *job)
{
	offload_submit_force(o, user, job);
}

void offload_submit_uncharged(
	struct offload *o, enum offload_lane lane, struct user *user, struct job *job)
{
	submit(o, user, job, false);
}

bool offload_is_closed(const struct offload *o)
{
	return o->closed;
}

unsigned offload_unfinished(const struct offload *o)
{
	return o->n_unfinished;
}

bool offload_run_next(struct offload *o)
{
	struct job *job = STAILQ_FIRST(&o->waiting);

	if (!job)
		return false;
	STAILQ_REMOVE_HEAD(&o->waiting, link);
	job->run(job);
	STAILQ_INSERT_TAIL(&o->completed, job, link);
	return true;
}

bool offload_finish_next(struct offload *o)
{
	struct job *job = STAILQ_FIRST(&o->completed);
	struct user *user;

	if (!job)
		return false;
	STAILQ_REMOVE_HEAD(&o->completed, link);
	user = TAKE_PTR(job->user);
	if (job->charged) {
		if (user)
			user_discharge(user, LIMIT_UNFINISHED, 1);
		o->n_unfinished--;
	}
	job->done(job);
	if (user)
		user_spend(user, kernel.tick_usec);
	user_unref(user);
	return true;
}

/* Threads overtake each other. */
bool offload_finish_last(struct offload *o)
{
	struct job *job, *last = NULL;

	STAILQ_FOREACH(job, &o->completed, link)
		last = job;
	if (!last)
		return false;
	STAILQ_REMOVE(&o->completed, last, job, link);
	STAILQ_INSERT_HEAD(&o->completed, last, link);
	return offload_finish_next(o);
}

unsigned offload_free(struct offload *o)
{
	if (!o)
		return 0;
	o->closed = true;
	STAILQ_CONCAT(&o->completed, &o->waiting);
	while (offload_finish_next(o))
		;
	free(o);
	return 0;
}

int offload_close(struct offload *o, struct user *user, int fd)
{
	if (fd < 0)
		return -1;
	if (close(fd) < 0)
		abort();
	if (user)
		user_discharge(user, LIMIT_DESCRIPTORS, 1);
	return -1;
}

int offload_close_connection(struct offload *o, struct user *user, int fd)
{
	if (fd < 0)
		return -1;
	if (close(fd) < 0)
		abort();
	if (user)
		user_discharge(user, LIMIT_CLIENTS, 1);
	return -1;
}

void interruptible_close(int fd)
{
	if (close(fd) < 0)
		abort();
}
