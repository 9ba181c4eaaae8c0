/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <sys/stat.h>
#include <systemd/sd-bus.h>

/*
 * The spine (I1, I2): a truncate held back, its pins' holder told, the pages let go, the truncate let
 * through.
 */

static int count_revokes(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	unsigned *n = userdata;

	*n += sd_bus_message_is_signal(m, "org.pinbroker1.Manager", "Revoke");
	return 0;
}

/* pages: that the holder pins; 0: it holds a context that pins none */
static void tell_the_story(const char *fs, unsigned channels, long pages)
{
	const struct holder_options options = { .channels = channels, .opaque = pages == 0 };
	unsigned n_revokes = 0;
	struct holder holder;
	sd_bus *other;
	long base;

	world_start("");
	mount_fs(fs);
	make_file();
	assert_true(sd_bus_new(&other) >= 0);
	assert_true(sd_bus_set_address(other, bus_address) >= 0);
	assert_true(sd_bus_set_bus_client(other, true) >= 0);
	assert_true(sd_bus_start(other) >= 0);
	assert_true(sd_bus_add_match(other, NULL, "type='signal'", count_revokes, &n_revokes) >= 0);

	base = pinned();
	holder = holder_start(&options);
	holder_expect(&holder, "holding ");
	expect_pinned(pinned(), base, pages);
	for (int round = 0; round < 2; round++) {
		struct result result;
		struct stat st;
		pid_t pid;
		int fd;

		pid = truncate_start(&fd);
		/* told at once, and then who it was and the new size: it was seen to be blocked */
		holder_expect(&holder, "notice modify -1 0 -");
		holder_expect(&holder, "notice truncate %d %d truncater", PAGE, pid);
		holder_expect(&holder, "let-go");
		result = truncate_finish(pid, fd);
		assert_int_equal(result.error, 0);
		expect_pinned(result.pinned, base, 0);
		assert_int_equal(stat(file_path, &st), 0);
		assert_int_equal(st.st_size, PAGE);
		if (round > 0)
			break;
		holder_command(&holder, 'r');
		holder_expect(&holder, "holding ");
		expect_pinned(pinned(), base, pages);
	}
	holder_stop(&holder, 0);

	/* signals to the holder alone: a match for everything does not get them */
	while (sd_bus_process(other, NULL) > 0)
		;
	assert_int_equal(n_revokes, 0);
	sd_bus_flush_close_unref(other);
	world_stop();
}

static void test_tmpfs_bus(void **state)
{
	tell_the_story("tmpfs", PINBROKER_CHANNEL_BUS, PAGES);
}

static void test_tmpfs_watch(void **state)
{
	tell_the_story("tmpfs", PINBROKER_CHANNEL_WATCH, PAGES);
}

/* Linux 6.12 and later refuse io_uring's long-term pins of their page cache. */
static void test_ext4(void **state)
{
	tell_the_story("ext4", PINBROKER_CHANNEL_BUS | PINBROKER_CHANNEL_WATCH, 0);
}

static void test_xfs(void **state)
{
	tell_the_story("xfs", PINBROKER_CHANNEL_BUS, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_tmpfs_bus),
		cmocka_unit_test(test_tmpfs_watch),
		cmocka_unit_test(test_ext4),
		cmocka_unit_test(test_xfs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
