/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * Clients that mean no good, or never end: descriptors whose closing waits hold up nobody else (I6), what
 * is no data file is refused by name, and nothing is left behind by thousands of visitors.
 */

#define CYCLES     10000
#define WARM       1000
#define SLACK_KIB  256
#define ROUND_TRIP 300000 /* µs, at most: the machine may be loaded, but nothing may wait for a close */
#define LINGER_SEC 5

static pinbroker *client(void)
{
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	return pb;
}

static int ignore_file(const struct pinbroker_file_info *info, void *userdata)
{
	return 0;
}

static int count_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static unsigned count_pins(pinbroker *pb)
{
	unsigned n = 0;

	assert_int_equal(pinbroker_list_pins(pb, 0, 0, count_pin, &n), 0);
	return n;
}

/* Another client's calls meanwhile: the slowest of 200. */
static void expect_quick(pinbroker *pb)
{
	uint64_t slowest = 0;

	for (int i = 0; i < 200; i++) {
		uint64_t usec = usec_now();

		assert_int_equal(pinbroker_list_files(pb, ignore_file, NULL), 0);
		usec = usec_now() - usec;
		slowest = usec > slowest ? usec : slowest;
	}
	assert_in_range(slowest, 0, ROUND_TRIP);
}

/* A connection with data that nobody reads: its last close waits for seconds. */
static int lingering_socket(int *ret_listener, int *ret_peer)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct linger linger = { .l_onoff = 1, .l_linger = LINGER_SEC };
	socklen_t size = sizeof(address);
	static char data[65536];
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0),
	    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	assert_int_equal(bind(listener, (struct sockaddr *)&address, size), 0);
	assert_int_equal(listen(listener, 1), 0);
	assert_int_equal(getsockname(listener, (struct sockaddr *)&address, &size), 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&address, size), 0);
	*ret_peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	*ret_listener = listener;
	assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)), 0);
	while (send(fd, data, sizeof(data), MSG_DONTWAIT) > 0)
		;
	return fd;
}

static unsigned count_fds(pid_t pid)
{
	struct dirent *de;
	char path[64];
	unsigned n = 0;
	DIR *d;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	d = opendir(path);
	assert_non_null(d);
	while ((de = readdir(d)))
		n += de->d_name[0] != '.';
	closedir(d);
	return n;
}

static void test_lingering(void **state)
{
	static const char *const messages[] = {
		"{\"method\":\"org.pinbroker.OpenFile\",\"parameters\":{\"fileDescriptor\":0,"
		"\"access\":\"read\"}}",
		"{\"method\":\"org.pinbroker.AddContext\",\"parameters\":{\"fileDescriptor\":0}}",
		"{\"method\":\"org.pinbroker.Preflight\",\"parameters\":{\"fileDescriptor\":0,"
		"\"access\":\"read\"}}",
		"{\"method\":\"org.varlink.service.GetInfo\"}",
		"{\"method\":\"org.pinbroker.Unpin\",\"parameters\":{\"pins\":[]}}",
		"no message",
		"{", /* and nothing more: unread when the connection ends */
	};
	int listener[8], peer[8];
	pinbroker *other, *pb;
	pinbroker_context *context;
	int s, fd;

	world_start("");
	mount_fs("tmpfs");
	other = client();
	expect_quick(other);
	for (size_t i = 0; i < 7; i++) {
		fd = lingering_socket(&listener[i], &peer[i]);
		s = dial();
		assert_true(send_with_fd(s, messages[i], strlen(messages[i]) + (i < 6), fd));
		close(fd);
		expect_quick(other);
		close(s);
		expect_quick(other);
	}
	/* a real context, whose holder goes away */
	fd = lingering_socket(&listener[7], &peer[7]);
	pb = client();
	assert_int_equal(pinbroker_add_context(pb, fd, NULL, &context), 0);
	close(fd);
	pinbroker_context_free(context);
	pinbroker_unref(pb);
	expect_quick(other);
	/* with what they sent thrown away, the closes end */
	for (size_t i = 0; i < 8; i++) {
		close(peer[i]);
		close(listener[i]);
	}
	pinbroker_unref(other);
	world_stop();
}

