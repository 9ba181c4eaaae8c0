/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/user.h"
#include "protocol/macro.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static const uint64_t maxima[LIMIT_COUNT] = {
	[LIMIT_CLIENTS] = 2,
	[LIMIT_FILES] = 0,
	[LIMIT_PINNED_BYTES] = UINT64_MAX,
	[LIMIT_UNFINISHED] = 4,
};

static int allocations_left = -1; /* < 0: no end */

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);

static bool allocation_fails(void)
{
	return allocations_left >= 0 && allocations_left-- == 0;
}

void *__wrap_malloc(size_t size)
{
	return allocation_fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
	return allocation_fails() ? NULL : __real_calloc(n, size);
}

static int setup(void **state)
{
	return users_new(maxima, (struct users **)state);
}

static int teardown(void **state)
{
	users_free(*state);
	return 0;
}

static void test_one_user_per_uid(void **state)
{
	struct user *a, *again, *b;

	assert_int_equal(user_get(*state, 1000, &a), 0);
	assert_int_equal(user_get(*state, 1001, &b), 0);
	assert_int_equal(user_get(*state, 1000, &again), 0);
	assert_ptr_equal(a, again);
	assert_ptr_not_equal(a, b);
	assert_null(user_unref(again));
	assert_int_equal(a->uid, 1000);
	user_unref(a);
	user_unref(b);
	assert_null(user_unref(NULL));
}

/* I5: what one uid causes counts against its own limits. */
static void test_charges(void **state)
{
	struct user *a, *b;

	assert_int_equal(user_get(*state, 1, &a), 0);
	assert_int_equal(user_get(*state, 2, &b), 0);
	assert_int_equal(user_charge(a, LIMIT_CLIENTS, 2), 0);
	assert_int_equal(user_charge(a, LIMIT_CLIENTS, 1), -EDQUOT);
	assert_int_equal(a->used[LIMIT_CLIENTS], 2);
	assert_int_equal(user_charge(b, LIMIT_CLIENTS, 1), 0);
	assert_int_equal(user_charge(a, LIMIT_FILES, 1), -EDQUOT);
	assert_int_equal(user_charge(a, LIMIT_FILES, 0), 0);
	assert_int_equal(user_maximum(a, LIMIT_UNFINISHED), 4);

	user_charge_force(a, LIMIT_CLIENTS, 2);
	assert_int_equal(a->used[LIMIT_CLIENTS], 4);
	assert_int_equal(user_charge(a, LIMIT_CLIENTS, 0), -EDQUOT);
	user_discharge(a, LIMIT_CLIENTS, 3);
	assert_int_equal(user_charge(a, LIMIT_CLIENTS, 1), 0);

	user_discharge(a, LIMIT_CLIENTS, 2);
	user_discharge(b, LIMIT_CLIENTS, 1);
	user_unref(a);
	user_unref(b);
}

static void test_bytes_do_not_wrap(void **state)
{
	struct user *a;

	assert_int_equal(user_get(*state, 1, &a), 0);
	assert_int_equal(user_charge(a, LIMIT_PINNED_BYTES, UINT64_MAX - 1), 0);
	assert_int_equal(user_charge(a, LIMIT_PINNED_BYTES, 2), -EDQUOT);
	assert_int_equal(user_charge(a, LIMIT_PINNED_BYTES, UINT64_MAX), -EDQUOT);
	assert_int_equal(user_charge(a, LIMIT_PINNED_BYTES, 1), 0);
	assert_int_equal(user_charge(a, LIMIT_PINNED_BYTES, 1), -EDQUOT);
	user_discharge(a, LIMIT_PINNED_BYTES, UINT64_MAX);
	user_unref(a);
}

static void test_names(void **state)
{
	assert_string_equal(limit_name(LIMIT_CLIENTS), "MaxClientsPerUser");
	assert_string_equal(limit_name(LIMIT_PINNED_BYTES), "MaxPinnedBytesPerUser");
	for (enum limit l = 0; l < LIMIT_COUNT; l++)
		assert_non_null(limit_name(l));
}

/* Each allocation on the way fails once; what is there already stays whole. */
/* A reserve goes past the maximum, and no further. */
static void test_reserve(void **state)
{
	struct users *users;
	struct user *a;

	assert_int_equal(users_new(maxima, &users), 0);
	assert_int_equal(user_get(users, 1, &a), 0);
	assert_int_equal(user_charge(a, LIMIT_UNFINISHED, 4), 0);
	assert_int_equal(user_charge_reserve(a, LIMIT_UNFINISHED, 3, 2), -EDQUOT);
	assert_int_equal(user_charge_reserve(a, LIMIT_UNFINISHED, 2, 2), 0);
	assert_int_equal(user_charge_reserve(a, LIMIT_UNFINISHED, 1, 2), -EDQUOT);
	assert_int_equal(user_charge_reserve(a, LIMIT_PINNED_BYTES, 1, 1), 0);
	user_discharge(a, LIMIT_PINNED_BYTES, 1);
	user_discharge(a, LIMIT_UNFINISHED, 6);
	user_unref(a);
	users_free(users);
}

