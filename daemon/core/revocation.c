/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/revocation.h"

#include <assert.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "daemon/core/broker.h"
#include "daemon/core/notice.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* How long forced detaches, and dying, may take. */
#define DETACH_USEC (2 * USEC_PER_SEC)
#define KILL_USEC   (2 * USEC_PER_SEC)
#define RETRY_USEC  (10 * USEC_PER_MSEC)

/* A holder that lets go at once is not kept from it by a look whether it has anything. */
#define LOOK_USEC (100 * USEC_PER_MSEC)

/* What is left unused of the kernel's lease-break-time, as a fraction, and at most. */
#define MARGIN_PART 10
#define MARGIN_USEC (1 * USEC_PER_SEC)

/* In its place where the kernel sets no bound: its default. */
#define BUDGET_USEC (45 * USEC_PER_SEC)

struct conflict conflict_new(enum cause cause)
{
	return (struct conflict){ .cause = cause, .size = INT_NULL, .uid = INT_NULL };
}

void conflict_message(const struct conflict *conflict, struct msg_conflict *ret)
{
	*ret = (struct msg_conflict){
		.cause = conflict->cause,
		.offset = (int64_t)conflict->offset,
		.length = (int64_t)conflict->length,
		.size = conflict->size,
		.pid = conflict->pid > 0 ? conflict->pid : INT_NULL,
		.uid = conflict->uid,
		.comm = conflict->comm[0] ? conflict->comm : NULL,
		.reason = conflict->reason[0] ? conflict->reason : NULL,
	};
}

struct log_fields revocation_fields(const struct revocation *rev)
{
	const struct file *file = rev->file ? broker_find_file(rev->broker, rev->file) : NULL;
	const struct use *use = file ? LIST_FIRST(&file->uses) : NULL;

	return (struct log_fields){
		.revocation = rev->id,
		.file = rev->file,
		.path = rev->path,
		.charged_uid = use ? &use->client->process.uid : NULL,
		.breaker_pid = rev->conflict.pid,
		.breaker_comm = rev->conflict.comm[0] ? rev->conflict.comm : NULL,
		.cause = enumeration_name(&enumeration_cause, rev->conflict.cause),
	};
}

const char *revocation_path(const struct revocation *rev)
{
	return rev->path ? rev->path : "several files";
}

/* What of the kernel's time may be used. */
static uint64_t less_margin(uint64_t usec)
{
	return usec - (usec / MARGIN_PART < MARGIN_USEC ? usec / MARGIN_PART : MARGIN_USEC);
}

/* The whole ladder has to fit before the kernel takes the lease. */
static void plan(struct revocation *rev, uint64_t grace_usec, uint64_t broken_usec)
{
	const struct config *config = rev->broker->config;
	uint64_t later, total, whole = lease_break_usec(), budget = whole;

	if (grace_usec == UINT64_MAX)
		grace_usec = config->revoke_grace_usec;
	rev->detach_usec = DETACH_USEC;
	rev->signal = config->signal_on_timeout;
	rev->signal_usec = rev->signal > 0 ? config->signal_grace_usec : 0;
	rev->kill_usec = KILL_USEC;
	later = rev->detach_usec + rev->signal_usec + rev->kill_usec;
	/* found late, after a restart */
	if (budget != USEC_INFINITY && rev->start_usec > broken_usec)
		budget -= rev->start_usec - broken_usec < budget ? rev->start_usec - broken_usec : budget;
	budget = less_margin(budget);
	if (__builtin_add_overflow(grace_usec, later, &total))
		total = UINT64_MAX;

	if (rev->by_break && total > budget) {
		double scale = (double)budget / (double)total;
		struct log_fields fields = revocation_fields(rev);

		grace_usec = (uint64_t)((double)grace_usec * scale);
		rev->detach_usec = (uint64_t)((double)rev->detach_usec * scale);
		rev->signal_usec = (uint64_t)((double)rev->signal_usec * scale);
		rev->kill_usec = (uint64_t)((double)rev->kill_usec * scale);
		later = rev->detach_usec + rev->signal_usec + rev->kill_usec;
		log_event(LOG_WARNING, NULL, &fields,
			  "What is left of the kernel's lease-break-time, %.1f s, is too short for the "
			  "configured %.1f s: all steps shortened to %.0f%%.",
			  (double)budget / 1e6, (double)total / 1e6, scale * 100);
	}
	/* Nobody waits without bound, also where the kernel would let him. */
	if (whole == USEC_INFINITY)
		whole = budget = rev->by_break && total > BUDGET_USEC ? total : BUDGET_USEC;
	else
		whole = less_margin(whole);
	if (__builtin_add_overflow(rev->start_usec, grace_usec, &rev->deadline_usec))
		rev->deadline_usec = UINT64_MAX / 2;
	rev->latest_usec = rev->by_break ? rev->start_usec + budget - later
					 : rev->deadline_usec + budget;
	/* Found late, it may have come only just before: the kernel itself knows how long it waits. */
	rev->last_usec = rev->start_usec + whole;
}

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct revocation *rev = userdata;

	if (rev->again && now_usec() < rev->deadline_usec)
		revocation_go_on(rev);
	else
		revocation_event(rev, REVOKE_TIMEOUT);
	return 0;
}

