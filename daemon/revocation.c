/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "revocation.h"

#include <assert.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "broker.h"
#include "bus.h"
#include "log.h"
#include "macro.h"
#include "notice.h"
#include "state.h"

/* How long forced detaches, and dying, may take. */
#define DETACH_USEC (2 * USEC_PER_SEC)
#define KILL_USEC   (2 * USEC_PER_SEC)
#define RETRY_USEC  (10 * USEC_PER_MSEC)

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

/* The whole ladder has to fit before the kernel takes the lease. */
static void plan(struct revocation *rev, uint64_t grace_usec, uint64_t broken_usec)
{
	const struct config *config = rev->broker->config;
	uint64_t later, total, budget = lease_break_usec();

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
	budget -= budget / MARGIN_PART < MARGIN_USEC ? budget / MARGIN_PART : MARGIN_USEC;
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
	if (lease_break_usec() == USEC_INFINITY)
		budget = rev->by_break && total > BUDGET_USEC ? total : BUDGET_USEC;
	if (__builtin_add_overflow(rev->start_usec, grace_usec, &rev->deadline_usec))
		rev->deadline_usec = UINT64_MAX / 2;
	rev->latest_usec = rev->by_break ? rev->start_usec + budget - later
					 : rev->deadline_usec + budget;
}

static void start_jobs(struct revocation *rev);

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct revocation *rev = userdata;

	if (rev->again && now_usec() < rev->deadline_usec)
		start_jobs(rev);
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
	rev->deadline_usec = usec;
	set_timer(rev, usec);
}

/* Forgets the targets: what is still pinned stays so. */
static void drop_targets(struct revocation *rev)
{
	for (size_t i = 0; i < rev->n_targets; i++) {
		struct target *target = &rev->targets[i];

		if (!target->pin)
			continue;
		LIST_REMOVE(target, of_pin);
		if (target->on_demand) {
			target->pin->revocation = rev->id;
			state_pin(target->pin);
		}
	}
	free(rev->targets);
	rev->targets = NULL;
}

static void log_remaining(struct revocation *rev)
{
	const struct client *last = NULL;

	for (size_t i = 0; i < rev->n_targets; i++) {
		struct pin *pin = revocation_awaited_pin(&rev->targets[i]);
		struct log_fields fields = revocation_fields(rev);
		struct client *client;

		if (!pin || pin->context->client == last)
			continue;
		last = client = pin->context->client;
		fields.client = client->id;
		fields.pid = client->process.pid;
		fields.uid = &client->process.uid;
		fields.unit = client->process.unit;
		log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
			  "Pages of %s are still pinned by %s (pid %d) through %s while they are taken "
			  "away: what its hardware writes there is lost.",
			  revocation_path(rev), client->process.comm, client->process.pid,
			  pin->context->ops->kind);
	}
}

static void report_end(struct revocation *rev)
{
	struct log_fields fields = revocation_fields(rev);
	const char *outcome = enumeration_name(&enumeration_revocation_state, rev->state);

	fields.outcome = outcome;
	if (rev->has_proof)
		fields.proof = enumeration_name(&enumeration_proof, rev->weakest);
	log_event(rev->state == REVOCATION_LOST ? LOG_CRIT : LOG_NOTICE, MESSAGE_REVOKE_ENDED,
		  &fields, "Revocation %" PRIu64 " of %s %s after %.3f s, %zu of %zu pin%s gone%s%s.",
		  rev->id, revocation_path(rev), outcome,
		  (double)(rev->end_usec - rev->start_usec) / 1e6, rev->n_pinning - rev->n_remaining,
		  rev->n_pinning, PLURAL(rev->n_pinning), fields.proof ? ", " : "", fields.proof ? fields.proof : "");
}

static void end(struct revocation *rev)
{
	struct broker *broker = rev->broker;
	struct file *file = rev->file != 0 ? broker_find_file(broker, rev->file) : NULL;
	bool lost = rev->state == REVOCATION_LOST;

	rev->end_usec = now_usec();
	drop_targets(rev);
	if (file && file->revocation == rev) {
		file->revocation = NULL;
		file_revocation_ended(file, lost);
	}
	report_end(rev);
	bus_revocation_ended(broker->bus, rev);
	broker_retire_revocation(broker, rev);
	broker_check_stopped(broker);
}

static int rung_signal(const struct revocation *rev)
{
	if (rev->state == REVOCATION_DETACHING)
		return 0;
	return rev->state == REVOCATION_KILLED ? SIGKILL : rev->signal;
}

