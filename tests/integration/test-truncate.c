/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <time.h>
#include <unistd.h>

#include "client/pinbroker.h"

/*
 * The spine (I1, I2): a truncate held back, its pins' holder told, the pages let go, the truncate let
 * through. The real daemon, a real dbus-daemon, real leases on ext4, xfs and tmpfs, real pins.
 */

#define PAGES     4096
#define PAGE      4096
#define SIZE      ((size_t)PAGES * PAGE)
#define WAIT_MSEC 20000

static char dir[] = "/tmp/pinbroker-test-XXXXXX";
static char mount_point[64], socket_path[64], bus_path[64], bus_address[80], file_path[80];
static pid_t daemon_pid, bus_pid;

static uint64_t usec_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

/* Long-term pins of the whole machine, in pages. */
static long pinned(void)
{
	long value, acquired = 0, released = 0;
	char buffer[64];
	FILE *f;
	int fd;

	/* reading it folds the counters of all CPUs */
	fd = open("/proc/sys/vm/stat_refresh", O_RDONLY | O_CLOEXEC);
	assert_true(fd >= 0);
	(void)!read(fd, buffer, sizeof(buffer));
	close(fd);
	f = fopen("/proc/vmstat", "re");
	assert_non_null(f);
	while (fscanf(f, "%63s %ld", buffer, &value) == 2) {
		if (strcmp(buffer, "nr_foll_pin_acquired") == 0)
			acquired = value;
		if (strcmp(buffer, "nr_foll_pin_released") == 0)
			released = value;
	}
	fclose(f);
	return acquired - released;
}

static pid_t start(const char *const argv[])
{
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	return pid;
}

static int finish(pid_t pid, int sig)
{
	int status;

	kill(pid, sig);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return status;
}

/* A server is there once its socket takes connections. */
static void wait_for_socket(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	int r;

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	do {
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		r = connect(fd, (struct sockaddr *)&address, sizeof(address));
		close(fd);
		if (r < 0)
			poll(NULL, 0, 1);
	} while (r < 0 && usec_now() < end);
	assert_int_equal(r, 0);
}

static void run(const char *format, ...)
{
	char command[256];
	va_list ap;

	va_start(ap, format);
	vsnprintf(command, sizeof(command), format, ap);
	va_end(ap);
	assert_int_equal(system(command), 0);
}

static int set_up(void **state)
{
	const char *bus[] = { "dbus-daemon", "--session", "--nofork", "--nopidfile", "--address",
			      bus_address, NULL };
	const char *broker[] = { getenv("PINBROKERD"), "--socket", socket_path, "--bus",
				 bus_address, NULL };

	assert_non_null(broker[0]);
	strcpy(dir + sizeof(dir) - 7, "XXXXXX");
	assert_non_null(mkdtemp(dir));
	snprintf(mount_point, sizeof(mount_point), "%s/mnt", dir);
	snprintf(socket_path, sizeof(socket_path), "%s/socket", dir);
	snprintf(bus_path, sizeof(bus_path), "%s/bus", dir);
	snprintf(bus_address, sizeof(bus_address), "unix:path=%s", bus_path);
	snprintf(file_path, sizeof(file_path), "%s/mnt/data", dir);
	assert_int_equal(mkdir(mount_point, 0755), 0);
	bus_pid = start(bus);
	wait_for_socket(bus_path);
	daemon_pid = start(broker);
	wait_for_socket(socket_path);
	return 0;
}

static int tear_down(void **state)
{
	int status = finish(daemon_pid, SIGTERM);

	finish(bus_pid, SIGKILL);
	umount(mount_point);
	run("rm -rf %s", dir);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	return 0;
}

static void mount_fs(const char *fs)
{
	if (strcmp(fs, "tmpfs") == 0) {
		assert_int_equal(mount("tmpfs", mount_point, "tmpfs", 0, NULL), 0);
		return;
	}
	run("truncate -s 400M %s/image", dir);
	run("mkfs.%s -q %s/image", fs, dir);
	run("mount -o loop %s/image %s", dir, mount_point);
}

