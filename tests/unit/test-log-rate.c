/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/log-rate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define NOW (7 * LOG_RATE_USEC)

static struct log_rate rate;

static int setup(void **state)
{
	rate = (struct log_rate){};
	return 0;
}

/* How many of n lines of a key get through; none of them ends a count. */
static unsigned admitted(uint64_t key, unsigned n, uint64_t now_usec)
{
	struct log_rate_count over;
	unsigned n_admitted = 0;

	for (unsigned i = 0; i < n; i++) {
		n_admitted += log_rate_admit(&rate, key, now_usec, &over);
		assert_int_equal(over.n, 0);
	}
	return n_admitted;
}

static void each_has_its_own(void **state)
{
	assert_int_equal(admitted(1, LOG_RATE_BURST + 7, NOW), LOG_RATE_BURST);
	assert_int_equal(admitted(2, 3, NOW), 3);
	assert_int_equal(admitted(1, 1, NOW + LOG_RATE_USEC - 1), 0);
}

static void what_is_left_out_is_told_with_the_next(void **state)
{
	struct log_rate_count over;

	admitted(1, LOG_RATE_BURST + 7, NOW);
	assert_true(log_rate_admit(&rate, 1, NOW + LOG_RATE_USEC, &over));
	assert_int_equal(over.key, 1);
	assert_int_equal(over.n, 7);
	assert_int_equal(admitted(1, LOG_RATE_BURST, NOW + LOG_RATE_USEC), LOG_RATE_BURST - 1);
}

/* ... or when nothing follows. */
static void what_is_left_out_is_told_in_time(void **state)
{
	struct log_rate_count over;

	admitted(1, LOG_RATE_BURST + 7, NOW);
	admitted(2, LOG_RATE_BURST, NOW);
	assert_false(log_rate_expire(&rate, NOW + LOG_RATE_USEC - 1, &over));
	assert_true(log_rate_expire(&rate, NOW + LOG_RATE_USEC, &over));
	assert_int_equal(over.key, 1);
	assert_int_equal(over.n, 7);
	assert_false(log_rate_expire(&rate, NOW + LOG_RATE_USEC, &over));
}

/* With more than can be counted at a time, nothing that was left out goes untold. */
static void more_than_can_be_counted(void **state)
{
	struct log_rate_count over;

	admitted(1, LOG_RATE_BURST + 7, NOW);
	for (uint64_t key = 2; key <= LOG_RATE_KEYS; key++)
		assert_int_equal(admitted(key, 1, NOW + key), 1);
	assert_true(log_rate_admit(&rate, LOG_RATE_KEYS + 1, NOW + LOG_RATE_KEYS + 1, &over));
	assert_int_equal(over.key, 1);
	assert_int_equal(over.n, 7);
	assert_int_equal(rate.n_entries, LOG_RATE_KEYS);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(each_has_its_own, setup),
		cmocka_unit_test_setup(what_is_left_out_is_told_with_the_next, setup),
		cmocka_unit_test_setup(what_is_left_out_is_told_in_time, setup),
		cmocka_unit_test_setup(more_than_can_be_counted, setup),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
