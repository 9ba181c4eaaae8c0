/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

/*
 * Readers, openers that do not block, exposure and its emergency (I1); lost signals and a lost bus (I4).
 */

#define FILES 64

/* How much later than its time a revocation may end, on a machine that has more to do. */
#define LATE_MSEC (250 * slowness() + kept_msec())

static int find_file(const struct pinbroker_file_info *info, void *userdata)
{
	*(struct pinbroker_file_info *)userdata = *info;
	return 0;
}

static struct pinbroker_file_info file_info(void)
{
	struct pinbroker_file_info info = {};
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_list_files(pb, find_file, &info), 0);
	pinbroker_unref(pb);
	return info;
}

/* Nobody tells when the kernel has turned a lease into another. */
static void wait_for_lease(enum pinbroker_lease_state state)
{
	uint64_t end = usec_now() + WAIT_MSEC * 1000;

	while (file_info().lease != state) {
		assert_true(usec_now() < end);
		poll(NULL, 0, 10);
	}
}

static long begin(const char *config, const struct holder_options *options, struct holder *ret)
{
	long base;

	world_start(config);
	mount_fs("tmpfs");
	make_file();
	base = pinned();
	*ret = holder_start(options);
	holder_expect(ret, "holding ");
	return base;
}

static int timed_open(int flags, uint64_t *ret_usec)
{
	uint64_t start_usec = usec_now();
	int fd = open(file_path, flags | O_CLOEXEC);

	*ret_usec = usec_now() - start_usec;
	return fd;
}

static void test_nonblock(void **state)
{
	const struct holder_options options = { .ignore = true };
	uint64_t usec, end = usec_now() + WAIT_MSEC * 1000;
	struct holder holder;
	long base = begin("[Revocation]\nRevokeGraceSec=200ms\n", &options, &holder);
	int fd;

	fd = timed_open(O_RDWR | O_NONBLOCK, &usec);
	assert_int_equal(fd, -1);
	assert_int_equal(errno, EAGAIN);
	/* it has set the revocation off all the same: trying again gets through */
	holder_expect(&holder, "notice modify -1 0 -");
	while ((fd = timed_open(O_RDWR | O_NONBLOCK, &usec)) < 0) {
		assert_int_equal(errno, EAGAIN);
		assert_true(usec_now() < end);
		poll(NULL, 0, 1);
	}
	expect_pinned(pinned(), base, 0);
	close(fd);
	holder_stop(&holder, SIGKILL);
	world_stop();
}

static void opened_for_writing(int flags, const char *notice)
{
	const struct holder_options options = {};
	struct holder holder;
	long base = begin("", &options, &holder);
	uint64_t usec;
	pid_t pid;
	int status;

	pid = fork();
	if (pid == 0) {
		int fd = timed_open(flags, &usec);

		_exit(fd < 0 ? 1 : labs(pinned() - base) <= 8 ? 0 : 2);
	}
	holder_expect(&holder, "notice modify -1 0 -");
	holder_expect(&holder, "notice %s %d", notice, pid);
	holder_expect(&holder, "let-go");
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	holder_stop(&holder, 0);
	world_stop();
}

static void test_open_rdwr(void **state)
{
	opened_for_writing(O_RDWR, "open -1");
}

static void test_open_trunc(void **state)
{
	opened_for_writing(O_WRONLY | O_TRUNC, "truncate 0");
}

/* A reader waits until the lease has settled, and later ones do not; a truncate waits still. */
static void test_settling(void **state)
{
	const struct holder_options options = {};
	struct result result;
	struct holder holder;
	uint64_t usec;
	long base;
	pid_t pid;
	int fd;

	set_lease_break_time(2);
	base = begin("", &options, &holder);
	fd = timed_open(O_RDONLY, &usec);
	assert_true(fd >= 0);
	close(fd);
	assert_in_range(usec, 500000, 4000000);
	wait_for_lease(PINBROKER_LEASE_SETTLED);
	restore_lease_break_time();

	fd = timed_open(O_RDONLY, &usec);
	assert_true(fd >= 0);
	close(fd);
	assert_true(usec < 250000);
	expect_pinned(pinned(), base, PAGES);

	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify");
	holder_expect(&holder, "notice truncate %d %d", PAGE, pid);
	holder_expect(&holder, "let-go");
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	expect_pinned(result.pinned, base, 0);
	holder_stop(&holder, 0);
	world_stop();
}

