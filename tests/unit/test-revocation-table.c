/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <string.h>

#include "daemon/core/revocation-table.h"
#include "protocol/macro.h"

/*
 * Every sequence of 1 to LENGTH events, from both beginnings, against what must be true of any
 * revocation (I2, I3). The table is never compared with itself; that the properties would notice is
 * shown by every table that is wrong in one place.
 */

#define LENGTH       7
#define LENGTH_WRONG 5 /* four rungs, and one event after the end */
#define N_ACTIONS    12
#define N_STATES     (REVOCATION_LOST + 1)

typedef struct revocation_step (*begin_function)(bool forced);
typedef struct revocation_step (*next_function)(enum revocation_state state,
						enum revocation_event event);

/* One step, and what has been seen up to and with it. */
struct moment {
	bool first, forced;
	enum revocation_event event; /* not of the first */
	enum revocation_state before, after;
	unsigned actions;

	unsigned n[N_ACTIONS]; /* how often each action was asked for */
	bool armed;            /* a timer runs */
	unsigned n_timeouts;
};

static unsigned count(const struct moment *m, enum revocation_action action)
{
	return m->n[__builtin_ctz(action)];
}

static bool was_running(const struct moment *m)
{
	return !m->first && !revocation_state_is_end(m->before);
}

static bool is_on(const struct moment *m, enum revocation_state rung, enum revocation_event event)
{
	return !m->first && m->before == rung && m->event == event;
}

/* --- the properties: each is true of every moment --- */

/* The holders are told exactly once, at the beginning. */
static bool one_notice(const struct moment *m)
{
	return count(m, REVOKE_NOTIFY) == 1 && !(m->actions & REVOKE_NOTIFY) == !m->first;
}

/* Without force it begins with grace, with force at the detaching, and never at an end. */
static bool beginning(const struct moment *m)
{
	return !m->first || m->after == (m->forced ? REVOCATION_DETACHING : REVOCATION_NOTIFIED);
}

/* Everybody is told of the end exactly once, when it comes. */
static bool one_end(const struct moment *m)
{
	return count(m, REVOKE_END) == (revocation_state_is_end(m->after) ? 1 : 0);
}

/* After the end nothing happens any more. */
static bool nothing_after_end(const struct moment *m)
{
	return m->first || was_running(m) || (m->after == m->before && m->actions == 0);
}

/* A timer runs exactly while the revocation does: nobody waits without bound. */
static bool timer_while_running(const struct moment *m)
{
	return m->armed == !revocation_state_is_end(m->after);
}

/* Every step to a new rung arms that rung's own timer and no other; a step that stays on its rung arms
 * none, but where more grace was given. */
static bool own_timer(const struct moment *m)
{
	static const unsigned own[N_STATES] = {
		[REVOCATION_NOTIFIED] = REVOKE_ARM_GRACE,
		[REVOCATION_DETACHING] = REVOKE_ARM_DETACH,
		[REVOCATION_SIGNALLED] = REVOKE_ARM_SIGNAL,
		[REVOCATION_KILLED] = REVOKE_ARM_KILL,
	};
	bool due = m->first || m->after != m->before ||
		   is_on(m, REVOCATION_NOTIFIED, REVOKE_EXTENDED);

	return (m->actions & REVOKE_ARM) == (due ? own[m->after] : 0);
}

/* The timer is taken away exactly by the step to an end. */
static bool disarm_at_end(const struct moment *m)
{
	return !(m->actions & REVOKE_DISARM) ==
	       !(revocation_state_is_end(m->after) && (m->first || was_running(m)));
}

/* The lease is let go exactly by the step to an end. */
static bool release_at_end(const struct moment *m)
{
	return count(m, REVOKE_RELEASE) == (revocation_state_is_end(m->after) ? 1 : 0);
}