static void set_timer(struct revocation *rev, uint64_t usec)
{
	int r = sd_event_source_set_time(rev->timer, usec);

	if (r >= 0)
		r = sd_event_source_set_enabled(rev->timer, SD_EVENT_ONESHOT);
	if (r < 0) /* epoll and timerfd exist already: it takes no memory */
		log_errno(LOG_ERR, r, "Cannot arm the timer of revocation %" PRIu64, rev->id);
}

static void arm(struct revocation *rev, unsigned actions)
{
	uint64_t usec, now = now_usec();

	if (actions & REVOKE_ARM_GRACE)
		usec = rev->deadline_usec;
	else if (actions & REVOKE_ARM_DETACH)
		usec = now + rev->detach_usec;
	else if (actions & REVOKE_ARM_SIGNAL)
		usec = now + rev->signal_usec;
	else
		usec = now + rev->kill_usec;
	/* What is pinned still may yet be let go of while the kernel waits. */
	if (actions & REVOKE_ARM_KILL && rev->by_break && usec < rev->last_usec)
		usec = rev->last_usec;
	rev->deadline_usec = usec;
	set_timer(rev, usec);
}

static void log_remaining(struct revocation *rev, const struct stake *stake)
{
	const struct client *client = stake->context->client;
	struct log_fields fields = revocation_fields(rev);
	char reason[256];

	if (rev->state != REVOCATION_LOST || stake->n_awaited == 0 || rev->reported == client->id)
		return;
	rev->reported = client->id;
	context_say_doubt(stake->context, reason, sizeof(reason));
	fields.client = client->id;
	fields.pid = client->process.pid;
	fields.uid = &client->process.uid;
	fields.unit = client->process.unit;
	log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
		  "Pages of %s are still pinned by %s (pid %d) through %s while they are taken away: "
		  "what its hardware writes there is lost%s%s.",
		  revocation_path(rev), client->process.comm, client->process.pid,
		  stake->context->ops->kind, reason[0] ? "; " : "", reason);
}

static void drop_target(struct target *target)
{
	struct revocation *rev = target->stake->revocation;
	struct pin *pin = target->pin;

	pin_remove_target(pin, target);
	if (target->on_demand && pin->revocation < rev->id) {
		pin_set_told(pin, rev->id);
		observe_pin(pin, OBSERVED_RECORDED);
	}
	target_free(target);
}

/* Forgets the targets: what is still pinned stays so. Returns true if there are more. */
static bool drop_targets(struct revocation *rev, const struct slice *slice)
{
	struct target *target;

	while ((target = target_next(rev, (struct place){}))) {
		if (slice && slice_is_over(slice))
			return true;
		log_remaining(rev, target->stake);
		drop_target(target);
	}
	return false;
}

static void report_end(struct revocation *rev)
{
	struct log_fields fields = revocation_fields(rev);
	const char *outcome = enumeration_name(&enumeration_revocation_state, rev->state);
	char gone[32] = "";

	fields.outcome = outcome;
	if (rev->has_proof)
		fields.proof = enumeration_name(&enumeration_proof, rev->weakest);
	if (rev->n_remaining > 0)
		snprintf(gone, sizeof(gone), "%zu of ", rev->n_pinning - rev->n_remaining);
	log_event(rev->state == REVOCATION_LOST ? LOG_CRIT : LOG_NOTICE, MESSAGE_REVOKE_ENDED,
		  &fields, "Revocation %" PRIu64 " of %s %s after %.3f s, %s%zu pin%s gone%s%s.",
		  rev->id, revocation_path(rev), outcome,
		  (double)(rev->end_usec - rev->start_usec) / 1e6, gone, rev->n_pinning,
		  PLURAL(rev->n_pinning), fields.proof ? ", " : "", fields.proof ? fields.proof : "");
}