static void make_file(void)
{
	int fd = open(file_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	char *p = malloc(SIZE);

	assert_true(fd >= 0);
	assert_non_null(p);
	memset(p, 'a', SIZE);
	assert_int_equal(write(fd, p, SIZE), SIZE);
	free(p);
	close(fd);
}

/* --- the holder, a process of its own --- */

struct holder {
	pid_t pid;
	int events;   /* lines of text from it */
	int commands; /* a byte each: "r": pin again */
};

struct holding {
	struct io_uring ring;
	pinbroker_file *file;
	pinbroker_context *context;
	void *map;
	uint64_t pin;
	long pages;
	FILE *events;
};

#define MUST(expression)                                                                           \
	do {                                                                                       \
		int _r = (expression);                                                             \
		if (_r < 0) {                                                                      \
			fprintf(h->events, "error %s: %d\n", #expression, _r);                     \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

static void hold(pinbroker *pb, struct holding *h)
{
	struct pinbroker_range range = { 0, SIZE };
	struct iovec iov = { h->map, SIZE };

	MUST(pinbroker_pin(pb, h->file, h->context, &range, 1, PINBROKER_WRITE, "test", &h->pin));
	if (h->pages > 0)
		MUST(io_uring_register_buffers(&h->ring, &iov, 1));
	MUST(pinbroker_bind(pb, h->pin, 0));
	fprintf(h->events, "holding %lu\n", h->pin);
}

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holding *h = userdata;

	fprintf(h->events, "notice %s %ld %d %s\n", pinbroker_cause_name(n->cause),
		n->size == PINBROKER_UNKNOWN ? -1 : (long)n->size, n->pid,
		n->comm ? n->comm : "-");
	if (!n->update)
		return; /* lets go when it knows who it was */
	if (h->pages > 0)
		MUST(io_uring_unregister_buffers(&h->ring));
	MUST(pinbroker_unpin(pb, &h->pin, 1, NULL, NULL));
	fprintf(h->events, "let-go\n");
}

static void holder_main(unsigned channels, long pages, int events, int commands)
{
	struct holding holding = { .events = fdopen(events, "w"), .pages = pages }, *h = &holding;
	pinbroker *pb;
	char c;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setvbuf(h->events, NULL, _IOLBF, 0);
	MUST(pinbroker_new("test holder", socket_path, &pb));
	MUST(pinbroker_set_channels(pb, channels));
	MUST(pinbroker_set_bus_address(pb, bus_address));
	MUST(pinbroker_set_revoke_callback(pb, on_revoke, h));
	MUST(pinbroker_connect(pb));
	MUST(pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &h->file));
	if (pages > 0) {
		MUST(io_uring_queue_init(8, &h->ring, 0));
		MUST(pinbroker_add_context_remote(pb, h->ring.ring_fd, "ring", &h->context));
	} else {
		MUST(pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), "no ring", &h->context));
	}
	h->map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
		      pinbroker_file_get_fd(h->file), 0);
	MUST(h->map == MAP_FAILED ? -errno : 0);
	hold(pb, h);
	for (;;) {
		struct pollfd fds[] = {
			{ .fd = pinbroker_get_fd(pb), .events = POLLIN },
			{ .fd = commands, .events = POLLIN },
		};

		MUST(poll(fds, 2, -1));
		if (fds[0].revents)
			MUST(pinbroker_dispatch(pb));
		if (!fds[1].revents)
			continue;
		if (read(commands, &c, 1) != 1)
			_exit(0);
		/* the file is as long as before, and pinned again */
		MUST(ftruncate(pinbroker_file_get_fd(h->file), SIZE) < 0 ? -errno : 0);
		hold(pb, h);
	}
}

static struct holder holder_start(unsigned channels, long pages)
{
	int events[2], commands[2];
	struct holder h;