/* Of all the descriptors that there can be, connections and files included, none takes more than an eighth. */
static void test_capacity(void **state)
{
	static const uint64_t none[LIMIT_COUNT] = { [0 ... LIMIT_COUNT - 1] = UINT64_MAX };
	struct users *users;
	struct user *a, *b;

	assert_int_equal(users_new(none, &users), 0);
	assert_int_equal(user_get(users, 1, &a), 0);
	assert_int_equal(user_get(users, 2, &b), 0);
	assert_int_equal(user_maximum(a, LIMIT_DESCRIPTORS), UINT64_MAX);
	users_set_capacity(users, 600);
	assert_int_equal(user_maximum(a, LIMIT_DESCRIPTORS), 600);
	users_set_capacity(users, 8000);
	assert_int_equal(user_maximum(a, LIMIT_DESCRIPTORS), 1000);
	assert_int_equal(user_charge(a, LIMIT_DESCRIPTORS, 1001), -EDQUOT);
	assert_int_equal(user_charge(a, LIMIT_DESCRIPTORS, 1000), 0);
	assert_int_equal(user_charge(b, LIMIT_CLIENTS, 3000), 0);
	assert_int_equal(user_charge(b, LIMIT_FILES, 900), 0);
	assert_true(users_have_room(users, 100));
	assert_false(users_have_room(users, 101));
	assert_int_equal(user_charge(b, LIMIT_DESCRIPTORS, 101), -EDQUOT);
	assert_int_equal(user_charge(b, LIMIT_CLIENTS, 51), -EDQUOT);
	assert_int_equal(user_charge(b, LIMIT_PINS, 1000), 0);
	user_charge_force(b, LIMIT_CLIENTS, 60);
	assert_false(users_have_room(users, 0));
	user_discharge(a, LIMIT_DESCRIPTORS, 1000);
	assert_true(users_have_room(users, 900));
	user_discharge(b, LIMIT_CLIENTS, 3060);
	user_discharge(b, LIMIT_FILES, 900);
	user_discharge(b, LIMIT_PINS, 1000);
	user_unref(a);
	user_unref(b);
	users_free(users);
}

static void test_no_memory(void **state)
{
	struct users *users;
	struct user *a, *b;
	int n_failures = 0;

	allocations_left = 0;
	assert_int_equal(users_new(maxima, &users), -ENOMEM);
	for (int i = 0;; i++) {
		int r;

		allocations_left = i;
		r = user_get(*state, 1, &a);
		allocations_left = -1;
		if (r == 0)
			break;
		assert_int_equal(r, -ENOMEM);
		n_failures++;
	}
	assert_in_range(n_failures, 2, 10);

	allocations_left = 0;
	assert_int_equal(user_get(*state, 2, &b), -ENOMEM);
	allocations_left = -1;
	assert_int_equal(user_get(*state, 1, &b), 0);
	assert_ptr_equal(a, b);
	user_unref(a);
	user_unref(b);
}

/* Each user's own time counts, what has been spent adds up, and all of it is forgotten in the end. */
static void test_spent_time(void **state)
{
	struct user *a, *b;

	assert_int_equal(user_get(*state, 1, &a), 0);
	assert_int_equal(user_get(*state, 2, &b), 0);
	assert_true(user_is_light(a));
	for (int i = 0; i < 10; i++)
		user_spend(a, 1000);
	assert_false(user_is_light(a));
	assert_true(user_is_light(b));
	a->halved_usec -= 60 * 1000000ULL;
	assert_true(user_is_light(a));
	assert_int_equal(a->spent_usec, 0);
	user_unref(a);
	user_unref(b);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_one_user_per_uid, setup, teardown),
		cmocka_unit_test_setup_teardown(test_charges, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bytes_do_not_wrap, setup, teardown),
		cmocka_unit_test(test_reserve),
		cmocka_unit_test(test_capacity),
		cmocka_unit_test_setup_teardown(test_spent_time, setup, teardown),
		cmocka_unit_test(test_names),
		cmocka_unit_test_setup_teardown(test_no_memory, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