static void end(struct revocation *rev)
{
	struct file *file = rev->file != 0 ? broker_find_file(rev->broker, rev->file) : NULL;
	struct slice slice = slice_begin();

	rev->end_usec = now_usec();
	rev->finding = rev->announcing = rev->telling = rev->starting = rev->looking = false;
	rev->n_untold = rev->i_untold = 0;
	rev->dropping = true;
	(void)drop_targets(rev, &slice);
	if (file && file->revocation == rev) {
		file->revocation = NULL;
		file_revocation_ended(file, rev->state == REVOCATION_LOST);
	}
	report_end(rev);
	observe_revocation(rev, OBSERVED_ENDED);
	revocation_go_on(rev);
}

static int rung_signal(const struct revocation *rev)
{
	if (rev->state == REVOCATION_DETACHING)
		return 0;
	return rev->state == REVOCATION_KILLED ? SIGKILL : rev->signal;
}

/* The timer brings it on. */
static void try_again(struct revocation *rev)
{
	rev->again = true;
	set_timer(rev, now_usec() + RETRY_USEC);
}

/* The jobs of the present rung: one for each context, or one for each client that has pins left. */
static void start_jobs(struct revocation *rev)
{
	rev->n_jobs = 1; /* ours, so that none that comes back at once ends the rung */
	rev->n_reached = 0;
	rev->start_after = (struct place){};
	rev->signalled = rev->only = 0;
	rev->starting = true;
	revocation_go_on(rev);
}

static int start_job(struct revocation *rev, struct stake *stake, int sig)
{
	struct context *context = stake->context;
	int r;

	if (sig == 0) {
		if (context->detached_by == rev->id)
			return 0;
		r = context_detach(context, rev);
		if (r >= 0)
			context->detached_by = rev->id;
		return r;
	}
	if (context->client->dead || context->client->id == rev->signalled)
		return 0;
	r = revocation_signal(rev, context->client, sig);
	if (r >= 0)
		rev->signalled = context->client->id;
	return r;
}

/* What has no memory is started a little later. */
static void start_some_jobs(struct revocation *rev, const struct slice *slice)
{
	int r, sig = rung_signal(rev);
	struct stake *stake;

	while ((stake = stake_next(rev, rev->start_after)) &&
	       (rev->only == 0 || stake->client == rev->only)) {
		struct place place = { .client = stake->client, .context = stake->id };

		r = stake->n_awaited > 0 ? start_job(rev, stake, sig) : 0;
		if (r < 0) {
			try_again(rev);
			return;
		}
		rev->n_jobs += r > 0;
		rev->start_after = place;
		if (slice_is_over(slice))
			return;
	}
	rev->starting = false;
	revocation_job_done(rev->broker, rev->id, rev->state, false);
}

void revocation_repeat(struct revocation *rev, uint64_t client)
{
	/* the job that is under way for what the client was is of no account */
	if (!rev->starting)
		rev->n_jobs++; /* ours */
	rev->n_reached = 0;
	rev->signalled = 0;
	rev->only = client;
	rev->start_after = (struct place){ .client = client };
	rev->starting = true;
	revocation_go_on(rev);
}

/* Whoever is forced from the beginning has until the deadline that it was told of to let go of what cannot be
 * detached. The timer goes on then. */
static bool may_let_go(struct revocation *rev)
{
	return rev->forced && now_usec() < rev->deadline_usec && revocation_has_living(rev);
}

void revocation_job_done(struct broker *broker, uint64_t id, enum revocation_state rung,
			 bool reached)
{
	struct revocation *rev = broker_find_revocation(broker, id);

	/* What a rung that is over has started does not count any more. */
	if (!rev || rev->state != rung)
		return;
	rev->n_reached += reached;
	if (--rev->n_jobs > 0)
		return;
	if (rev->state == REVOCATION_DETACHING && !may_let_go(rev))
		revocation_event(rev, REVOKE_DETACHED);
	else if (rev->state != REVOCATION_DETACHING && rev->n_reached == 0 && !revocation_is_reaping(rev))
		revocation_search(rev);
}

