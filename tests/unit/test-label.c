/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/label.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ROOM 64

static unsigned n_allocated;
static bool no_memory;

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void __real_free(void *p);
void __wrap_free(void *p);

/* Nothing in it, or behind it, happens to be 0. */
void *__wrap_malloc(size_t size)
{
	void *p = no_memory ? NULL : __real_malloc(size + ROOM);

	n_allocated += p != NULL;
	return p ? memset(p, 'x', size + ROOM) : NULL;
}

void __wrap_free(void *p)
{
	n_allocated -= p != NULL;
	__real_free(p);
}

static void test_text(void **state)
{
	static const char *const texts[] = {"", "a", "weights of layer 7", "1234567", "12345678"};

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		struct label *label = label_new(texts[i]);

		assert_string_equal(label_text(label), texts[i]);
		assert_null(label_unref(label));
	}
	assert_int_equal(n_allocated, 0);
}

/* It goes with the last one that has it. */
static void test_shared(void **state)
{
	struct label *label = label_new("shared");

	assert_ptr_equal(label_ref(label), label);
	label_unref(label);
	assert_int_equal(n_allocated, 1);
	assert_string_equal(label_text(label), "shared");
	label_unref(label);
	assert_int_equal(n_allocated, 0);
}

static void test_none(void **state)
{
	assert_null(label_text(NULL));
	assert_null(label_ref(NULL));
	assert_null(label_unref(NULL));
	no_memory = true;
	assert_null(label_new("a"));
	no_memory = false;
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_text),
		cmocka_unit_test(test_shared),
		cmocka_unit_test(test_none),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
