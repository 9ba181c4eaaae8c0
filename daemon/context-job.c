/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "context-job.h"

#include <inttypes.h>
#include <poll.h>
#include <string.h>

#include "broker.h"
#include "holders.h"
#include "log.h"
#include "macro.h"
#include "pin-counter.h"
#include "state.h"

/* Looking whether pins are gone, closing for good, detaching by force: what is done on the pool. */

/* How long stopping a holder may take before a forced detach is given up. */
#define STOP_TIMEOUT_USEC (200 * USEC_PER_MSEC)

/* How long the service manager may take to close its copy. */
#define BARRIER_MSEC 5000

#define CHECK_FIRST_USEC (1 * USEC_PER_MSEC)
#define CHECK_LAST_USEC  (64 * USEC_PER_MSEC)
#define CHECK_IDLE_USEC  (4 * USEC_PER_SEC) /* the same where nobody waits */

/* The same for looks through all of /proc. */
#define REAP_FIRST_USEC (20 * USEC_PER_MSEC)
#define REAP_LAST_USEC  (320 * USEC_PER_MSEC)

/* How long a holder has who wants to deregister what he has let go of, before it is asked for. */
#define ASK_MSEC 10

/*
 * Work on a context's descriptor, which stays open until the job has come back. The context may have
 * lost its client by then.
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
	uint64_t n_pages;    /* reap: that should be freed */
	pid_t manager;       /* reap: the service manager's, if it has a copy; else 0 */
	pid_t found;         /* reap: somebody else who holds it */
	struct process heir; /* reap: who has it of the same user, if the holder is dead; pidfd -1: nobody */
	int barrier;         /* reap: owned; hangs up when the manager's copy has gone; -1: it has none */
	bool closed;         /* reap: ours is closed, too */
	int result;
	size_t n_wanted;     /* detach: of the handles */
	size_t n_handles;
	struct handle handles[];
};

static struct context_job *context_job_new(struct context *context, size_t n_handles)
{
	struct context_job *j = calloc(1, sizeof(*j) + n_handles * sizeof(struct handle));

	if (!j)
		return NULL;
	if (process_copy(&context->client->process, &j->holder) < 0) {
		free(j);
		return NULL;
	}
	j->broker = context->client->broker;
	j->barrier = -1;
	j->heir.pidfd = -1;
	j->context = context_hold(context);
	j->ops = context->ops;
	j->fd = context->fd;
	j->holder_dead = context->client->dead;
	return j;
}

static void context_job_free(struct context_job *j)
{
	safe_close(j->barrier);
	process_clear(&j->holder);
	process_clear(&j->heir);
	free(j);
}

/* Ends the pins whose handles were seen to be gone. */
static void end_gone(struct context_job *j)
{
	for (size_t i = 0; i < j->n_handles; i++) {
		const struct handle *h = &j->handles[i];
		struct pin *pin;

		if (!h->gone && !h->destroyed)
			continue;
		pin = broker_find_pin(j->broker, h->pin);
		/* It may have ended, or been bound anew, while the job ran. */
		if (!pin || pin->over || pin->handle != h->handle ||
		    !handle_identity_equal(&pin->identity, &h->identity))
			continue;
		if (h->destroyed && !pin->destroyed) {
			pin->destroyed = true;
			state_pin(pin);
		}
		if (h->gone)
			pin_end(pin, j->context->description.proof);
	}
}

static struct handle handle_of(const struct pin *pin)
{
	return (struct handle){
		.pin = pin->id,
		.handle = pin->handle,
		.identity = pin->identity,
		.length = pin->length,
		.left = pin->state == PIN_LEAVING,
	};
}

static void check_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);

	j->result = j->ops->check(j->fd, j->handles, j->n_handles);
}

static void check_now(struct context *context);

static int on_recheck(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct context *context = userdata;

	if (context->client->dead)
		context_reap(context);
	else
		check_now(context);
	return 0;
}

/* Does anybody wait for a pin that its holder has let go of, or cannot any more? */
static bool is_wanted_by_any(const struct context *context)
{
	const struct pin *pin;

	LIST_FOREACH(pin, &context->pins, of_context)
		if ((pin_is_awaited(pin) || context->client->dead) && !LIST_EMPTY(&pin->targets))
			return true;
	return false;
}