/* The jobs of the present rung: one for each context, or one for each client that has pins left. Without
 * memory for one of them it is done again a little later, until its time is up. */
static void start_jobs(struct revocation *rev)
{
	const struct client *last = NULL;
	bool again = rev->again;
	int sig = rung_signal(rev);

	if (!again) {
		rev->n_jobs = 1; /* ours, so that none that comes back at once ends the rung */
		rev->n_reached = 0;
	}
	rev->again = false;
	for (size_t i = 0; i < rev->n_targets; i++) {
		struct target *target = &rev->targets[i];
		struct context *context;
		int r = 0;

		if (!revocation_awaited_pin(target))
			continue;
		context = target->pin->context;
		if (sig == 0 && context->detached_by != rev->id) {
			r = context_detach(context, rev);
			if (r >= 0)
				context->detached_by = rev->id;
		} else if (sig != 0 && context->client != last && !context->client->dead) {
			last = context->client;
			if (target->asked != rev->state)
				r = revocation_signal(rev, context->client, sig);
			if (r >= 0)
				target->asked = rev->state;
		}
		rev->n_jobs += r > 0;
		rev->again |= r < 0;
	}
	if (rev->again || again)
		set_timer(rev, rev->again ? now_usec() + RETRY_USEC : rev->deadline_usec);
	if (!rev->again)
		revocation_job_done(rev->broker, rev->id, rev->state, false);
}

void revocation_repeat(struct revocation *rev)
{
	rev->n_jobs += !rev->again; /* ours */
	rev->n_reached = 0;
	rev->again = true;
	set_timer(rev, now_usec());
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
	if (rev->state == REVOCATION_DETACHING)
		revocation_event(rev, REVOKE_DETACHED);
	else if (rev->n_reached == 0 && !revocation_is_reaping(rev))
		revocation_search(rev);
}

static void announce(struct revocation *rev)
{
	struct log_fields fields = revocation_fields(rev);

	notice_send(rev);
	log_event(LOG_NOTICE, MESSAGE_REVOKE_STARTED, &fields,
		  "Revocation %" PRIu64 " of %zu pin%s of %s started (%s%s%s), %.3f s to let go.",
		  rev->id, rev->n_pinning, PLURAL(rev->n_pinning), revocation_path(rev), fields.cause,
		  rev->conflict.reason[0] ? ": " : "", rev->conflict.reason,
		  rev->state == REVOCATION_NOTIFIED
			  ? (double)(rev->deadline_usec - rev->start_usec) / 1e6
			  : 0.0);
	bus_revocation_started(rev->broker->bus, rev);
}

