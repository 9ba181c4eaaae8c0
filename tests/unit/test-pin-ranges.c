/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <stdlib.h>

#include "daemon/core/pin.h"
#include "daemon/core/revocation.h"

/* The interval tree against a plain array, under random inserts, removals and searches. */

#define PINS   200
#define ROUNDS 100000
#define RANGE  1000

static struct pin pins[PINS];
static bool present[PINS];

/* The first overlapping pin after `after` in the order of offset and id, found by looking at all. */
static struct pin *find(uint64_t start, uint64_t end, const struct pin *after)
{
	struct pin *found = NULL;

	for (unsigned i = 0; i < PINS; i++) {
		struct pin *pin = &pins[i];

		if (!present[i] || pin->offset >= end || pin_end_offset(pin) <= start)
			continue;
		if (after && (pin->offset < after->offset ||
			      (pin->offset == after->offset && pin->id <= after->id)))
			continue;
		if (!found || pin->offset < found->offset ||
		    (pin->offset == found->offset && pin->id < found->id))
			found = pin;
	}
	return found;
}

static uint64_t furthest_end(void)
{
	uint64_t end = 0;

	for (unsigned i = 0; i < PINS; i++)
		if (present[i] && pin_end_offset(&pins[i]) > end)
			end = pin_end_offset(&pins[i]);
	return end;
}

/* Every node knows the furthest end below it, and the tree is in order. Returns that end. */
static uint64_t check_subtree(struct pin *node, const struct pin **previous, unsigned *n)
{
	struct pin *children[2];
	uint64_t end, ends[2];

	if (!node)
		return 0;
	children[0] = RB_LEFT(node, by_range);
	children[1] = RB_RIGHT(node, by_range);
	ends[0] = check_subtree(children[0], previous, n);
	if (*previous)
		assert_true((*previous)->offset < node->offset ||
			    ((*previous)->offset == node->offset && (*previous)->id < node->id));
	*previous = node;
	(*n)++;
	ends[1] = check_subtree(children[1], previous, n);
	end = pin_end_offset(node);
	for (unsigned i = 0; i < 2; i++)
		if (ends[i] > end)
			end = ends[i];
	assert_int_equal(node->subtree_end, end);
	return end;
}

static void check_tree(struct pin_ranges *ranges, unsigned n_expected)
{
	const struct pin *previous = NULL;
	unsigned n = 0;

	assert_int_equal(check_subtree(RB_ROOT(ranges), &previous, &n), pin_ranges_end(ranges));
	assert_int_equal(n, n_expected);
}

/* Ranges that touch do not overlap; the last byte that there can be. */
static void test_borders(void **state)
{
	struct pin_ranges ranges = RB_INITIALIZER(&ranges);
	struct pin a = { .id = 1, .offset = 10, .length = 10 },
		   last = { .id = 2, .offset = UINT64_MAX - 1, .length = 1 };

	assert_null(pin_ranges_find(&ranges, 0, UINT64_MAX, NULL));
	assert_int_equal(pin_ranges_end(&ranges), 0);
	pin_ranges_insert(&ranges, &a);
	assert_null(pin_ranges_find(&ranges, 0, 10, NULL));
	assert_null(pin_ranges_find(&ranges, 20, 30, NULL));
	assert_ptr_equal(pin_ranges_find(&ranges, 9, 11, NULL), &a);
	assert_ptr_equal(pin_ranges_find(&ranges, 19, 20, NULL), &a);
	pin_ranges_insert(&ranges, &last);
	assert_int_equal(pin_ranges_end(&ranges), UINT64_MAX);
	assert_ptr_equal(pin_ranges_find(&ranges, 20, UINT64_MAX, NULL), &last);
	assert_ptr_equal(pin_ranges_find(&ranges, 0, UINT64_MAX, &a), &last);
	assert_null(pin_ranges_find(&ranges, 0, UINT64_MAX, &last));
	pin_ranges_remove(&ranges, &last);
	assert_int_equal(pin_ranges_end(&ranges), 20);
	pin_ranges_remove(&ranges, &a);
	assert_int_equal(pin_ranges_end(&ranges), 0);
}

static void test_random(void **state)
{
	struct pin_ranges ranges = RB_INITIALIZER(&ranges);
	unsigned n = 0;

	srandom(1);
	for (unsigned round = 0; round < ROUNDS; round++) {
		unsigned i = (unsigned)random() % PINS;
		uint64_t start = (uint64_t)random() % RANGE,
			 end = start + (uint64_t)random() % 100;
		struct pin *pin = NULL, *expected = NULL;

		if (present[i]) {
			pin_ranges_remove(&ranges, &pins[i]);
		} else {
			pins[i] = (struct pin){
				.id = i + 1,
				.offset = (uint64_t)random() % RANGE,
				.length = 1 + (uint64_t)random() % (round % 7 ? 20 : RANGE),
			};
			pin_ranges_insert(&ranges, &pins[i]);
		}
		present[i] = !present[i];
		n = present[i] ? n + 1 : n - 1;
		check_tree(&ranges, n);
		assert_int_equal(pin_ranges_end(&ranges), furthest_end());
		do {
			pin = pin_ranges_find(&ranges, start, end, pin);
			expected = find(start, end, expected);
			assert_ptr_equal(pin, expected);
		} while (pin);
	}
	/* and empty again */
	for (unsigned i = 0; i < PINS; i++) {
		if (!present[i])
			continue;
		pin_ranges_remove(&ranges, &pins[i]);
		present[i] = false;
		check_tree(&ranges, --n);
	}
	assert_true(RB_EMPTY(&ranges));
}

/* Those that are to go, which others lie in between of. */
static void test_wanted(void **state)
{
	struct pin_ranges ranges = RB_INITIALIZER(&ranges);
	static struct target targets[PINS];

	srandom(2);
	for (unsigned i = 0; i < PINS; i++) {
		pins[i] = (struct pin){
			.id = i + 1,
			.offset = (uint64_t)random() % RANGE,
			.length = 1 + (uint64_t)random() % 20,
		};
		pin_ranges_insert(&ranges, &pins[i]);
	}
	for (unsigned round = 0; round < ROUNDS / 10; round++) {
		uint64_t start = (uint64_t)random() % RANGE, end = start + (uint64_t)random() % 100;
		struct pin *pin = &pins[(unsigned)random() % PINS], *found;
		bool expected = false;

		if (LIST_EMPTY(&pin->targets))
			LIST_INSERT_HEAD(&pin->targets, &targets[pin - pins], of_pin);
		else if (round % 3 > 0) /* so that few are at a time */
			LIST_REMOVE(&targets[pin - pins], of_pin);
		pin_ranges_update(pin);
		for (unsigned i = 0; i < PINS; i++)
			expected |= !LIST_EMPTY(&pins[i].targets) && pins[i].offset < end &&
				    pin_end_offset(&pins[i]) > start;
		found = pin_ranges_find_wanted(&ranges, start, end);
		assert_int_equal(found != NULL, expected);
		if (found)
			assert_true(!LIST_EMPTY(&found->targets) && found->offset < end &&
				    pin_end_offset(found) > start);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_borders),
		cmocka_unit_test(test_random),
		cmocka_unit_test(test_wanted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