/* Closing the last copy of a dead holder's context does not take as long as its holder pleased. */
static void test_lingering_context_of_a_dead_holder(void **state)
{
	static const struct pinbroker_range range = { 0, PAGE };
	int listener, peer, fd, fds[2];
	struct pollfd pfd;
	pinbroker *other;
	uint64_t begin, pins[2] = {};
	pid_t pid;

	world_start("[Revocation]\nRevokeGraceSec=100ms\nSignalGraceSec=100ms\n");
	mount_fs("tmpfs");
	make_file();
	fd = lingering_socket(&listener, &peer);
	assert_int_equal(pipe(fds), 0);
	pid = fork();
	if (pid == 0) {
		pinbroker_context *lingering, *plain;
		pinbroker *pb = client();
		pinbroker_file *file;

		if (pinbroker_open_file(pb, file_path, PINBROKER_READ, &file) < 0 ||
		    pinbroker_add_context(pb, fd, NULL, &lingering) < 0 ||
		    pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &plain) < 0 ||
		    pinbroker_pin(pb, file, lingering, &range, 1, PINBROKER_READ, NULL, pins) < 0 ||
		    pinbroker_pin(pb, file, plain, &range, 1, PINBROKER_READ, NULL, pins + 1) < 0)
			_exit(1);
		(void)!write(fds[1], pins, sizeof(pins));
		pause();
	}
	close(fd);
	pfd = (struct pollfd){ .fd = fds[0], .events = POLLIN };
	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	assert_int_equal(read(fds[0], pins, sizeof(pins)), sizeof(pins));
	finish(pid, SIGKILL);
	other = client();
	begin = usec_now();
	while (count_pins(other) > 0)
		expect_quick(other);
	assert_in_range(usec_now() - begin, 0, LINGER_SEC * 1000000 / 2);
	pinbroker_unref(other);
	world_stop();
	close(peer);
	close(listener);
	close(fds[0]);
	close(fds[1]);
}

/* A FUSE file system whose server never answers. */
static void test_fuse(void **state)
{
	char options[96], fuse[80];
	pinbroker_context *context;
	pinbroker_file *file;
	pinbroker *pb, *other;
	int server, fd;

	server = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	assert_true(server >= 0);
	world_start("");
	snprintf(fuse, sizeof(fuse), "%s/fuse", dir);
	assert_int_equal(mkdir(fuse, 0755), 0);
	snprintf(options, sizeof(options), "fd=%d,rootmode=100000,user_id=0,group_id=0", server);
	assert_int_equal(rmdir(fuse), 0);
	close(open(fuse, O_CREAT | O_RDWR | O_CLOEXEC, 0600));
	assert_int_equal(mount("test", fuse, "fuse", 0, options), 0);
	fd = open(fuse, O_PATH | O_CLOEXEC);
	assert_true(fd >= 0);

	pb = client();
	other = client();
	assert_true(pinbroker_open_file_fd(pb, fd, PINBROKER_READ, &file) < 0);
	assert_string_equal(pinbroker_last_error(pb)->name, "org.pinbroker.NotLeasable");
	expect_quick(other);
	assert_true(pinbroker_add_context(pb, fd, NULL, &context) < 0);
	assert_string_equal(pinbroker_last_error(pb)->name, "org.pinbroker.NotSupported");
	expect_quick(other);
	close(fd);
	pinbroker_unref(pb);
	pinbroker_unref(other);
	umount2(fuse, MNT_DETACH);
	close(server);
	world_stop();
}

static void refused(pinbroker *pb, int fd, const char *error)
{
	pinbroker_file *file;

	assert_true(fd >= 0);
	assert_true(pinbroker_open_file_fd(pb, fd, PINBROKER_READ, &file) < 0);
	assert_string_equal(pinbroker_last_error(pb)->name, error);
	close(fd);
}

