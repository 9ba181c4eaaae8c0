/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/context-job.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/kernel/search.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/*
 * Looking whether anybody but the broker has a context, and closing it for good where nobody does:
 * its pins end then, unless something contradicts. That nobody was found is no evidence by itself.
 */

/* How long the service manager may take to close its copy. */
#define BARRIER_MSEC 5000

/* How often all are looked through for who may go on in a dead holder's place, while somebody is known to have
 * what it had. */
#define HEIR_USEC (1 * USEC_PER_SEC)
/* A holder that is told to let go is looked at so often. */
#define LOOK_AGAIN_USEC (1 * USEC_PER_SEC)
/* Linux 6.1 may free the pages of a request that was in flight a second after its end: so late is what contradicts
 * told. */
#define LATE_USEC (2 * USEC_PER_SEC)

struct other {
	struct context_job *job;
	pid_t keeper; /* one descriptor of this process does not count */
	pid_t pid;
};

static bool try_heir(struct context_job *j, pid_t pid)
{
	/* our own parent stores it for us */
	if (pid == getppid() || process_succeed(&j->holder, pid, &j->heir) < 0)
		return false;
	/* The number may have been another's before. */
	if (process_holds(pid, j->fd))
		return true;
	process_clear(&j->heir);
	return false;
}

static int on_other(pid_t pid, void *userdata)
{
	struct other *other = userdata;

	if (pid == other->keeper) {
		other->keeper = 0; /* any other it has is its own */
		return 0;
	}
	if (other->pid == 0)
		other->pid = pid;
	return !other->job->holder_dead || try_heir(other->job, pid);
}

/* Most often it is who it should be, or who it was the last time. 0: all have to be looked through. */
static pid_t find_known_keeper(const struct context_job *j)
{
	if (!j->holder_dead && search_process(j->holder.pid, j->fd) > 0)
		return j->holder.pid;
	if (j->found > 0 && j->found != j->manager && !j->all && search_process(j->found, j->fd) > 0)
		return j->found;
	return 0;
}

/* Returns who keeps pins through it, 0 for nobody that can be seen, or negative errno. */
static pid_t find_keeper(struct context_job *j)
{
	struct other other = {.job = j, .keeper = j->manager};
	struct search search = {
		.fd = j->fd, .holder = &j->holder, .found = on_other, .userdata = &other};
	pid_t found;
	int r;

	/* A living holder may just be about to register. */
	if (j->holder_dead && j->ops->is_empty && j->ops->is_empty(j->fd)) {
		j->doubt.unseen = 0;
		return 0;
	}
	found = find_known_keeper(j);
	if (found > 0)
		return found;
	j->all = true;
	r = search_run(&search);
	j->doubt.unseen = search.unseen;
	found = other.pid > 0 ? other.pid : r;
	if (j->ops->is_empty && found <= 0) {
		if (!j->ops->is_empty(j->fd))
			return found != 0 ? found : -EBUSY;
		j->doubt.unseen = 0;
		return 0;
	}
	/* Once it is closed, there is no telling any more who may have it, but by the counter. */
	if (found == 0 && j->doubt.unseen > 0 && !j->let_go && !j->ops->count)
		return -EACCES;
	return found;
}

/* Where something can be found that contradicts once it has been closed. */
static void look_again(struct context_job *j)
{
	struct search search = {.fd = -1, .holder = &j->holder};

	if (j->doubt.n_pages > 0 && pin_counter_fell(&j->doubt.counter, j->doubt.n_pages))
		j->doubt.n_pages = 0;
	if (j->doubt.unseen == 0)
		return;
	/* A search that fails leaves it as it was. */
	if (search_run(&search) >= 0)
		j->doubt.unseen = search.unseen;
}

static void find_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);

	if (j->fd >= 0) {
		j->found = find_keeper(j);
	} else {
		look_again(j);
		j->found = 0;
		j->closed = true;
	}
}

/* A few of them had only just been pinned, as process_vm_readv() does for a moment. */
static uint64_t without_passing(const struct pin_counter *counter, uint64_t released)
{
	struct pin_counter now;
	uint64_t n;

	pin_counter_start(&now);
	n = now.acquired - counter->acquired;
	if (n > PIN_COUNTER_NOISE)
		n = PIN_COUNTER_NOISE;
	return released > n ? released - n : 0;
}

/*
 * If no pages at all were let go of, ours were not either. If as many as ours were, they are taken
 * to be ours. Otherwise the counter cannot tell: others pin and unpin, too.
 */
static void judge(struct context_job *j, const struct page_count *pages, uint64_t released)
{
	bool told = j->doubt.counter.exact && pages->most > 0;

	j->doubt.n_pages =
		told && without_passing(&j->doubt.counter, released) < pages->least ? pages->most : 0;
	if (j->let_go ||
		(told && released >= pages->most && released <= pages->most + PIN_COUNTER_NOISE))
		j->doubt.unseen = 0;
}

