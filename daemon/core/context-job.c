/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/context-job.h"

#include <inttypes.h>
#include <string.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/kernel/freeze.h"
#include "daemon/kernel/pin-counter.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* Looking whether pins are gone, and detaching them by force: what is done on the pool. */

/* How long stopping a holder may take before a forced detach is given up. */
#define STOP_TIMEOUT_USEC (200 * USEC_PER_MSEC)

/* So many pins are looked for at a time. */
#define CHECK_MAX 1024U

#define CHECK_FIRST_USEC (1 * USEC_PER_MSEC)
#define CHECK_LAST_USEC  (64 * USEC_PER_MSEC)
#define CHECK_IDLE_USEC  (4 * USEC_PER_SEC) /* the same where nobody waits */

/* The same where all of /proc has to be looked through. */
#define REAP_FIRST_USEC (20 * USEC_PER_MSEC)
#define REAP_LAST_USEC  (320 * USEC_PER_MSEC)

/* How long a holder has who wants to deregister what he has let go of, before it is asked for. */
#define ASK_MSEC 10

struct context_job *context_job_new(struct context *context, size_t n_handles)
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

void context_job_free(struct context_job *j)
{
	sd_event_source_disable_unref(j->source);
	safe_close(j->barrier);
	process_clear(&j->holder);
	process_clear(&j->heir);
	free(j);
}

static int on_part(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct context_job *j = userdata;

	if (j->part(j, &slice))
		return 0;
	(void)sd_event_source_set_enabled(source, SD_EVENT_OFF);
	j->rest(j);
	return 0;
}

static int do_later(struct context_job *j)
{
	int r;

	if (!j->source) {
		r = turn_add_source(j->broker->event, &j->source, on_part, j);
		if (r < 0)
			return r;
	}
	return sd_event_source_set_enabled(j->source, SD_EVENT_ON);
}

void context_job_do(struct context_job *j, bool (*part)(struct context_job *j, const struct slice *slice),
		    void (*rest)(struct context_job *j))
{
	struct slice slice = slice_begin();

	j->part = part;
	j->rest = rest;
	j->i = 0;
	j->after = 0;
	while (part(j, &slice)) {
		if (do_later(j) >= 0)
			return;
		slice = slice_begin(); /* no memory: all at once is better than not at all */
	}
	rest(j);
}

static void end_if_gone(struct context_job *j, const struct handle *h)
{
	struct pin *pin;

	if (!h->gone && !h->destroyed)
		return;
	pin = broker_find_pin(j->broker, h->pin);
	/* It may have ended, or been bound anew, while the job ran. */
	if (!pin || pin->over || pin->handle != h->handle ||
	    !handle_identity_equal(&pin->identity, &h->identity))
		return;
	if (h->destroyed && !pin->destroyed) {
		pin->destroyed = true;
		observe_pin(pin, OBSERVED_RECORDED);
	}
	if (h->gone)
		pin_end(pin, j->context->description.proof);
}

/* Ends the pins whose handles were seen to be gone. */
static bool end_some_gone(struct context_job *j, const struct slice *slice)
{
	/* also where another could not be detached: what was destroyed is destroyed */
	for (; j->i < j->n_handles; j->i++) {
		if (slice_is_over(slice))
			return true;
		end_if_gone(j, &j->handles[j->i]);
	}
	return false;
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

	j->result = j->ops->check(j->fd, &j->holder, j->handles, j->n_handles);
}

static void check_now(struct context *context);

static int on_recheck(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct context *context = userdata;

	if (context->client->dead || context_is_doubtful(context)) {
		context_reap(context);
		return 0;
	}
	check_now(context);
	if (context->n_wanted > 0)
		context_look_for_holder(context);
	return 0;
}

/* Does anybody wait for a pin that its holder has let go of, or cannot any more? */
static bool is_wanted_by_any(const struct context *context)
{
	return context->client->dead ? context->n_wanted > 0 : context->n_leaving_wanted > 0;
}