static void check_later(struct context *context)
{
	bool reap = context->client->dead || context->ops->until_close;
	uint64_t first = reap ? REAP_FIRST_USEC : CHECK_FIRST_USEC;
	uint64_t last = reap ? REAP_LAST_USEC : CHECK_LAST_USEC;
	sd_event *event = context->client->broker->event;
	int r;

	if (!is_wanted_by_any(context))
		last = CHECK_IDLE_USEC;
	context->check_usec = context->check_usec < first ? first : context->check_usec * 2;
	if (context->check_usec > last)
		context->check_usec = last;
	if (!context->recheck)
		r = sd_event_add_time(event, &context->recheck, CLOCK_MONOTONIC,
				      now_usec() + context->check_usec, 1, on_recheck, context);
	else {
		r = sd_event_source_set_time(context->recheck, now_usec() + context->check_usec);
		if (r >= 0)
			r = sd_event_source_set_enabled(context->recheck, SD_EVENT_ONESHOT);
	}
	/* Without a timer the ladder's own deadline brings the matter on. */
	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot look again whether pins are gone");
}

static void check_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;
	bool again;

	context->checking = false;
	again = context->check_again;
	context->check_again = false;
	if (context->client) {
		bool left = false;

		if (j->result >= 0)
			end_gone(j);
		for (struct pin *pin = LIST_FIRST(&context->pins); pin && !left;
		     pin = LIST_NEXT(pin, of_context))
			left = pin_is_awaited(pin);
		if (left && again) {
			check_now(context);
		} else {
			if (left)
				check_later(context);
			context_wake(&context->waiters);
		}
	}
	context_release(context, j->broker);
	context_job_free(j);
}

static void check_now(struct context *context)
{
	struct context_job *j;
	struct pin *pin;
	size_t n = 0;

	if (context->checking) {
		context->check_again = true;
		return;
	}
	LIST_FOREACH(pin, &context->pins, of_context)
		n += pin_is_awaited(pin);
	if (n == 0 || context->fd < 0 || context->reaping)
		return;
	if (context->ops->until_close) {
		/* Those that are not leaving need it open. */
		if (n == context->n_pins)
			context_reap(context);
		return;
	}
	j = context_job_new(context, n);
	if (!j) {
		check_later(context);
		return;
	}
	LIST_FOREACH(pin, &context->pins, of_context)
		if (pin_is_awaited(pin)) {
			j->handles[j->n_handles] = handle_of(pin);
			j->handles[j->n_handles++].ask = context->ask ||
							 now_msec() - pin->left_msec >= ASK_MSEC;
		}
	context->ask = false;
	j->job.run = check_run;
	j->job.done = check_done;
	context->checking = true;
	offload_submit_step(context->client->broker->offload, context->user, &j->job);
}

void context_check(struct context *context)
{
	context->check_usec = 0;
	check_now(context);
}

bool context_look(struct context *context, struct context_waiter *waiter)
{
	context->ask = true;
	check_now(context);
	if (!context->checking) {
		context->ask = false;
		return false;
	}
	LIST_INSERT_HEAD(&context->waiters, waiter, of_context);
	return true;
}

bool context_wait_detached(struct context *context, struct context_waiter *waiter)
{
	if (context->n_detaching == 0)
		return false;
	LIST_INSERT_HEAD(&context->unpins, waiter, of_context);
	return true;
}

static bool detach_now(struct context *context, uint64_t revocation);

/* Returns who keeps pins through it, 0 for nobody, or negative errno. */
static int find_keeper(const struct context_job *j)
{
	pid_t found = process_find_holder(j->fd, j->manager);

	/* A living holder may just be about to register. */
	if (!j->ops->is_empty || (found > 0 && !j->holder_dead))
		return found;
	if (j->ops->is_empty(j->fd))
		return 0;
	return found != 0 ? found : -EBUSY;
}

static int try_heir(pid_t pid, void *userdata)
{
	struct context_job *j = userdata;

	/* our own parent stores it for us */
	if (pid == getppid() || process_succeed(&j->holder, pid, &j->heir) < 0)
		return 0;
	/* The number may have been another's before. */
	if (process_holds(pid, j->fd))
		return 1;
	process_clear(&j->heir);
	return 0;
}