static void step(struct revocation *rev, struct revocation_step step)
{
	unsigned actions = step.actions;

	rev->state = step.state;
	bus_changed(rev->broker->bus, &rev->view);
	rev->again = rev->searching = false;
	if (actions & REVOKE_ARM)
		arm(rev, actions);
	if (actions & REVOKE_DISARM)
		(void)sd_event_source_set_enabled(rev->timer, SD_EVENT_OFF);
	if (actions & REVOKE_NOTIFY)
		announce(rev);
	if (actions & REVOKE_REPORT)
		log_remaining(rev);
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

static int compare_target(const void *a, const void *b)
{
	const struct target *ta = a, *tb = b;
	const uint64_t ka[] = { ta->pin->context->client->id, ta->pin->use->file->id,
				ta->pin->context->id, ta->pin->id },
		       kb[] = { tb->pin->context->client->id, tb->pin->use->file->id,
				tb->pin->context->id, tb->pin->id };

	for (size_t i = 0; i < ELEMENTS(ka); i++)
		if (ka[i] != kb[i])
			return ka[i] < kb[i] ? -1 : 1;
	return 0;
}

static int set_targets(struct revocation *rev, struct pin **pins, size_t n_pins)
{
	rev->targets = calloc(n_pins + 1, sizeof(struct target));
	if (!rev->targets)
		return -ENOMEM;
	for (size_t i = 0; i < n_pins; i++)
		rev->targets[i] = (struct target){
			.revocation = rev,
			.pin = pins[i],
			.on_demand = pins[i]->on_demand,
		};
	qsort(rev->targets, n_pins, sizeof(struct target), compare_target);
	for (size_t i = 0; i < n_pins; i++) {
		/* named twice: once is enough */
		if (rev->n_targets > 0 && rev->targets[rev->n_targets - 1].pin == rev->targets[i].pin)
			continue;
		rev->n_clients += rev->n_targets == 0 ||
				  rev->targets[rev->n_targets - 1].pin->context->client !=
					  rev->targets[i].pin->context->client;
		rev->targets[rev->n_targets++] = rev->targets[i];
		rev->n_pinning += !rev->targets[i].on_demand;
	}
	rev->n_remaining = rev->n_pinning;
	return 0;
}

static void add_uid(struct revocation *rev, uid_t uid)
{
	for (size_t i = 0; i < rev->n_uids; i++)
		if (rev->uids[i] == uid)
			return;
	if (rev->n_uids < REVOCATION_UIDS_MAX)
		rev->uids[rev->n_uids++] = uid;
}

static int set_path(struct revocation *rev, struct file *file)
{
	for (size_t i = 0; !file && i < rev->n_targets; i++)
		if (rev->targets[i].pin->use->file != rev->targets[0].pin->use->file)
			return 0;
	if (!file && rev->n_targets > 0)
		file = rev->targets[0].pin->use->file;
	if (!file)
		return 0;
	rev->file = file->id;
	rev->path = strdup(file->path);
	return rev->path ? 0 : -ENOMEM;
}

int revocation_start(struct broker *broker, struct file *file, bool by_break,
		     const struct conflict *conflict, struct pin **pins, size_t n_pins,
		     uint64_t grace_usec, bool forced, uint64_t *ret_id)
{
	struct revocation *rev;
	bool alive = false;
	int r;

	rev = calloc(1, sizeof(*rev));
	if (!rev)
		return -ENOMEM;
	rev->broker = broker;
	rev->conflict = *conflict;
	rev->by_break = by_break;
	rev->start_usec = now_usec();
	r = set_targets(rev, pins, n_pins);
	if (r >= 0)
		r = set_path(rev, file);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &rev->timer, CLOCK_MONOTONIC, 0, 1, on_timer,
				      rev);
	if (r < 0) {
		free(rev->targets);
		free(rev->path);
		free(rev);
		return r;
	}
	(void)sd_event_source_set_enabled(rev->timer, SD_EVENT_OFF);
	rev->id = broker_next_id(broker);
	broker_add_revocation(broker, rev);
	for (size_t i = 0; i < rev->n_targets; i++) {
		struct pin *pin = rev->targets[i].pin;

		LIST_INSERT_HEAD(&pin->targets, &rev->targets[i], of_pin);
		/* a dead one may have left its context to a process that lives */
		alive |= !pin->on_demand && (client_can_answer(pin->context->client) ||
					     (pin->context->client->dead && pin->context->reaping));
		/* Let go of before, and not yet seen to be gone: now somebody waits for it. */
		if (pin->state == PIN_LEAVING)
			context_check(pin->context);
		add_uid(rev, pin->context->client->process.uid);
	}
	if (file && by_break)
		file->revocation = rev;
	if (ret_id)
		*ret_id = rev->id;

	plan(rev, rev->n_pinning > 0 ? grace_usec : 0,
	     by_break ? file->lease.broken_usec : rev->start_usec);
	/* The dead are given no time to think. */
	if (rev->n_pinning > 0) {
		step(rev, revocation_begin(forced || !alive));
	} else {
		step(rev, revocation_begin(false));
		revocation_event(rev, REVOKE_GONE);
	}
	return 0;
}

struct revocation *revocation_free(struct revocation *rev)
{
	if (!rev)
		return NULL;
	if (rev->targets)
		drop_targets(rev);
	broker_remove_revocation(rev->broker, rev);
	sd_event_source_disable_unref(rev->timer);
	free(rev->path);
	free(rev);
	return NULL;
}

void revocation_target_gone(struct target *target, enum proof proof)
{
	struct revocation *rev = target->revocation;

	target->pin = NULL;
	if (target->on_demand)
		return;
	rev->n_remaining--;
	if (!rev->has_proof || proof > rev->weakest)
		rev->weakest = proof;
	rev->has_proof = true;
	bus_changed(rev->broker->bus, &rev->view);
	if (rev->n_remaining == 0)
		revocation_event(rev, REVOKE_GONE);
}

int revocation_extend(struct revocation *rev, const struct client *client, uint64_t by_usec,
		      uint64_t *ret_deadline_usec, struct refusal *ret_refusal)
{
	uint64_t deadline;
	bool takes_part = false;

	for (size_t i = 0; i < rev->n_targets && !takes_part && rev->targets; i++) {
		const struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		takes_part = pin && pin->context->client == client;
	}
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
