/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>

#include "daemon/revocation-table.h"

/*
 * Every sequence of up to LENGTH events, from both beginnings, against what must be true of any of them
 * (I2, I3). The table is never compared with itself.
 */

#define LENGTH 8

struct history {
	enum revocation_state state;
	bool armed; /* a timer runs */
	unsigned notified, ended, released, reported, detached, signalled, killed;
	bool gone; /* the last event was that every pin had ended with proof */
	unsigned n_timeouts;
};

typedef struct revocation_step (*next_function)(enum revocation_state state,
						enum revocation_event event);

#define CHECK(property)                                                                            \
	do {                                                                                       \
		if (!(property))                                                                   \
			return #property;                                                          \
	} while (0)

/* Takes one step; returns the property that it breaks, or NULL. */
static const char *take(struct history *h, struct revocation_step step)
{
	const unsigned a = step.actions;
	bool was_end = h->notified > 0 && revocation_state_is_end(h->state);
	bool is_end = revocation_state_is_end(step.state);
	bool first = h->notified == 0;

	/* an end is an end */
	CHECK(!was_end || (a == 0 && step.state == h->state));
	/* the ladder only goes up, and each rung is entered with its own work and its own timer */
	CHECK(first || step.state >= h->state);
	CHECK(!(a & REVOKE_DETACH) == !(step.state == REVOCATION_DETACHING &&
					(first || h->state != REVOCATION_DETACHING)));
	CHECK(!(a & REVOKE_SIGNAL) ==
	      !(step.state == REVOCATION_SIGNALLED && h->state != REVOCATION_SIGNALLED));
	CHECK(!(a & REVOKE_KILL) ==
	      !(step.state == REVOCATION_KILLED && h->state != REVOCATION_KILLED));
	CHECK(!(a & REVOKE_DETACH) == !(a & REVOKE_ARM_DETACH));
	CHECK(!(a & REVOKE_SIGNAL) == !(a & REVOKE_ARM_SIGNAL));
	CHECK(!(a & REVOKE_KILL) == !(a & REVOKE_ARM_KILL));
	CHECK(!(a & REVOKE_ARM_GRACE) || step.state == REVOCATION_NOTIFIED);

	h->notified += !!(a & REVOKE_NOTIFY);
	h->ended += !!(a & REVOKE_END);
	h->released += !!(a & REVOKE_RELEASE);
	h->reported += !!(a & REVOKE_REPORT);
	h->detached += !!(a & REVOKE_DETACH);
	h->signalled += !!(a & REVOKE_SIGNAL);
	h->killed += !!(a & REVOKE_KILL);
	if (a & REVOKE_ARM)
		h->armed = true;
	if (a & REVOKE_DISARM)
		h->armed = false;

	/* the holders are told once, first of all; everybody is told of the end once */
	CHECK(h->notified == 1);
	CHECK(h->ended == (is_end ? 1 : 0));
	/* a timer runs exactly while the revocation does: nobody waits without bound */
	CHECK(h->armed == !is_end);
	/* the lease goes at the end, and not before */
	CHECK(h->released == h->ended);
	/* with proof, or with every rung behind it, and then it is reported */
	CHECK(step.state != REVOCATION_RELEASED || was_end || h->gone);
	CHECK(step.state != REVOCATION_LOST || (h->detached && h->signalled && h->killed));
	CHECK(h->reported == (step.state == REVOCATION_LOST ? 1 : 0));
	/* nobody is signalled or killed whose pins could have been detached */
	CHECK(h->signalled <= h->detached && h->killed <= h->signalled);
	/* four timeouts end it, whatever else happens */
	CHECK(h->n_timeouts < 4 || is_end);
	h->state = step.state;
	return NULL;
}

static uint64_t n_sequences;

static const char *explore(struct history h, next_function next, unsigned depth)
{
	n_sequences++;
	for (unsigned event = 0; depth > 0 && event < REVOCATION_EVENT_COUNT; event++) {
		struct history after = h;
		const char *broken;

		after.gone = event == REVOKE_GONE;
		after.n_timeouts += event == REVOKE_TIMEOUT;
		broken = take(&after, next(h.state, (enum revocation_event)event));
		if (!broken)
			broken = explore(after, next, depth - 1);
		if (broken)
			return broken;
	}
	return NULL;
}

static const char *explore_all(next_function next, unsigned depth)
{
	for (int forced = 0; forced < 2; forced++) {
		struct history h = {};
		const char *broken = take(&h, revocation_begin(forced));

		if (!broken)
			broken = explore(h, next, depth);
		if (broken)
			return broken;
	}
	return NULL;
}

static void test_every_sequence(void **state)
{
	const char *broken = explore_all(revocation_next, LENGTH);

	if (broken)
		fail_msg("not true: %s", broken);
	/* 2 (6^9 - 1) / 5 */
	assert_int_equal(n_sequences, 4031078);
}

/* Proof that GONE is heeded on every rung. */
static void test_gone_ends(void **state)
{
	for (unsigned s = REVOCATION_NOTIFIED; s <= REVOCATION_KILLED; s++)
		assert_int_equal(revocation_next((enum revocation_state)s, REVOKE_GONE).state,
				 REVOCATION_RELEASED);
}

/* More time is given before force is used, and never after. */
static void test_extend(void **state)
{
	for (unsigned s = REVOCATION_NOTIFIED; s <= REVOCATION_LOST; s++) {
		struct revocation_step step =
			revocation_next((enum revocation_state)s, REVOKE_EXTENDED);

		assert_int_equal(step.state, s);
		assert_int_equal(step.actions, s == REVOCATION_NOTIFIED ? REVOKE_ARM_GRACE : 0);
	}
}

/* --- tables that are wrong in one place: each must be found out --- */

static enum revocation_state wrong_state;
static enum revocation_event wrong_event;
static struct revocation_step wrong_step;

static struct revocation_step wrong_next(enum revocation_state state, enum revocation_event event)
{
	return state == wrong_state && event == wrong_event ? wrong_step
							    : revocation_next(state, event);
}

static void test_wrong_tables(void **state)
{
	unsigned n = 0;

	/* every step with actions, with each of its actions left out, and sent to each other state */
	for (unsigned s = REVOCATION_NOTIFIED; s <= REVOCATION_KILLED; s++)
		for (unsigned e = 0; e < REVOCATION_EVENT_COUNT; e++) {
			struct revocation_step right = revocation_next(
				(enum revocation_state)s, (enum revocation_event)e);

			wrong_state = (enum revocation_state)s;
			wrong_event = (enum revocation_event)e;
			for (unsigned bit = 1; bit <= REVOKE_END && e != REVOKE_EXTENDED; bit <<= 1) {
				if (!(right.actions & bit))
					continue;
				wrong_step = right;
				wrong_step.actions &= ~bit;
				assert_non_null(explore_all(wrong_next, 5));
				n++;
			}
			for (unsigned to = 0; to <= REVOCATION_LOST; to++) {
				if (to == right.state || right.actions == 0)
					continue;
				wrong_step = right;
				wrong_step.state = (enum revocation_state)to;
				assert_non_null(explore_all(wrong_next, 5));
				n++;
			}
		}
	assert_true(n > 80);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_every_sequence),
		cmocka_unit_test(test_gone_ends),
		cmocka_unit_test(test_extend),
		cmocka_unit_test(test_wrong_tables),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