static void step(struct revocation *rev, struct revocation_step step)
{
	unsigned actions = step.actions;

	rev->state = step.state;
	observe_revocation(rev, OBSERVED_CHANGED);
	rev->searching = rev->looking = false;
	if (actions & REVOKE_ARM)
		arm(rev, actions);
	if (actions & REVOKE_DISARM)
		(void)sd_event_source_set_enabled(rev->timer, SD_EVENT_OFF);
	/* These may bring on the next event before they return, and free the revocation. */
	if (actions & REVOKE_END)
		end(rev);
	else if (actions & REVOKE_SIGNAL && rev->signal == 0)
		revocation_event(rev, REVOKE_UNREACHABLE);
	else if (actions & (REVOKE_DETACH | REVOKE_SIGNAL | REVOKE_KILL))
		start_jobs(rev);
}

void revocation_event(struct revocation *rev, enum revocation_event event)
{
	struct revocation_step next = revocation_next(rev->state, event);

	if (next.actions == 0)
		return;
	step(rev, next);
}

static void add_uid(struct revocation *rev, uid_t uid)
{
	for (size_t i = 0; i < rev->n_uids; i++)
		if (rev->uids[i] == uid)
			return;
	if (rev->n_uids < REVOCATION_UIDS_MAX)
		rev->uids[rev->n_uids++] = uid;
}

/* --- Finding the pins, and telling their holders --- */

/* So many are found before their holders are told. */
#define FIND_MAX NOTICE_PINS_MAX
/* So many are looked at before the time is: a few are found together, and their holders told the right deadline,
 * also where the daemon has to wait for a CPU meanwhile. */
#define FIND_MIN 32

#define SEVERAL_FILES UINT64_MAX

static struct untold untold_of(const struct pin *pin)
{
	return (struct untold){
		.client = pin->context->client->id,
		.file = pin->use->file->id,
		.context = pin->context->id,
		.pin = pin->id,
	};
}

static void add_pin(struct revocation *rev, struct pin *pin)
{
	rev->n_pinning += !pin->on_demand;
	rev->n_remaining += !pin->on_demand;
	/* a dead one may have left its context to a process that lives */
	rev->alive |= !pin->on_demand && (client_can_answer(pin->context->client) ||
					  (pin->context->client->dead && pin->context->reaping));
	if (rev->found_file == 0)
		rev->found_file = pin->use->file->id;
	else if (rev->found_file != pin->use->file->id)
		rev->found_file = SEVERAL_FILES;
	rev->untold[rev->n_untold++] = untold_of(pin);
	add_uid(rev, pin->context->client->process.uid);
	/* Let go of before, and not yet seen to be gone: now somebody waits for it. */
	if (pin->state == PIN_LEAVING)
		context_check_soon(pin->context);
	else if (!client_is_connected(pin->context->client))
		context_look_for_holder(pin->context);
	else
		context_look_later(pin->context, LOOK_USEC);
}

static int set_path(struct revocation *rev, const struct file *file)
{
	if (!file)
		return 0;
	rev->file = file->id;
	rev->path = strdup(file->path);
	return rev->path ? 0 : -ENOMEM;
}

/* Names the file if it is only one. */
static void set_found_path(struct revocation *rev)
{
	if (!rev->path && !rev->finding && rev->found_file != SEVERAL_FILES)
		(void)set_path(rev, broker_find_file(rev->broker, rev->found_file));
}

static void find_pins(struct revocation *rev, const struct slice *slice)
{
	struct pin *pin = NULL;
	unsigned n_looks = 0;
	int r = 1;

	rev->n_untold = rev->i_untold = 0;
	if (!rev->untold && !(rev->untold = malloc(FIND_MAX * sizeof(*rev->untold)))) {
		try_again(rev);
		return;
	}
	do {
		if (selection_next(&rev->selection, &pin) == 0) {
			rev->finding = false;
			rev->announcing = true;
			break;
		}
		r = pin ? target_new(rev, pin) : 0;
		if (r > 0)
			add_pin(rev, pin);
	} while (r >= 0 && rev->n_untold < FIND_MAX && (++n_looks < FIND_MIN || !slice_is_over(slice)));
	if (r < 0) {
		selection_retry(&rev->selection, pin);
		try_again(rev);
	}
	notice_sort(rev->untold, rev->n_untold);
}