/* It is let go only when every pin has ended with proof, or with the last rung's time over. */
static bool release_with_proof_or_exhausted(const struct moment *m)
{
	if (!(m->actions & REVOKE_RELEASE))
		return true;
	if (m->first)
		return false;
	if (m->event == REVOKE_GONE)
		return m->after == REVOCATION_RELEASED;
	return m->after == REVOCATION_LOST && m->before == REVOCATION_KILLED && m->event == REVOKE_TIMEOUT;
}

/* Nothing is given up before detaching, the signal and SIGKILL have all been tried. */
static bool lost_after_everything(const struct moment *m)
{
	return m->after != REVOCATION_LOST ||
	       (count(m, REVOKE_DETACH) && count(m, REVOKE_SIGNAL) && count(m, REVOKE_KILL));
}

/* It is reported that pins are alive exactly where they are: at the loss. */
static bool report_iff_lost(const struct moment *m)
{
	return count(m, REVOKE_REPORT) == (m->after == REVOCATION_LOST ? 1 : 0);
}

/* The rungs only ever go up. */
static bool only_up(const struct moment *m)
{
	return m->first || m->after >= m->before;
}

/* Detaching comes before the signal, the signal before SIGKILL, each at most once. */
static bool in_order(const struct moment *m)
{
	unsigned force = m->actions & (REVOKE_DETACH | REVOKE_SIGNAL | REVOKE_KILL);

	return count(m, REVOKE_DETACH) <= 1 && count(m, REVOKE_SIGNAL) <= count(m, REVOKE_DETACH) &&
	       count(m, REVOKE_KILL) <= count(m, REVOKE_SIGNAL) && (force & (force - 1)) == 0;
}

/* Each rung does its own work as it is entered, and no other does. */
static bool own_work(const struct moment *m)
{
	bool entered = m->first || m->after != m->before;

	return !(m->actions & REVOKE_DETACH) == !(entered && m->after == REVOCATION_DETACHING) &&
	       !(m->actions & REVOKE_SIGNAL) == !(entered && m->after == REVOCATION_SIGNALLED) &&
	       !(m->actions & REVOKE_KILL) == !(entered && m->after == REVOCATION_KILLED);
}

/* More time given matters during grace only, and there it moves the deadline and nothing else. */
static bool extended_in_grace(const struct moment *m)
{
	if (m->first || m->event != REVOKE_EXTENDED)
		return true;
	return m->after == m->before &&
	       m->actions == (m->before == REVOCATION_NOTIFIED ? (unsigned)REVOKE_ARM_GRACE : 0);
}

/* When every pin has ended with proof, it is over at once, on whichever rung. */
static bool gone_ends(const struct moment *m)
{
	return !was_running(m) || m->event != REVOKE_GONE || m->after == REVOCATION_RELEASED;
}

/* Timeouts alone end it, and four of them do whatever else happens between. */
static bool four_timeouts(const struct moment *m)
{
	return m->n_timeouts < 4 || revocation_state_is_end(m->after);
}

/* A rung that can bring nothing any more is not waited out: the next one comes at once. But where there is
 * none, pins that nobody can be made to let go of may yet be let go of. */
static bool not_in_vain(const struct moment *m)
{
	if (is_on(m, REVOCATION_NOTIFIED, REVOKE_FORCE) ||
	    is_on(m, REVOCATION_DETACHING, REVOKE_DETACHED) ||
	    is_on(m, REVOCATION_SIGNALLED, REVOKE_UNREACHABLE))
		return m->after == m->before + 1;
	return !is_on(m, REVOCATION_KILLED, REVOKE_UNREACHABLE) || (m->after == m->before && m->actions == 0);
}

/* What is no news on a rung changes nothing: force once it has begun, the end of a detaching that has
 * been left behind, nobody to signal while nobody is being signalled. */
static bool no_news(const struct moment *m)
{
	if (m->first ||
	    !((m->event == REVOKE_FORCE && m->before != REVOCATION_NOTIFIED) ||
	      (m->event == REVOKE_DETACHED && m->before != REVOCATION_DETACHING) ||
	      (m->event == REVOKE_UNREACHABLE && m->before < REVOCATION_SIGNALLED)))
		return true;
	return m->after == m->before && m->actions == 0;
}