static void set_recheck(struct context *context, uint64_t usec)
{
	sd_event *event = context->client->broker->event;
	int r;

	if (!context->recheck)
		r = sd_event_add_time(event, &context->recheck, CLOCK_MONOTONIC, usec, 1, on_recheck, context);
	else {
		r = sd_event_source_set_time(context->recheck, usec);
		if (r >= 0)
			r = sd_event_source_set_enabled(context->recheck, SD_EVENT_ONESHOT);
	}
	/* Without a timer the ladder's own deadline brings the matter on. */
	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot look again whether pins are gone");
}

void context_check_later(struct context *context)
{
	bool reap = context->client->dead || context->ops->until_close || context->copied;
	uint64_t first = reap ? REAP_FIRST_USEC : CHECK_FIRST_USEC;
	uint64_t last = reap ? REAP_LAST_USEC : CHECK_LAST_USEC;

	if (!is_wanted_by_any(context))
		last = CHECK_IDLE_USEC;
	context->check_usec = context->check_usec < first ? first : context->check_usec * 2;
	if (context->check_usec > last)
		context->check_usec = last;
	set_recheck(context, now_usec() + context->check_usec);
}

void context_check_soon(struct context *context)
{
	context->check_usec = 0;
	set_recheck(context, 0);
}

void context_look_later(struct context *context, uint64_t usec)
{
	/* What is planned comes by there, too. */
	if (!context->recheck || sd_event_source_get_enabled(context->recheck, NULL) <= 0)
		set_recheck(context, now_usec() + usec);
}

static void check_end(struct context_job *j)
{
	struct context *context = j->context;
	bool again = context->check_again;

	context->checking = false;
	context->copied = j->result == -EBUSY;
	context->check_again = false;
	if (context->client) {
		bool left = context_n_awaited(context) > 0;

		if (left && (again || context->n_unchecked > 0)) {
			check_now(context);
		} else {
			context->n_unchecked = 0;
			if (left)
				context_check_later(context);
		}
		if (!context->checking)
			context_wake(&context->waiters);
	}
	context_release(context, j->broker);
	context_job_free(j);
}

static void check_done(struct job *job)
{
	context_job_do(container_of(job, struct context_job, job), end_some_gone, check_end);
}

/* The next ones of the round. Each is put last, so that the next job has others. */
static void add_awaited(struct context *context, struct context_job *j)
{
	unsigned n_max = context->n_unchecked < CHECK_MAX ? context->n_unchecked : CHECK_MAX;
	uint32_t now = now_msec();

	for (unsigned n = 0; n < context->n_leaving && j->n_handles < n_max; n++) {
		struct pin *pin = TAILQ_FIRST(&context->leaving);

		TAILQ_REMOVE(&context->leaving, pin, of_leaving);
		TAILQ_INSERT_TAIL(&context->leaving, pin, of_leaving);
		if (!pin_is_awaited(pin))
			continue;
		j->handles[j->n_handles] = handle_of(pin);
		j->handles[j->n_handles++].ask = context->ask || now - pin->left_msec >= ASK_MSEC;
	}
	context->n_unchecked -= n_max;
	if (context->n_unchecked == 0)
		context->ask = false;
}