static void find_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);

	j->found = find_keeper(j);
	if (j->found > 0 && j->holder_dead)
		(void)process_for_each_holder(j->fd, try_heir, j);
}

/* Nobody else holds it: the manager's copy has gone, or is going, and ours follows. */
static void close_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct pollfd barrier = { .fd = j->barrier };
	struct pin_counter counter;

	if (j->barrier >= 0 && poll(&barrier, 1, BARRIER_MSEC) <= 0) {
		j->found = -ETIMEDOUT;
		return;
	}
	pin_counter_start(&counter);
	interruptible_close(j->fd);
	j->closed = true;
	if (j->ops->frees_usec > 0)
		pin_counter_wait(&counter, j->n_pages, j->ops->frees_usec);
}

static void end_pins(struct context *context, enum proof proof)
{
	struct pin *pin, *next;

	for (pin = LIST_FIRST(&context->pins); pin; pin = next) {
		next = LIST_NEXT(pin, of_context);
		if (!pin->over)
			pin_end(pin, proof);
	}
}

static void reap_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;
	uint64_t revocation = context->reap_revocation;

	context->reap_revocation = 0;
	context->reaping = false;
	if (j->closed) {
		context->fd = -1;
		user_discharge(context->user, LIMIT_DESCRIPTORS, 1);
	} else if (j->found < 0)
		log_errno(LOG_WARNING, j->found, "Cannot find out who else holds context %" PRIu64,
			  context->id);
	else if (j->found > 0 && j->holder_dead && j->found != context->other_holder)
		log_info("Context %" PRIu64 " of a holder is still held by process %d.",
			 context->id, j->found);
	context->other_holder = j->found;
	if (context_release(context, j->broker)) {
		struct client *client = context->client;
		uint64_t client_id = client->id;

		if (j->closed) {
			state_context(context);
			end_pins(context, client->dead ? PROOF_PRESUMED : PROOF_CLAIMED);
		} else {
			context_keep(context); /* the copy was dropped too early */
		}
		client = broker_find_client(j->broker, client_id);
		if (client && j->heir.pidfd >= 0)
			client_inherit(client, &j->heir);
		revocation_check_reachable(j->broker);
		if (!j->closed && client && (client->dead || revocation == 0))
			check_later(context);
		if (revocation != 0 && !(client && !j->closed && detach_now(context, revocation)))
			revocation_job_done(j->broker, revocation, REVOCATION_DETACHING, false);
		if (client)
			client_collect(client);
	} else if (revocation != 0) {
		revocation_job_done(j->broker, revocation, REVOCATION_DETACHING, false);
	}
	context_job_free(j);
}

static void find_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	struct context *context = j->context;

	if (j->found != 0 || !context->client) {
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

void context_start_reap(struct context *context)
{
	struct context_job *j;
	struct pin *pin;

	j = context_job_new(context, 0);
	if (!j) {
		/* The audit comes back to it. */
		context->reaping = false;
		broker_audit_soon(context->client->broker);
		return;
	}
	LIST_FOREACH(pin, &context->pins, of_context)
		if (!pin->over && !pin->on_demand)
			j->n_pages += pin->length / (uint64_t)sysconf(_SC_PAGESIZE);
	j->manager = store_has(&context->copy) ? getppid() : 0;
	j->job.run = find_run;
	j->job.done = find_done;
	offload_submit_step(context->client->broker->offload, context->user, &j->job);
}

void context_reap(struct context *context)
{
	/* Lost with the last run: there is nothing to look for. */
	if (context->fd < 0 && context->client->dead)
		end_pins(context, PROOF_PRESUMED);
	if (context->reaping || context->fd < 0)
		return;
	/* Our copy may be closed: no other job may be using it. */
	context->reaping = true;
	if (context->n_jobs == 0)
		context_start_reap(context);
}

static uint64_t wanted_pages(const struct context_job *j)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), n = 0;

	for (size_t i = 0; i < j->n_handles; i++)
		if (j->handles[i].gone)
			n += (j->handles[i].identity.length + page - 1) / page;
	return n;
}