/* Nobody else holds it: the manager's copy has gone, or is going, and ours follows. */
static void close_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct pollfd barrier = {.fd = j->barrier};
	struct page_count pages = {};
	uint64_t released = 0;

	if (j->barrier >= 0 && poll(&barrier, 1, BARRIER_MSEC) <= 0) {
		j->found = -ETIMEDOUT;
		return;
	}
	if (j->ops->count)
		j->ops->count(j->fd, j->n_bound, &pages);
	pin_counter_start(&j->doubt.counter);
	if (j->ops->clear)
		j->ops->clear(j->fd);
	interruptible_close(j->fd);
	j->closed = true;
	j->doubt.closed_usec = now_usec();
	if (j->ops->frees_usec > 0)
		released = pin_counter_wait(&j->doubt.counter,
			pages.most > 0 ? pages.most : j->n_pages, j->ops->frees_usec);
	judge(j, &pages, released);
}

static bool end_some_pins(struct context_job *j, const struct slice *slice)
{
	struct pin *pin;

	while ((pin = context_next_pin(j->context, j->after))) {
		if (slice_is_over(slice))
			return true;
		j->after = pin->id;
		if (!pin->over)
			pin_end(pin, j->let_go ? PROOF_CLAIMED : PROOF_PRESUMED);
	}
	return false;
}

static void set_reaping(struct context *context, bool reaping)
{
	if (context->client && reaping != context->reaping)
		context->client->n_reaping += reaping ? 1 : -1U;
	context->reaping = reaping;
}

void context_say_doubt(const struct context *context, char *ret, size_t size)
{
	const struct context_doubt *doubt = &context->doubt;

	if (doubt->n_pages > 0)
		snprintf(ret, size,
			"it was closed, but the kernel did not let go of its pages "
			"(nr_foll_pin_released): something "
			"that cannot be found has them, a copy of the buffers, or a socket that "
			"shares the umem");
	else if (doubt->unseen > 0)
		snprintf(ret, size,
			"process %d may have it: this broker cannot see whether it does",
			doubt->unseen);
	else if (context->other_holder > 0)
		snprintf(ret, size, "process %d has it", context->other_holder);
	else if (context->other_holder < 0)
		snprintf(ret, size, "it cannot be found out who has it: %s",
			strerror(-context->other_holder));
	else
		*ret = 0;
}

/* At the second look: often a copy of ours, or the kernel's own work, was merely in the way of the
 * first. */
static void tell_doubt(struct context *context)
{
	const struct process *holder = &context->client->process;
	struct log_fields fields = {
		.client = context->client->id,
		.pid = holder->pid,
		.uid = &holder->uid,
		.unit = holder->unit,
	};
	char reason[256];

	if (context->doubt.told)
		return;
	context->doubt.told = true;
	context_say_doubt(context, reason, sizeof(reason));
	log_event(LOG_ERR, NULL, &fields,
		"Pins of %s (pid %d) through context %" PRIu64
		" (%s) cannot be taken for gone: %s. The "
		"leases of their files are kept as long as the kernel waits for them.",
		holder->comm, holder->pid, context->id, context->ops->kind, reason);
}

static void log_keeper(const struct context_job *j)
{
	const struct context *context = j->context;

	if (j->found < 0 && j->found != context->other_holder && j->doubt.unseen == 0)
		log_errno(LOG_WARNING, j->found, "Cannot find out who else holds context %" PRIu64,
			context->id);
	else if (j->found > 0 && j->holder_dead && j->found != context->other_holder)
		log_info("Context %" PRIu64 " of a holder is still held by process %d.",
			context->id, j->found);
}

static void log_abandoned(const struct context *context)
{
	const struct process *holder = &context->client->process;
	struct log_fields fields = {
		.client = context->client->id,
		.pid = holder->pid,
		.uid = &holder->uid,
		.unit = holder->unit,
	};

	log_event(LOG_NOTICE, NULL, &fields,
		"%s (pid %d) does not have context %" PRIu64
		" (%s) any more, and neither has anybody else: its pins have ended.",
		holder->comm, holder->pid, context->id, context->ops->kind);
}

static void reap_end(struct context_job *j)
{
	struct context *context = j->context;
	uint64_t revocation = context->reap_revocation;
	bool detaching = false;

	context->reap_revocation = 0;
	set_reaping(context, false);
	if (context_release(context, j->broker)) {
		struct client *client = context->client;

		if (context->fd >= 0)
			context_keep(context); /* the copy was dropped too early */
		if (j->heir.pidfd >= 0)
			client_inherit(client, &j->heir);
		revocation_check_reachable(j->broker);
		if (!j->ended) {
			context_check_later(context);
			detaching = revocation != 0 && context_detach_now(context, revocation);
		}
		if (revocation != 0 && !detaching)
			revocation_job_done(j->broker, revocation, REVOCATION_DETACHING, false);
		client_collect(client);
	} else if (revocation != 0) {
		revocation_job_done(j->broker, revocation, REVOCATION_DETACHING, false);
	}
	context_job_free(j);
}

