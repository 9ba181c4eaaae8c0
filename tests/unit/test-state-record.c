/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/state/record.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static int allocations_left = -1; /* < 0: no end */

void *__real_realloc(void *p, size_t size);
void *__wrap_realloc(void *p, size_t size);

void *__wrap_realloc(void *p, size_t size)
{
	return allocations_left >= 0 && allocations_left-- == 0 ? NULL : __real_realloc(p, size);
}

/* What was written, as one line without its newline. */
static char *take_line(struct record_buffer *b)
{
	char *line;

	assert_false(b->failed);
	assert_int_equal(b->data[b->n - 1], '\n');
	line = strndup(b->data, b->n - 1);
	assert_non_null(line);
	assert_null(strchr(line, '\n'));
	record_buffer_clear(b);
	return line;
}

static void test_written_and_read(void **state)
{
	static const char odd[] = "a b=c%d\n\t\x01\x7f\xc3\xa4 ";
	struct record_buffer b = {};
	struct record record;
	bool bad = false;
	char *line;

	record_begin(&b, "pin");
	record_put_string(&b, "identity", "not it");
	record_put(&b, "id", UINT64_MAX);
	record_put_signed(&b, "handle", INT64_MIN);
	record_put_string(&b, "label", odd);
	record_put_string(&b, "empty", "");
	record_put_string(&b, "none", NULL);
	record_end(&b);
	line = take_line(&b);
	assert_int_equal(record_parse(line, &record), 0);
	assert_string_equal(record.kind, "pin");
	assert_int_equal(record.n_fields, 5);
	assert_true(record_unsigned(&record, "id", 0, &bad) == UINT64_MAX);
	assert_true(record_signed(&record, "handle", 0, &bad) == INT64_MIN);
	assert_string_equal(record_string(&record, "label"), odd);
	assert_string_equal(record_string(&record, "empty"), "");
	assert_null(record_string(&record, "none"));
	assert_int_equal(record_unsigned(&record, "absent", 7, &bad), 7);
	assert_int_equal(record_signed(&record, "absent", -7, &bad), -7);
	assert_false(bad);
	free(line);
}

static void test_bad_lines(void **state)
{
	static const char *const lines[] = {
		"", " pin", "pin id", "pin =1", "pin  id=1", "pin id=1 ", "pin s=%", "pin s=%4", "pin s=%4g",
		"pin s=%00", "pin s=%4G",
		/* one more than there may be */
		"k a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a= a=",
	};

	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		char *line = strdup(lines[i]);
		struct record record;

		assert_int_equal(record_parse(line, &record), -EBADMSG);
		free(line);
	}
}

static void test_bad_numbers(void **state)
{
	static const char *const values[] = { "", "-1", "+1", "1x", "0x1", "x", "18446744073709551616", "%201" };

	for (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++) {
		char line[64] = "pin n=";
		struct record record;
		bool bad = false;

		strcat(line, values[i]);
		assert_int_equal(record_parse(line, &record), 0);
		record_unsigned(&record, "n", 0, &bad);
		assert_true(bad);
		bad = false;
		record_signed(&record, "n", 0, &bad);
		assert_true(bad || strcmp(values[i], "-1") == 0);
	}
}

/* Refused at each place: it is said, and nothing is lost. */
static void test_no_memory(void **state)
{
	for (int n = 0;; n++) {
		struct record_buffer b = {};
		bool failed;

		allocations_left = n;
		record_begin(&b, "file");
		record_put(&b, "id", 1);
		for (int i = 0; i < 10; i++)
			record_put_string(&b, "path", "/some/where/that/takes/more/room/than/there/is");
		record_end(&b);
		allocations_left = -1;
		failed = b.failed;
		record_buffer_clear(&b);
		if (!failed) {
			assert_true(n > 2);
			break;
		}
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_written_and_read),
		cmocka_unit_test(test_bad_lines),
		cmocka_unit_test(test_bad_numbers),
		cmocka_unit_test(test_no_memory),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