/* All have been found, and all their holders told. */
static void announce(struct revocation *rev)
{
	struct log_fields fields;

	rev->announcing = false;
	set_found_path(rev);
	fields = revocation_fields(rev);
	log_event(LOG_NOTICE, MESSAGE_REVOKE_STARTED, &fields,
		  "Revocation %" PRIu64 " of %zu pin%s of %s started (%s%s%s), %.3f s to let go.",
		  rev->id, rev->n_pinning, PLURAL(rev->n_pinning), revocation_path(rev), fields.cause,
		  rev->conflict.reason[0] ? ": " : "", rev->conflict.reason,
		  rev->state == REVOCATION_NOTIFIED
			  ? (double)(rev->deadline_usec - rev->start_usec) / 1e6
			  : 0.0);
	observe_revocation(rev, OBSERVED_STARTED);
	if (rev->n_remaining == 0)
		revocation_event(rev, REVOKE_GONE);
	else if (!rev->alive && rev->state == REVOCATION_NOTIFIED)
		revocation_event(rev, REVOKE_FORCE); /* the dead are given no time to think */
}

/* Collects those that are to be told again. */
static void find_told(struct revocation *rev)
{
	struct target *target = NULL;

	rev->n_untold = rev->i_untold = 0;
	while (rev->n_untold < FIND_MAX && (target = target_next(rev, rev->tell_after))) {
		rev->untold[rev->n_untold++] = untold_of(target->pin);
		rev->tell_after = (struct place){ target->stake->client, target->stake->id, target->id };
	}
	rev->telling = target;
	notice_sort(rev->untold, rev->n_untold);
}

static void finish(struct revocation *rev)
{
	struct broker *broker = rev->broker;

	rev->dropping = false;
	free(TAKE_PTR(rev->untold));
	broker_retire_revocation(broker, rev);
	broker_check_stopped(broker);
}

static bool has_work(const struct revocation *rev)
{
	return !rev->again && (rev->i_untold < rev->n_untold || rev->finding || rev->announcing ||
					 rev->telling || rev->starting || rev->looking ||
					 rev->dropping);
}

/* Does one slice of what there is to do. */
static void work(struct revocation *rev)
{
	struct slice slice = slice_begin();

	if (rev->again) {
		rev->again = false;
		set_timer(rev, rev->deadline_usec);
	}
	do {
		if (rev->i_untold < rev->n_untold)
			notice_send(rev, rev->untold, rev->n_untold, &rev->i_untold, &slice);
		else if (rev->finding)
			find_pins(rev, &slice);
		else if (rev->announcing)
			announce(rev);
		else if (rev->telling)
			find_told(rev);
		else if (rev->starting)
			start_some_jobs(rev, &slice);
		else if (rev->looking)
			revocation_look(rev, &slice);
		else if (rev->dropping && !drop_targets(rev, &slice))
			finish(rev);
	} while (has_work(rev) && !slice_is_over(&slice));
}

void revocation_go_on(struct revocation *rev)
{
	bool more;

	if (rev->working)
		return; /* its caller goes on */
	rev->working = true;
	work(rev);
	rev->working = false;
	more = has_work(rev);
	(void)sd_event_source_set_enabled(rev->work, more ? SD_EVENT_ON : SD_EVENT_OFF);
}

static int on_work(sd_event_source *source, uint64_t usec, void *userdata)
{
	revocation_go_on(userdata);
	return 0;
}

static int make_sources(struct revocation *rev)
{
	sd_event *event = rev->broker->event;
	int r;

	r = sd_event_add_time(event, &rev->timer, CLOCK_MONOTONIC, 0, 1, on_timer, rev);
	if (r >= 0)
		r = sd_event_source_set_enabled(rev->timer, SD_EVENT_OFF);
	return r < 0 ? r : turn_add_source(event, &rev->work, on_work, rev);
}

/* The first pins are found before the first step, which depends on them. */
static void begin(struct revocation *rev, uint64_t grace_usec, uint64_t broken_usec, bool forced)
{
	struct slice slice = slice_begin();
	bool some;

	rev->working = rev->finding = true;
	find_pins(rev, &slice);
	set_found_path(rev);
	some = rev->finding || rev->n_pinning > 0;
	plan(rev, some ? grace_usec : 0, broken_usec);
	step(rev, revocation_begin(some && (forced || (!rev->finding && !rev->alive))));
	if (rev->again)
		try_again(rev); /* the step has set the timer to something else */
	rev->working = false;
	if (!rev->again)
		revocation_go_on(rev);
}