/* A reader is let in, the file is exposed, and a truncate meanwhile is an emergency. */
static void test_exposed(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct result result;
	struct holder holder;
	long base = begin("[Files]\nReaders=admit\n", &options, &holder);
	uint64_t usec, end = usec_now() + WAIT_MSEC * 1000;
	pid_t pid;
	int reader, fd;

	reader = timed_open(O_RDONLY, &usec);
	assert_true(reader >= 0);
	assert_true(usec < 1000000);
	assert_true(file_info().exposed);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	holder_expect(&holder, "notice shrink %d", PAGE);
	/* by force, and at once */
	while (pinned() - base > 8) {
		assert_true(usec_now() < end);
		poll(NULL, 0, 1);
	}
	/* with the reader gone it is under its lease again */
	close(reader);
	wait_for_lease(PINBROKER_LEASE_WRITE);
	assert_false(file_info().exposed);
	holder_stop(&holder, SIGKILL);
	world_stop();
}

/* --- 64 breaks at once of leases that nobody shares, and room for 8 signals --- */

static void unpin_all(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	unsigned *n_notices = userdata;

	if (!n->update && pinbroker_unpin(pb, n->pins, n->n_pins, NULL, NULL) == 0)
		++*n_notices;
}

static void hold_many(int ready)
{
	const struct pinbroker_range range = { 0, 1 };
	pinbroker_context *context;
	unsigned n_notices = 0;
	pinbroker *pb;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (pinbroker_new("many", socket_path, &pb) < 0 ||
	    pinbroker_set_channels(pb, PINBROKER_CHANNEL_WATCH) < 0 ||
	    pinbroker_set_revoke_callback(pb, unpin_all, &n_notices) < 0 ||
	    pinbroker_connect(pb) < 0 ||
	    pinbroker_add_context(pb, eventfd(0, 0), NULL, &context) < 0)
		_exit(1);
	for (int i = 0; i < FILES; i++) {
		pinbroker_file *file;
		char path[100];
		uint64_t pin;

		snprintf(path, sizeof(path), "%s/%d", mount_point, i);
		if (pinbroker_open_file(pb, path, PINBROKER_READ, &file) < 0 ||
		    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_READ, NULL, &pin) < 0)
			_exit(2);
	}
	(void)!write(ready, "r", 1);
	while (n_notices < FILES) {
		struct pollfd pfd = { .fd = pinbroker_get_fd(pb), .events = POLLIN };

		if (poll(&pfd, 1, WAIT_MSEC) != 1 || pinbroker_dispatch(pb) < 0)
			_exit(3);
	}
	_exit(0);
}

static uint64_t count(const char *name)
{
	sd_bus_message *m;
	sd_bus *bus;
	uint64_t value, found = UINT64_MAX;
	const char *key;

	assert_true(sd_bus_new(&bus) >= 0);
	assert_true(sd_bus_set_address(bus, bus_address) >= 0);
	assert_true(sd_bus_set_bus_client(bus, true) >= 0);
	assert_true(sd_bus_start(bus) >= 0);
	assert_true(sd_bus_get_property(bus, "org.pinbroker1", "/org/pinbroker1",
					"org.pinbroker1.Manager", "Counts", NULL, &m,
					"a{st}") >= 0);
	assert_true(sd_bus_message_enter_container(m, 'a', "{st}") >= 0);
	while (sd_bus_message_read(m, "{st}", &key, &value) > 0)
		if (strcmp(key, name) == 0)
			found = value;
	sd_bus_message_unref(m);
	sd_bus_flush_close_unref(bus);
	return found;
}

