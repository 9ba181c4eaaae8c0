/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <stdlib.h>

#include "daemon/pin.h"

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

static void test_random(void **state)
{
	struct pin_ranges ranges = RB_INITIALIZER(&ranges);

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
		assert_int_equal(pin_ranges_end(&ranges), furthest_end());
		do {
			pin = pin_ranges_find(&ranges, start, end, pin);
			expected = find(start, end, expected);
			assert_ptr_equal(pin, expected);
		} while (pin);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_random),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