int revocation_start(struct broker *broker, struct file *file, bool by_break,
		     const struct conflict *conflict, struct selection *selection,
		     uint64_t grace_usec, bool forced, uint64_t *ret_id)
{
	struct revocation *rev;
	int r;

	rev = calloc(1, sizeof(*rev));
	if (!rev) {
		selection_clear(selection);
		return -ENOMEM;
	}
	rev->broker = broker;
	rev->conflict = *conflict;
	rev->by_break = by_break;
	rev->forced = forced;
	rev->start_usec = now_usec();
	rev->selection = *selection;
	*selection = (struct selection){};
	RB_INIT(&rev->stakes);
	if (!file && rev->selection.file != 0)
		file = broker_find_file(broker, rev->selection.file);
	r = set_path(rev, file);
	if (r >= 0)
		r = make_sources(rev);
	if (r < 0) {
		sd_event_source_disable_unref(rev->timer);
		sd_event_source_disable_unref(rev->work);
		selection_clear(&rev->selection);
		free(rev->path);
		free(rev);
		return r;
	}
	rev->id = broker_next_id(broker);
	broker_add_revocation(broker, rev);
	if (file && by_break)
		file->revocation = rev;
	if (ret_id)
		*ret_id = rev->id;
	begin(rev, grace_usec, by_break ? file->lease.broken_usec : rev->start_usec, forced);
	return 0;
}

struct revocation *revocation_free(struct revocation *rev)
{
	if (!rev)
		return NULL;
	(void)drop_targets(rev, NULL);
	broker_remove_revocation(rev->broker, rev);
	sd_event_source_disable_unref(rev->timer);
	sd_event_source_disable_unref(rev->work);
	selection_clear(&rev->selection);
	free(rev->untold);
	free(rev->path);
	free(rev);
	return NULL;
}

void revocation_target_gone(struct target *target, enum proof proof)
{
	struct revocation *rev = target->stake->revocation;
	bool on_demand = target->on_demand;

	target_free(target);
	if (on_demand || !revocation_is_running(rev))
		return;
	rev->n_remaining--;
	if (!rev->has_proof || proof > rev->weakest)
		rev->weakest = proof;
	rev->has_proof = true;
	observe_revocation(rev, OBSERVED_CHANGED);
	if (rev->n_remaining == 0 && !rev->finding && !rev->announcing)
		revocation_event(rev, REVOKE_GONE);
}

int revocation_extend(struct revocation *rev, const struct client *client, uint64_t by_usec,
		      uint64_t *ret_deadline_usec, struct refusal *ret_refusal)
{
	uint64_t deadline;
	bool takes_part = false;
	struct stake *stake;

	for (stake = stake_next(rev, (struct place){ .client = client->id });
	     stake && stake->client == client->id && !takes_part; stake = stake_after(stake))
		takes_part = stake->n_awaited > 0;
	if (!takes_part)
		return refuse_no_such(ret_refusal, "revocation", rev->id);
	if (rev->state != REVOCATION_NOTIFIED)
		return refuse(ret_refusal, REFUSAL_BUSY, "forced",
			      "The time to let go is over, the pins are being detached by force.");
	if (__builtin_add_overflow(rev->deadline_usec, by_usec, &deadline) ||
	    deadline > rev->latest_usec)
		deadline = rev->latest_usec;
	if (deadline > rev->deadline_usec) {
		rev->deadline_usec = deadline;
		revocation_event(rev, REVOKE_EXTENDED);
	}
	*ret_deadline_usec = rev->deadline_usec;
	return 0;
}

void revocation_info(const struct revocation *rev, struct msg_revocation_info *ret)
{
	*ret = (struct msg_revocation_info){
		.revocation = (int64_t)rev->id,
		.file = rev->file != 0 ? (int64_t)rev->file : INT_NULL,
		.path = rev->path,
		.state = rev->state,
		.startUSec = (int64_t)rev->start_usec,
		.deadlineUSec = (int64_t)rev->deadline_usec,
		.endUSec = revocation_is_running(rev) ? INT_NULL : (int64_t)rev->end_usec,
		.pins = (int64_t)rev->n_pinning,
		.remaining = (int64_t)rev->n_remaining,
		.clients = (int64_t)rev->n_clients,
		.proof = rev->has_proof ? (int)rev->weakest : ENUM_NULL,
	};
	conflict_message(&rev->conflict, &ret->conflict);
}