static void test_overflow(void **state)
{
	const struct rlimit limit = { 8, 8 };
	int ready[2], status;
	pid_t pid;
	char c;

	world_start("");
	mount_fs("tmpfs");
	for (int i = 0; i < FILES; i++)
		run("echo data >%s/%d", mount_point, i);
	assert_int_equal(prlimit(daemon_pid, RLIMIT_SIGPENDING, &limit, NULL), 0);
	assert_int_equal(pipe(ready), 0);
	pid = fork();
	if (pid == 0)
		hold_many(ready[1]);
	close(ready[1]);
	assert_int_equal(read(ready[0], &c, 1), 1);
	close(ready[0]);

	assert_int_equal(kill(daemon_pid, SIGSTOP), 0);
	assert_int_equal(waitpid(daemon_pid, &status, WUNTRACED), daemon_pid);
	for (int i = 0; i < FILES; i++) {
		char path[100];

		snprintf(path, sizeof(path), "%s/%d", mount_point, i);
		assert_int_equal(open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC), -1);
		assert_int_equal(errno, EAGAIN);
	}
	assert_int_equal(kill(daemon_pid, SIGCONT), 0);
	/* every one of them reaches the holder */
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_in_range(count("signalQueueOverflows"), 1, 1000);
	world_stop();
}

/* The kernel's patience is shorter than the ladder: all of it is walked, in what time there is (I3). */
static void test_short_break_time(void **state)
{
	const struct holder_options options = { .opaque = true, .ignore = true, .catch_signal = true };
	struct result result;
	struct holder holder;
	int fd, status;
	pid_t pid;

	set_lease_break_time(2);
	world_start("");
	mount_fs("tmpfs");
	make_file();
	holder = holder_start(&options);
	holder_expect(&holder, "holding ");
	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify -1 0 -");
	holder_expect(&holder, "notice truncate %d %d truncater", PAGE, pid);
	holder_expect(&holder, "signal");
	result = truncate_finish(pid, fd);
	restore_lease_break_time();
	assert_int_equal(result.error, 0);
	/* 10 s of grace, 5 s after the signal, and 4 s for the rest, in 1.8 s */
	assert_in_range(result.usec / 1000, 1400, 1950);
	status = holder_stop(&holder, 0);
	assert_true(WIFSIGNALED(status));
	assert_int_equal(WTERMSIG(status), SIGKILL);
	world_stop();
}

/* 0 is no time at all for the kernel: it waits for ever. The ladder takes its own time all the same; and as
 * no lease would ever settle, readers are admitted. */
static void test_no_break_time(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct result result;
	struct holder holder;
	uint64_t usec;
	long base;
	pid_t pid;
	int fd;

	set_lease_break_time(0);
	base = begin("[Revocation]\nRevokeGraceSec=500ms\n", &options, &holder);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 495, 500 + LATE_MSEC);
	expect_pinned(result.pinned, base, 0);

	wait_for_lease(PINBROKER_LEASE_WRITE);
	fd = timed_open(O_RDONLY, &usec);
	assert_true(fd >= 0);
	assert_true(usec < 1000000);
	close(fd);
	restore_lease_break_time();
	holder_stop(&holder, SIGKILL);
	world_stop();
}

/* --- the bus --- */

static void test_bus_lost(void **state)
{
	const struct holder_options options = {
		.channels = PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS,
		.ignore = true,
	};
	struct result result;
	struct holder holder;
	long base = begin("[Revocation]\nRevokeGraceSec=2s\n", &options, &holder);
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	const char *const ping[] = { "busctl", "-q", "--address", bus_address, "call",
				     "org.pinbroker1", "/org/pinbroker1",
				     "org.freedesktop.DBus.Peer", "Ping", NULL };
	pid_t pid;
	int fd;

	/* before the notice, which comes by the socket then */
	finish(bus_pid, SIGKILL);
	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify");
	/* and back in the middle of the revocation: the name comes back */
	start_bus();
	while (finish(start(ping), 0) != 0) {
		assert_true(usec_now() < end);
		poll(NULL, 0, 10);
	}
	finish(bus_pid, SIGKILL);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 1995, 2000 + LATE_MSEC);
	expect_pinned(result.pinned, base, 0);
	start_bus();
	holder_stop(&holder, SIGKILL);
	world_stop();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_nonblock),
		cmocka_unit_test(test_open_rdwr),
		cmocka_unit_test(test_open_trunc),
		cmocka_unit_test(test_settling),
		cmocka_unit_test(test_exposed),
		cmocka_unit_test(test_overflow),
		cmocka_unit_test(test_short_break_time),
		cmocka_unit_test(test_no_break_time),
		cmocka_unit_test(test_bus_lost),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
