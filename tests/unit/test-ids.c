/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/ids.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char path[] = "/tmp/pinbroker-test-ids-XXXXXX";

static void write_file(const char *text, size_t n)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	assert_return_code(fd, errno);
	assert_int_equal(write(fd, text, n), n);
	close(fd);
}

/* The first identifier of a run that finds this in the file. */
static uint64_t first_after(const char *text, size_t n)
{
	struct ids ids;
	uint64_t id;

	write_file(text, n);
	assert_int_equal(ids_open(&ids, path), 0);
	id = ids_next(&ids);
	ids_close(&ids);
	return id;
}

#define FIRST_AFTER(text) first_after(text, sizeof(text) - 1)

static void test_what_a_file_says(void **state)
{
	assert_true(FIRST_AFTER("") == 1);
	assert_true(FIRST_AFTER("00000000000000000041\n") == 42);
	assert_true(FIRST_AFTER("04611686018427387904\n") == IDS_MAX + 1);
}

static void test_damage(void **state)
{
	assert_true(FIRST_AFTER("00000000000000000000\n") == 1);
	assert_true(FIRST_AFTER("-5\n") == 1);
	assert_true(FIRST_AFTER("-0000000000000000005\n") == 1);
	assert_true(FIRST_AFTER(" 0000000000000000005\n") == 1);
	assert_true(FIRST_AFTER("0000000000000000004\n") == 1);
	assert_true(FIRST_AFTER("00000000000000000041") == 1);
	assert_true(FIRST_AFTER("00000000000000000041x") == 1);
	assert_true(FIRST_AFTER("00000000000000000041\n\n") == 1);
	assert_true(FIRST_AFTER("000000000000000000041") == 1);
	assert_true(FIRST_AFTER("0000000000000000004x\n") == 1);
	assert_true(FIRST_AFTER("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0") == 1);
	assert_true(FIRST_AFTER("04611686018427387905\n") == 1);
	assert_true(FIRST_AFTER("09223372036854775807\n") == 1);
	assert_true(FIRST_AFTER("18446744073709551615\n") == 1);
	assert_true(FIRST_AFTER("99999999999999999999\n") == 1);
}

/* Runs that end at any time, after damage or not: what one has given out the next does not. */
static void test_runs(void **state)
{
	uint64_t last = 0;
	struct ids ids;

	write_file("damaged, and longer than it should be\n", 38);
	for (int run = 0; run < 4; run++) {
		assert_int_equal(ids_open(&ids, path), 0);
		for (int i = 0; i < 100000; i++) {
			uint64_t id = ids_next(&ids);

			assert_true(id > last);
			last = id;
		}
		ids_close(&ids);
	}
}

static void test_passed(void **state)
{
	struct ids ids;

	write_file("00000000000000000041\n", 21);
	assert_int_equal(ids_open(&ids, path), 0);
	ids_pass(&ids, 7);
	assert_true(ids_next(&ids) == 42);
	ids_pass(&ids, 1000000);
	ids_give(&ids, 7);
	assert_true(ids_next(&ids) == 7);
	assert_true(ids_next(&ids) == 1000001);
	ids_pass(&ids, UINT64_MAX);
	ids_pass(&ids, IDS_MAX + 1);
	assert_true(ids_next(&ids) == 1000002);
	ids_close(&ids);
	/* it was written down */
	assert_int_equal(ids_open(&ids, path), 0);
	assert_true(ids_next(&ids) > 1000002);
	ids_close(&ids);
}

/* What has been seen is reserved, too, before anything else is given out. */
static void test_passed_at_the_end(void **state)
{
	struct ids ids;

	write_file("", 0);
	assert_int_equal(ids_open(&ids, path), 0);
	ids_pass(&ids, 1000000);
	ids_close(&ids);
	assert_int_equal(ids_open(&ids, path), 0);
	assert_true(ids_next(&ids) > 1000000);
	ids_close(&ids);
}

static void test_one_at_a_time(void **state)
{
	struct ids ids, other;

	assert_int_equal(ids_open(&ids, path), 0);
	assert_int_equal(ids_open(&other, path), -EADDRINUSE);
	ids_close(&ids);
	assert_int_equal(ids_open(&other, path), 0);
	ids_close(&other);
}

static void test_no_file(void **state)
{
	struct ids ids;

	assert_int_equal(ids_open(&ids, "/nonexistent/ids"), 0);
	ids_pass(&ids, 5);
	assert_true(ids_next(&ids) == 6);
	ids_close(&ids);
}

static int setup(void **state)
{
	int fd = mkstemp(path);

	close(fd);
	return fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
	return unlink(path);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_what_a_file_says),
		cmocka_unit_test(test_damage),
		cmocka_unit_test(test_runs),
		cmocka_unit_test(test_passed),
		cmocka_unit_test(test_passed_at_the_end),
		cmocka_unit_test(test_one_at_a_time),
		cmocka_unit_test(test_no_file),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