static void test_no_data_files(void **state)
{
	pinbroker_file *file;
	int pipes[2], fd, writer;
	pinbroker *pb;
	char link[100];

	world_start("");
	mount_fs("tmpfs");
	make_file();
	pb = client();
	assert_int_equal(pipe(pipes), 0);
	refused(pb, open(mount_point, O_PATH), "org.pinbroker.NotLeasable");
	refused(pb, open("/dev/null", O_PATH), "org.pinbroker.NotLeasable");
	refused(pb, pipes[0], "org.pinbroker.NotLeasable");
	refused(pb, pipes[1], "org.pinbroker.NotLeasable");
	refused(pb, socket(AF_UNIX, SOCK_STREAM, 0), "org.pinbroker.NotLeasable");
	refused(pb, eventfd(0, 0), "org.pinbroker.NotLeasable");
	refused(pb, open("/proc/self/status", O_PATH), "org.pinbroker.NotLeasable");
	fd = memfd_create("x", 0);
	refused(pb, fd, "org.pinbroker.NotLeasable");
	snprintf(link, sizeof(link), "%s/link", mount_point);
	assert_int_equal(symlink(file_path, link), 0);
	refused(pb, open(link, O_PATH | O_NOFOLLOW), "org.pinbroker.NotLeasable");

	/* one that others have open in the way */
	writer = open(file_path, O_RDWR | O_CLOEXEC);
	refused(pb, open(file_path, O_PATH), "org.pinbroker.Busy");
	close(writer);
	assert_int_equal(pinbroker_open_file(pb, file_path, PINBROKER_READ, &file), 0);
	pinbroker_file_free(file);
	pinbroker_unref(pb);
	world_stop();
}

/* --- ten thousand visitors --- */

static long rss_kib(pid_t pid)
{
	char path[64], line[128];
	long kib = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	f = fopen(path, "re");
	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "VmRSS: %ld", &kib) == 1)
			break;
	fclose(f);
	return kib;
}

static void visit(void)
{
	const struct pinbroker_range range = { 0, PAGE };
	pinbroker *pb = client();
	pinbroker_context *context;
	pinbroker_file *file;
	uint64_t pin;
	int fd;

	fd = eventfd(0, EFD_CLOEXEC);
	assert_int_equal(pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &file), 0);
	assert_int_equal(pinbroker_add_context(pb, fd, NULL, &context), 0);
	assert_int_equal(pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, "visitor",
				       &pin),
			 0);
	/* revoked: by an opener that does not wait */
	assert_int_equal(open(file_path, O_RDWR | O_NONBLOCK | O_CLOEXEC), -1);
	assert_int_equal(errno, EAGAIN);
	assert_int_equal(pinbroker_unpin(pb, &pin, 1, NULL, NULL), 0);
	pinbroker_context_free(context);
	pinbroker_file_free(file);
	pinbroker_unref(pb);
	close(fd);
}

static void test_visitors(void **state)
{
	unsigned fds, own_fds;
	uint64_t end;
	long rss = 0;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	visit();
	fds = count_fds(daemon_pid);
	own_fds = count_fds(getpid());
	for (int i = 0; i < CYCLES; i++) {
		visit();
		if (i == WARM)
			rss = rss_kib(daemon_pid);
	}
	/* the last closes are under way */
	end = usec_now() + WAIT_MSEC * 1000;
	while (count_fds(daemon_pid) > fds && usec_now() < end)
		usleep(1000);
	assert_in_range(count_fds(daemon_pid), 1, fds);
	assert_int_equal(count_fds(getpid()), own_fds);
#ifndef PINBROKER_SANITIZED /* it keeps what is freed for a while */
	assert_in_range(rss_kib(daemon_pid), 1, rss + SLACK_KIB);
#endif
	print_message("%d visits: RSS %ld KiB after %d, %ld KiB at the end\n", CYCLES, rss, WARM,
		      rss_kib(daemon_pid));
	world_stop();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_lingering),
		cmocka_unit_test(test_lingering_context_of_a_dead_holder),
		cmocka_unit_test(test_fuse),
		cmocka_unit_test(test_no_data_files),
		cmocka_unit_test(test_visitors),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