#define PROPERTY(name)                                                                             \
	{                                                                                          \
		#name, name                                                                        \
	}

static const struct {
	const char *name;
	bool (*holds)(const struct moment *m);
} properties[] = {
	PROPERTY(one_notice),
	PROPERTY(beginning),
	PROPERTY(one_end),
	PROPERTY(nothing_after_end),
	PROPERTY(timer_while_running),
	PROPERTY(own_timer),
	PROPERTY(disarm_at_end),
	PROPERTY(release_at_end),
	PROPERTY(release_with_proof_or_exhausted),
	PROPERTY(lost_after_everything),
	PROPERTY(report_iff_lost),
	PROPERTY(only_up),
	PROPERTY(in_order),
	PROPERTY(own_work),
	PROPERTY(extended_in_grace),
	PROPERTY(gone_ends),
	PROPERTY(four_timeouts),
	PROPERTY(not_in_vain),
	PROPERTY(no_news),
};

/* --- all sequences --- */

static uint64_t n_sequences;

/* The properties that do not hold at this moment, a bit each. */
static unsigned see(struct moment *m, struct revocation_step step)
{
	unsigned broken = 0;

	m->after = step.state;
	m->actions = step.actions;
	for (unsigned i = 0; i < N_ACTIONS; i++)
		m->n[i] += step.actions >> i & 1;
	if (!m->first && m->event == REVOKE_TIMEOUT)
		m->armed = false; /* it has fired */
	if (step.actions & REVOKE_ARM)
		m->armed = true;
	if (step.actions & REVOKE_DISARM)
		m->armed = false;
	for (size_t i = 0; i < ELEMENTS(properties); i++)
		if (!properties[i].holds(m))
			broken |= 1U << i;
	return broken;
}

static unsigned explore(const struct moment *m, next_function next, unsigned depth)
{
	for (unsigned event = 0; depth > 0 && event < REVOCATION_EVENT_COUNT; event++) {
		struct moment then = *m;
		unsigned broken;

		n_sequences++;
		then.first = false;
		then.before = m->after;
		then.event = (enum revocation_event)event;
		then.n_timeouts += event == REVOKE_TIMEOUT;
		broken = see(&then, next(m->after, then.event));
		if (broken == 0)
			broken = explore(&then, next, depth - 1);
		if (broken != 0)
			return broken;
	}
	return 0;
}

/* The properties that the first sequence that is wrong breaks; 0: none is wrong. */
static unsigned explore_all(begin_function begin, next_function next, unsigned depth)
{
	for (int forced = 0; forced < 2; forced++) {
		struct moment m = { .first = true, .forced = forced };
		unsigned broken = see(&m, begin(forced));

		if (broken == 0)
			broken = explore(&m, next, depth);
		if (broken != 0)
			return broken;
	}
	return 0;
}

static void test_every_sequence(void **state)
{
	uint64_t expected = 0, of_length = 2;
	unsigned broken;

	for (unsigned length = 1; length <= LENGTH; length++) {
		of_length *= REVOCATION_EVENT_COUNT;
		expected += of_length;
	}
	n_sequences = 0;
	broken = explore_all(revocation_begin, revocation_next, LENGTH);
	for (size_t i = 0; i < ELEMENTS(properties); i++)
		if (broken >> i & 1)
			print_error("not true: %s\n", properties[i].name);
	assert_int_equal(broken, 0);
	assert_int_equal(n_sequences, expected);
}

/* --- tables that are wrong in one place: each must be found out --- */

static struct {
	bool begin, forced; /* wrong at the beginning, or at (state, event) */
	enum revocation_state state;
	enum revocation_event event;
	struct revocation_step step;
} wrong;

static unsigned n_wrong, n_caught[ELEMENTS(properties)];

static struct revocation_step wrong_begin(bool forced)
{
	return wrong.begin && forced == wrong.forced ? wrong.step : revocation_begin(forced);
}