static void detach_run(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);
	bool alive = !j->holder_dead && process_is_same(&j->holder);
	struct pin_counter counter;
	struct holders holders;

	/* Between looking at a handle and destroying it nobody who has the context must reuse it. */
	j->result = holders_stop(j->fd, &j->holder, alive, STOP_TIMEOUT_USEC, &holders);
	if (j->result >= 0) {
		pin_counter_start(&counter);
		j->result = j->ops->detach(j->fd, &j->holder, j->handles, j->n_handles);
	}
	holders_continue(&holders);
	/* Who cannot have the counters of all CPUs folded would wait in vain. */
	if (j->result >= 0 && j->ops->detach_frees_usec > 0 && geteuid() == 0)
		pin_counter_wait(&counter, wanted_pages(j), j->ops->detach_frees_usec);
}

static void detach_done(struct job *job)
{
	struct context_job *j = container_of(job, struct context_job, job);

	if (j->result < 0) {
		struct log_fields fields = {
			.revocation = j->revocation,
			.pid = j->holder.pid,
			.uid = &j->holder.uid,
			.error = -j->result,
		};

		log_event(LOG_NOTICE, MESSAGE_REVOKE_ESCALATED, &fields,
			  "%s of %s (pid %d) could not be detached for sure: %s.", j->ops->kind,
			  j->holder.comm, j->holder.pid, strerror(-j->result));
	}
	if (j->result >= 0) {
		struct log_fields fields = {
			.revocation = j->revocation,
			.pid = j->holder.pid,
			.uid = &j->holder.uid,
		};

		log_event(LOG_WARNING, MESSAGE_REVOKE_ESCALATED, &fields,
			  "Detached %zu pin%s of %s (pid %d) by force.", j->n_wanted,
			  PLURAL(j->n_wanted), j->holder.comm, j->holder.pid);
	}
	j->context->n_detaching--;
	if (j->context->client) {
		state_context(j->context);
		end_gone(j);
	}
	if (j->context->n_detaching == 0)
		context_wake(&j->context->unpins);
	context_release(j->context, j->broker);
	revocation_job_done(j->broker, j->revocation, REVOCATION_DETACHING, false);
	context_job_free(j);
}

static bool is_wanted(const struct pin *pin, const struct revocation *revocation)
{
	struct target *target;

	LIST_FOREACH(target, &pin->targets, of_pin)
		if (target->revocation == revocation)
			return !target->on_demand;
	return false;
}

/* Returns 1 if a job is under way, 0 if there is nothing that could be detached so. */
static int start_detach(struct context *context, const struct revocation *revocation)
{
	struct context_job *j;
	struct pin *pin;
	size_t n = 0, n_wanted = 0;

	if (!context->description.forcible || !context->ops->detach || context->fd < 0)
		return 0;
	LIST_FOREACH(pin, &context->pins, of_context)
		if (pin->handle != INT_NULL && !pin->over) {
			n++;
			n_wanted += is_wanted(pin, revocation);
		}
	if (n_wanted == 0)
		return 0;
	j = context_job_new(context, n);
	if (!j)
		return -ENOMEM;
	LIST_FOREACH(pin, &context->pins, of_context)
		if (pin->handle != INT_NULL && !pin->over) {
			j->handles[j->n_handles] = handle_of(pin);
			j->handles[j->n_handles++].keep = !is_wanted(pin, revocation);
		}
	j->n_wanted = n_wanted;
	j->revocation = revocation->id;
	context->n_detaching++;
	j->job.run = detach_run;
	j->job.done = detach_done;
	/* whoever finds it so has to let them go on */
	state_context(context);
	state_flush(j->broker);
	offload_submit_step(context->client->broker->offload, context->user, &j->job);
	return 1;
}

/* After a reap in vain. */
static bool detach_now(struct context *context, uint64_t id)
{
	const struct revocation *revocation =
		broker_find_revocation(context->client->broker, id);

	return revocation && revocation->state == REVOCATION_DETACHING &&
	       start_detach(context, revocation) > 0;
}

int context_detach(struct context *context, struct revocation *revocation)
{
	int r;

	/* One that is being reaped anyway is detached after that, if need be. */
	if (!context->reaping) {
		r = start_detach(context, revocation);
		if (r != 0 || context->fd < 0)
			return r;
	}
	if (context->reap_revocation != 0)
		return 0;
	context->reap_revocation = revocation->id;
	context_reap(context);
	if (context->reaping)
		return 1;
	context->reap_revocation = 0;
	return -ENOMEM;
}
