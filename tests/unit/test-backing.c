/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/backing.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/sysmacros.h>

#include <cmocka.h>

static enum backing_kind kind_of(const char *file_system, bool dax)
{
	struct backing backing;

	backing_find(makedev(0, 42), file_system, dax, &backing);
	assert_string_equal(backing.device, "");
	assert_string_equal(backing.nvdimm_namespace, "");
	assert_string_equal(backing.region, "");
	assert_int_equal(backing.numa_node, -1);
	return backing.kind;
}

static void test_file_system_tells_the_kind(void **state)
{
	assert_int_equal(kind_of("tmpfs", false), BACKING_TMPFS);
	assert_int_equal(kind_of("hugetlbfs", false), BACKING_HUGETLBFS);
	assert_int_equal(kind_of("xfs", false), BACKING_PAGE_CACHE);
	assert_int_equal(kind_of("xfs", true), BACKING_FSDAX);
	/* virtiofs has it, too; a name alone decides nothing */
	assert_int_equal(kind_of("anything", true), BACKING_FSDAX);
	assert_int_equal(kind_of("tmpfs2", false), BACKING_PAGE_CACHE);
}

static void test_no_such_block_device(void **state)
{
	struct backing backing;

	backing_find(makedev(4094, 1048574), "xfs", false, &backing);
	assert_int_equal(backing.kind, BACKING_PAGE_CACHE);
	assert_string_equal(backing.device, "");
}

static void test_other_devices_are_no_dax(void **state)
{
	const dev_t devices[] = {
		makedev(1, 3), makedev(5, 0), makedev(0, 0), makedev(4094, 1048574),
	};
	struct backing backing = { .numa_node = 7 };
	uint64_t size = 7;

	for (size_t i = 0; i < sizeof(devices) / sizeof(devices[0]); i++)
		assert_int_equal(backing_find_device(devices[i], &backing, &size), -ENODEV);
	assert_int_equal(backing.numa_node, 7);
	assert_int_equal(size, 7);
}

static void test_what_can_be_pinned(void **state)
{
	static const struct {
		enum backing_kind kind;
		enum pinnable read, write;
	} cases[] = {
		{ BACKING_PAGE_CACHE, PINNABLE_YES, PINNABLE_UNKNOWN },
		{ BACKING_TMPFS, PINNABLE_YES, PINNABLE_YES },
		{ BACKING_HUGETLBFS, PINNABLE_YES, PINNABLE_YES },
		{ BACKING_FSDAX, PINNABLE_NO, PINNABLE_NO },
		{ BACKING_DEVICE_DAX, PINNABLE_YES, PINNABLE_YES },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		for (int access = ACCESS_READ; access <= ACCESS_WRITE; access++) {
			const struct backing backing = { .kind = cases[i].kind };
			enum pinnable wanted = access == ACCESS_READ ? cases[i].read
								     : cases[i].write;
			const char *reason = "";

			assert_int_equal(backing_pinnable(&backing, access, &reason), wanted);
			assert_int_equal(reason != NULL, wanted != PINNABLE_YES);
		}
}

static void test_names(void **state)
{
	const struct backing backing = {
		.device = "pmem0",
		.nvdimm_namespace = "namespace0.0",
		.region = "region0",
	};

	assert_true(backing_is_on(&backing, "pmem0"));
	assert_true(backing_is_on(&backing, "namespace0.0"));
	assert_true(backing_is_on(&backing, "region0"));
	assert_false(backing_is_on(&backing, "pmem"));
	assert_false(backing_is_on(&backing, "pmem01"));
	assert_false(backing_is_on(&(struct backing){}, ""));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_file_system_tells_the_kind),
		cmocka_unit_test(test_no_such_block_device),
		cmocka_unit_test(test_other_devices_are_no_dax),
		cmocka_unit_test(test_what_can_be_pinned),
		cmocka_unit_test(test_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