static struct revocation_step wrong_next(enum revocation_state state, enum revocation_event event)
{
	return !wrong.begin && state == wrong.state && event == wrong.event
		       ? wrong.step
		       : revocation_next(state, event);
}

static void expect_caught(void)
{
	unsigned broken = explore_all(wrong_begin, wrong_next, LENGTH_WRONG);

	if (broken == 0)
		fail_msg("unnoticed: %s %d, event %d: state %d, actions %#x",
			 wrong.begin ? "begin" : "state", wrong.begin ? wrong.forced : wrong.state,
			 wrong.event, wrong.step.state, wrong.step.actions);
	n_wrong++;
	for (size_t i = 0; i < ELEMENTS(properties); i++)
		n_caught[i] += broken >> i & 1;
}

/* Each action of it left out or added, each other state in place of its own, and nothing at all. */
static void mutate(struct revocation_step right)
{
	for (unsigned i = 0; i < N_ACTIONS; i++) {
		wrong.step = right;
		wrong.step.actions ^= 1U << i;
		expect_caught();
	}
	for (unsigned to = 0; to < N_STATES; to++) {
		wrong.step = right;
		wrong.step.state = (enum revocation_state)to;
		if (to != right.state)
			expect_caught();
	}
	wrong.step = (struct revocation_step){ wrong.state, 0 };
	if (right.actions != 0)
		expect_caught();
}

static void test_wrong_tables(void **state)
{
	/* a whole right step, but that of another event */
	static const struct {
		enum revocation_state state;
		enum revocation_event event, like;
	} confused[] = {
		{ REVOCATION_NOTIFIED, REVOKE_TIMEOUT, REVOKE_GONE },
		{ REVOCATION_NOTIFIED, REVOKE_EXTENDED, REVOKE_TIMEOUT },
		{ REVOCATION_NOTIFIED, REVOKE_DETACHED, REVOKE_GONE },
		{ REVOCATION_DETACHING, REVOKE_DETACHED, REVOKE_GONE },
		{ REVOCATION_DETACHING, REVOKE_UNREACHABLE, REVOKE_TIMEOUT },
		{ REVOCATION_DETACHING, REVOKE_FORCE, REVOKE_TIMEOUT },
		{ REVOCATION_SIGNALLED, REVOKE_DETACHED, REVOKE_TIMEOUT },
		{ REVOCATION_SIGNALLED, REVOKE_TIMEOUT, REVOKE_GONE },
		{ REVOCATION_KILLED, REVOKE_TIMEOUT, REVOKE_GONE },
		{ REVOCATION_KILLED, REVOKE_GONE, REVOKE_TIMEOUT },
		{ REVOCATION_KILLED, REVOKE_FORCE, REVOKE_TIMEOUT },
	};

	memset(&wrong, 0, sizeof(wrong));
	for (unsigned s = 0; s < N_STATES; s++)
		for (unsigned e = 0; e < REVOCATION_EVENT_COUNT; e++) {
			wrong.state = (enum revocation_state)s;
			wrong.event = (enum revocation_event)e;
			mutate(revocation_next(wrong.state, wrong.event));
		}
	for (size_t i = 0; i < ELEMENTS(confused); i++) {
		wrong.state = confused[i].state;
		wrong.event = confused[i].event;
		wrong.step = revocation_next(wrong.state, confused[i].like);
		expect_caught();
	}
	wrong.begin = true;
	for (int forced = 0; forced < 2; forced++) {
		wrong.forced = forced;
		wrong.state = REVOCATION_RELEASED; /* for the step that does nothing */
		mutate(revocation_begin(forced));
		wrong.step = revocation_begin(!forced);
		expect_caught();
	}
	/* 36 steps and 2 beginnings with 12 actions and 5 other states each, and some more */
	assert_true(n_wrong >= 38 * 17);
	/* no property is there in vain */
	for (size_t i = 0; i < ELEMENTS(properties); i++)
		if (n_caught[i] == 0)
			fail_msg("%s caught nothing", properties[i].name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_sequence),
		cmocka_unit_test(test_wrong_tables),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