static void check_now(struct context *context)
{
	unsigned n = context_n_awaited(context);
	struct context_job *j;

	if (context->checking) {
		context->check_again = true;
		return;
	}
	if (n > 0 && context_is_doubtful(context))
		context_reap(context);
	if (n == 0 || context->fd < 0 || context->reaping)
		return;
	if (context->ops->until_close) {
		/* Those that are not leaving need it open. */
		if (n == context->n_pins)
			context_reap(context);
		return;
	}
	if (context->n_unchecked == 0 || context->n_unchecked > n)
		context->n_unchecked = n;
	j = context_job_new(context, context->n_unchecked < CHECK_MAX ? context->n_unchecked : CHECK_MAX);
	if (!j) {
		context_check_later(context);
		return;
	}
	add_awaited(context, j);
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

/* The job is no more, and nothing is being detached by it. */
static void detach_free(struct context_job *j)
{
	struct context *context = j->context;

	context->n_detaching--;
	if (context->client)
		observe_context(context, OBSERVED_RECORDED);
	if (context->n_detaching == 0)
		context_wake(&context->unpins);
	context_release(context, j->broker);
	context_job_free(j);
}

static void detach_end(struct context_job *j)
{
	struct broker *broker = j->broker;
	uint64_t revocation = j->revocation;

	detach_free(j);
	revocation_job_done(broker, revocation, REVOCATION_DETACHING, false);
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
	context_job_do(j, end_some_gone, detach_end);
}

static bool is_wanted(const struct pin *pin, const struct revocation *revocation)
{
	struct target *target;

	LIST_FOREACH(target, &pin->targets, of_pin)
		if (target->stake->revocation == revocation)
			return !target->on_demand;
	return false;
}

static bool add_some_handles(struct context_job *j, const struct slice *slice)
{
	const struct revocation *revocation = broker_find_revocation(j->broker, j->revocation);
	struct pin *pin;

	while ((pin = context_next_pin(j->context, j->after))) {
		bool wanted;

		if (slice_is_over(slice))
			return true;
		j->after = pin->id;
		if (pin->handle == INT_NULL || pin->over || j->n_handles == j->i)
			continue;
		wanted = revocation && is_wanted(pin, revocation);
		j->handles[j->n_handles] = handle_of(pin);
		j->handles[j->n_handles++].keep = !wanted;
		j->n_wanted += wanted;
	}
	return false;
}

static void submit_detach(struct context_job *j)
{
	j->job.run = detach_run;
	j->job.done = detach_done;
	/* whoever finds it so has to let them go on */
	observe_context(j->context, OBSERVED_RECORDED);
	broker_flush(j->broker);
	offload_submit_step(j->broker->offload, j->context->user, &j->job);
}

static int detach_by_reap(struct context *context, uint64_t revocation);

static void handles_added(struct context_job *j)
{
	struct context *context = j->context;
	struct broker *broker = j->broker;
	uint64_t context_id, revocation = j->revocation;
	bool reaped = j->reaped;

	if (context->client && j->n_wanted > 0) {
		submit_detach(j);
		return;
	}
	context_id = context->id;
	detach_free(j);
	context = broker_find_context(broker, context_id);
	if (!context || reaped || detach_by_reap(context, revocation) <= 0)
		revocation_job_done(broker, revocation, REVOCATION_DETACHING, false);
}

/* Returns 1 if a job is under way, 0 if there is nothing that could be detached so. While it is being found
 * out what there is, no pin is let go of: its handle would be another's. */
static int start_detach(struct context *context, const struct revocation *revocation, bool reaped)
{
	struct slice slice = slice_begin();
	struct context_job *j;
	int r = 0;

	if (!context->description.forcible || !context->ops->detach || context->fd < 0)
		return 0;
	j = context_job_new(context, context->n_pins);
	if (!j)
		return -ENOMEM;
	j->i = context->n_pins; /* for so many there is room */
	j->revocation = revocation->id;
	j->reaped = reaped;
	j->part = add_some_handles;
	j->rest = handles_added;
	context->n_detaching++;
	if (add_some_handles(j, &slice)) {
		r = do_later(j);
		if (r >= 0)
			return 1;
	} else if (j->n_wanted > 0) {
		submit_detach(j);
		return 1;
	}
	detach_free(j);
	return r;
}

bool context_detach_now(struct context *context, uint64_t id)
{
	const struct revocation *revocation =
		broker_find_revocation(context->client->broker, id);

	return revocation && revocation->state == REVOCATION_DETACHING &&
	       start_detach(context, revocation, true) > 0;
}

static int detach_by_reap(struct context *context, uint64_t revocation)
{
	if (context->reap_revocation != 0)
		return 0;
	context->reap_revocation = revocation;
	context_reap(context);
	if (context->reaping)
		return 1;
	context->reap_revocation = 0;
	return -ENOMEM;
}

int context_detach(struct context *context, struct revocation *revocation)
{
	int r;

	/* One that is being reaped anyway is detached after that, if need be. */
	if (!context->reaping) {
		r = start_detach(context, revocation, false);
		if (r != 0 || context->fd < 0)
			return r;
	}
	return detach_by_reap(context, revocation->id);
}