	assert_int_equal(pipe2(events, O_CLOEXEC), 0);
	assert_int_equal(pipe2(commands, O_CLOEXEC), 0);
	h.pid = fork();
	assert_true(h.pid >= 0);
	if (h.pid == 0) {
		close(commands[1]);
		holder_main(channels, pages, events[1], commands[0]);
		_exit(0);
	}
	close(events[1]);
	close(commands[0]);
	h.events = events[0];
	h.commands = commands[1];
	return h;
}

static void holder_expect(struct holder *h, const char *format, ...)
{
	struct pollfd fd = { .fd = h->events, .events = POLLIN };
	char line[256] = "", expected[256];
	size_t n = 0;
	va_list ap;

	va_start(ap, format);
	vsnprintf(expected, sizeof(expected), format, ap);
	va_end(ap);
	while (n + 1 < sizeof(line)) {
		if (poll(&fd, 1, WAIT_MSEC) != 1)
			fail_msg("the holder did not say \"%s\"", expected);
		assert_int_equal(read(h->events, line + n, 1), 1);
		if (line[n] == '\n')
			break;
		n++;
	}
	line[n] = 0;
	if (strncmp(line, expected, strlen(expected)) != 0)
		fail_msg("the holder said \"%s\", not \"%s\"", line, expected);
}

static void holder_stop(struct holder *h)
{
	close(h->commands);
	finish(h->pid, 0);
	close(h->events);
}

/* --- who truncates, a process of its own --- */

struct result {
	int error;
	long pinned; /* as it returned */
};

static pid_t truncate_start(int *ret_fd)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		struct result result = {};

		prctl(PR_SET_NAME, "truncater");
		if (truncate(file_path, PAGE) < 0)
			result.error = errno;
		result.pinned = pinned();
		(void)!write(fds[1], &result, sizeof(result));
		_exit(0);
	}
	close(fds[1]);
	*ret_fd = fds[0];
	return pid;
}

static struct result truncate_finish(pid_t pid, int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	struct result result;

	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	assert_int_equal(read(fd, &result, sizeof(result)), sizeof(result));
	close(fd);
	assert_int_equal(waitpid(pid, NULL, 0), pid);
	return result;
}

static void expect_pinned(long value, long base, long pages)
{
	if (labs(value - base - pages) > 8)
		fail_msg("%ld pages are pinned, not %ld", value - base, pages);
}

static int count_revokes(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	unsigned *n = userdata;

	*n += sd_bus_message_is_signal(m, "org.pinbroker1.Manager", "Revoke");
	return 0;
}

/* pages: that the holder pins; 0: it holds a context that pins none */
static void tell_the_story(const char *fs, unsigned channels, long pages)
{
	unsigned n_revokes = 0;
	struct holder holder;
	sd_bus *other;
	long base;

	mount_fs(fs);
	make_file();
	assert_true(sd_bus_new(&other) >= 0);
	assert_true(sd_bus_set_address(other, bus_address) >= 0);
	assert_true(sd_bus_set_bus_client(other, true) >= 0);
	assert_true(sd_bus_start(other) >= 0);
	assert_true(sd_bus_add_match(other, NULL, "type='signal'", count_revokes, &n_revokes) >= 0);

	base = pinned();
	holder = holder_start(channels, pages);
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
		assert_int_equal(write(holder.commands, "r", 1), 1);
		holder_expect(&holder, "holding ");
		expect_pinned(pinned(), base, pages);
	}
	holder_stop(&holder);

	/* signals to the holder alone: a match for everything does not get them */
	while (sd_bus_process(other, NULL) > 0)
		;
	assert_int_equal(n_revokes, 0);
	sd_bus_flush_close_unref(other);
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
		cmocka_unit_test_setup_teardown(test_tmpfs_bus, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_tmpfs_watch, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_ext4, set_up, tear_down),
		cmocka_unit_test_setup_teardown(test_xfs, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