static void judge_pins(struct context_job *j)
{
	struct context *context = j->context;

	if (!j->closed) {
		context->doubt.unseen = j->found == -EACCES ? j->doubt.unseen : 0;
		if (context->doubt.unseen > 0)
			tell_doubt(context);
		return;
	}
	j->doubt.told = context->doubt.told;
	context->doubt = j->doubt;
	observe_context(context, OBSERVED_RECORDED);
	j->ended = !context_is_doubtful(context);
	if (!j->ended && j->fd < 0 && now_usec() - j->doubt.closed_usec >= LATE_USEC)
		tell_doubt(context);
	if (j->ended && !j->holder_dead && !j->let_go)
		log_abandoned(context);
}

static void reap_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;

	log_keeper(j);
	context->other_holder = j->found;
	if (j->all)
		context->searched_usec = now_usec();
	if (j->closed && j->fd >= 0) {
		context->fd = -1;
		user_discharge(context->user, LIMIT_DESCRIPTORS, 1);
	}
	if (context->client)
		judge_pins(j);
	if (j->ended)
		context_job_do(j, end_some_pins, reap_end);
	else
		reap_end(j);
}

static void find_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;

	if (j->found != 0 || j->closed || !context->client) {
		reap_done(job);
		return;
	}
	if (store_has(&context->copy)) {
		context_drop_copy(context);
		j->barrier = store_barrier(&j->broker->store);
	}
	j->job.run = close_run;
	j->job.done = reap_done;
	offload_submit_reap(j->broker->offload, context->user, &j->job);
}

/* ---- The holder may have closed it, or executed another program ---- */

static void look_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);

	j->result = search_process(j->holder.pid, j->fd);
	/* One that is connected is only taken not to have it if that can be seen for sure. */
	if (j->result == 0 && j->connected && !search_is_sure(j->fd))
		j->result = -EACCES;
	if (j->result == 0 && j->found > 0)
		j->result = search_process(j->found, j->fd);
}

static void look_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;

	context->looking = false;
	if (context_release(context, j->broker) && context->n_pins > 0) {
		if (j->result == 0)
			context_reap(context);
		else if (context->n_wanted > 0)
			context_look_later(context, LOOK_AGAIN_USEC);
	}
	context_job_free(j);
}

void context_look_for_holder(struct context *context)
{
	bool connected = client_is_connected(context->client);
	struct context_job *j;

	/* One that is connected can say so itself; but somebody may be waiting in vain. */
	if ((connected && context->n_wanted == 0) || context->client->dead || context->n_pins == 0 ||
		context->looking || context->reaping || context->fd < 0)
		return;
	/* Without memory the next audit does it. */
	j = context_job_new(context, 0);
	if (!j)
		return;
	j->found = context->other_holder;
	j->connected = connected;
	j->job.run = look_run;
	j->job.done = look_done;
	context->looking = true;
	offload_submit_step(context->client->broker->offload, context->user, &j->job);
}

static bool count_some_pins(struct context_job *j, const struct slice *slice)
{
	struct pin *pin;

	while ((pin = context_next_pin(j->context, j->after))) {
		if (slice_is_over(slice))
			return true;
		j->after = pin->id;
		if (pin->over || pin->on_demand)
			continue;
		j->let_go &= pin->state == PIN_LEAVING;
		if (pin->handle != INT_NULL)
			j->n_bound += pin_pinned_bytes(pin) / (uint64_t)sysconf(_SC_PAGESIZE);
	}
	return false;
}

static void pins_counted(struct context_job *j)
{
	struct context *context = j->context;

	j->n_pages = context->n_pages;
	j->manager = store_has(&context->copy) ? getppid() : 0;
	j->found = context->other_holder;
	j->all = j->holder_dead && now_usec() - context->searched_usec >= HEIR_USEC;
	j->job.run = find_run;
	j->job.done = find_done;
	offload_submit_step(j->broker->offload, context->user, &j->job);
}

void context_start_reap(struct context *context)
{
	struct context_job *j = context_job_new(context, 0);

	if (!j) {
		/* The audit comes back to it. */
		set_reaping(context, false);
		broker_audit_soon(context->client->broker);
		return;
	}
	j->doubt = context->doubt;
	j->let_go = !j->holder_dead;
	context_job_do(j, count_some_pins, pins_counted);
}

/* Lost with the last run: there is nothing to look for. */
static void end_lost(struct context *context)
{
	struct context_job *j = context_job_new(context, 0);

	if (!j) {
		broker_audit_soon(context->client->broker);
		return;
	}
	set_reaping(context, true);
	j->ended = true;
	context_job_do(j, end_some_pins, reap_end);
}

void context_reap(struct context *context)
{
	if (context->reaping)
		return;
	if (context->fd < 0 && !context_is_doubtful(context)) {
		if (context->client->dead && context->n_pins > 0)
			end_lost(context);
		return;
	}
	/* Our copy may be closed: no other job may be using it. */
	set_reaping(context, true);
	if (context->n_jobs == 0)
		context_start_reap(context);
}
