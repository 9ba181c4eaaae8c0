/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Processes that are not what they seem: a connection held up by its own end, a holder that has become a
 * privileged program, and breakers by thread, by number and by death (I3, I8).
 */

#define HOLDER_UID 54321
#define GRACE_MSEC 300
#define LATE_MSEC  (500 + kept_msec())

static const char config[] = "[Revocation]\nRevokeGraceSec=300ms\nSignalGraceSec=300ms\n";

struct list {
	unsigned n;
	struct pinbroker_revocation_info last;
};

static int on_revocation(const struct pinbroker_revocation_info *info, void *userdata)
{
	struct list *list = userdata;

	list->n++;
	list->last = *info;
	return 0;
}

static struct list list_revocations(void)
{
	struct list list = {};
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_true(pinbroker_list_revocations(pb, on_revocation, &list) >= 0);
	pinbroker_unref(pb);
	return list;
}

static int count_client(const struct pinbroker_client_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static unsigned count_clients(void)
{
	unsigned n = 0;
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_true(pinbroker_list_clients(pb, count_client, &n) >= 0);
	pinbroker_unref(pb);
	return n;
}

static void begin(void)
{
	world_start(config);
	mount_fs("tmpfs");
	make_file();
}

/* A pipe on which a child says a byte when it has come so far. */
static void await(int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	char c;

	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	assert_int_equal(read(fd, &c, 1), 1);
}

/*
 * A client that sends the broker its own end of their connection: as long as the broker has it, the
 * connection does not hang up. It is refused where it is offered for anything; in a message that never
 * ends it is kept, until the process dies.
 */
static void test_own_end(void **state)
{
	static const char hello[] = "{\"method\":\"org.pinbroker.Hello\",\"parameters\":{}}",
			  add[] = "{\"method\":\"org.pinbroker.AddContext\",\"parameters\":"
				  "{\"fileDescriptor\":0}}",
			  open_file[] = "{\"method\":\"org.pinbroker.OpenFile\",\"parameters\":"
					"{\"fileDescriptor\":0,\"access\":\"read\"}}";
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	int fds[2];
	pid_t pid;

	begin();
	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0) {
		int s = dial();
		char reply[4096];

		if (write(s, hello, sizeof(hello)) != sizeof(hello) ||
		    read(s, reply, sizeof(reply)) <= 0)
			_exit(1);
		if (!send_with_fd(s, add, sizeof(add), s) ||
		    read(s, reply, sizeof(reply)) <= 0 || !strstr(reply, "NotSupported"))
			_exit(1);
		if (!send_with_fd(s, open_file, sizeof(open_file), s) ||
		    read(s, reply, sizeof(reply)) <= 0 || !strstr(reply, "NotLeasable"))
			_exit(1);
		if (!send_with_fd(s, "{", 1, s))
			_exit(1);
		(void)!write(fds[1], "", 1);
		for (;;)
			pause();
	}
	close(fds[1]);
	await(fds[0]);
	assert_int_equal(count_clients(), 1);
	finish(pid, SIGKILL);
	while (count_clients() > 0 && usec_now() < end)
		;
	assert_int_equal(count_clients(), 0);
	close(fds[0]);
	world_stop();
}

/* A holder that has become a setuid program is never signalled, whatever it holds. */
static void test_setuid(void **state)
{
	static const struct pinbroker_range range = { 0, PAGE };
	char program[96];
	struct result result;
	struct list list;
	int fds[2], fd;
	pid_t pid, breaker;

	begin();
	assert_int_equal(chmod(dir, 0755), 0);
	assert_int_equal(chmod(mount_point, 0755), 0);
	assert_int_equal(chown(file_path, HOLDER_UID, HOLDER_UID), 0);
	snprintf(program, sizeof(program), "%s/mnt/sleep", dir);
	run("cp /bin/sleep %s", program);
	assert_int_equal(chmod(program, 04755), 0);
	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0) {
		pinbroker_context *context;
		pinbroker_file *file;
		uint64_t pin;
		pinbroker *pb;
		int holds;

		close(fds[0]);
		if (setresgid(HOLDER_UID, HOLDER_UID, HOLDER_UID) < 0 ||
		    setresuid(HOLDER_UID, HOLDER_UID, HOLDER_UID) < 0)
			_exit(1);
		holds = eventfd(0, 0); /* stays open */
		if (pinbroker_new("setuid", socket_path, &pb) < 0 ||
		    pinbroker_set_channels(pb, PINBROKER_CHANNEL_WATCH) < 0 ||
		    pinbroker_connect(pb) < 0 ||
		    pinbroker_open_file(pb, file_path, PINBROKER_READ, &file) < 0 ||
		    pinbroker_add_context(pb, holds, NULL, &context) < 0 ||
		    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_READ, NULL, &pin) < 0)
			_exit(1);
		execl(program, "sleep", "100", NULL);
		_exit(1);
	}
	close(fds[1]);
	/* the pipe's end closes as it becomes the other program */
	assert_int_equal(poll(&(struct pollfd){ .fd = fds[0], .events = POLLIN }, 1, WAIT_MSEC), 1);
	assert_int_equal(waitpid(pid, NULL, WNOHANG), 0);
	set_lease_break_time(3);
	breaker = truncate_start(&fd);
	result = truncate_finish(breaker, fd);
	set_lease_break_time(45);
	assert_int_equal(result.error, 0);
	/* nobody could be turned to: it is kept as long as the kernel waits, and not claimed to be gone */
	assert_in_range(result.usec / 1000, 2000, 4000);
	list = list_revocations();
	assert_int_equal(list.n, 1);
	assert_int_equal(list.last.state, PINBROKER_REVOCATION_LOST);
	assert_int_equal(list.last.n_remaining, 1);
	assert_int_equal(waitpid(pid, NULL, WNOHANG), 0);
	finish(pid, SIGKILL);
	close(fds[0]);
	world_stop();
}

/* --- breakers --- */

struct breaker {
	pid_t pid;
	int done;
};

static void *truncate_in_thread(void *userdata)
{
	(void)!truncate(file_path, 2 * PAGE);
	return NULL;
}

static void by_thread(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, truncate_in_thread, NULL);
	pthread_join(thread, NULL);
}

static void by_truncate(void)
{
	(void)!truncate(file_path, PAGE);
}

static void by_open(void)
{
	(void)!open(file_path, O_RDWR | O_CLOEXEC);
}

static void by_open_truncating(void)
{
	(void)!open(file_path, O_WRONLY | O_TRUNC | O_CLOEXEC);
}

static struct breaker breaker_start(void (*f)(void))
{
	struct breaker b;
	int fds[2];

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	b.pid = fork();
	if (b.pid == 0) {
		prctl(PR_SET_NAME, "breaker");
		f();
		(void)!write(fds[1], "", 1);
		_exit(0);
	}
	close(fds[1]);
	b.done = fds[0];
	return b;
}

static bool breaker_is_blocked(const struct breaker *b)
{
	return poll(&(struct pollfd){ .fd = b->done, .events = POLLIN }, 1, 0) == 0;
}

static void breaker_finish(struct breaker *b)
{
	await(b->done);
	close(b->done);
	assert_int_equal(finish(b->pid, 0), 0);
}

static void expect_blame(void (*f)(void), const char *cause, long size)
{
	struct holder holder;
	struct breaker b;

	begin();
	holder = holder_start(&(struct holder_options){ .opaque = true });
	holder_expect(&holder, "holding ");
	b = breaker_start(f);
	holder_expect(&holder, "notice modify -1 0 -");
	holder_expect(&holder, "notice %s %ld %d breaker", cause, size, b.pid);
	holder_expect(&holder, "let-go");
	breaker_finish(&b);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

static void test_thread(void **state)
{
	/* the thread's system call, the process's number */
	expect_blame(by_thread, "truncate", 2 * PAGE);
}

static void test_open(void **state)
{
	expect_blame(by_open, "open", -1);
}

static void test_open_truncating(void **state)
{
	expect_blame(by_open_truncating, "truncate", 0);
}

/* A second breaker stands behind the first; both go on when the holder has let go. */
static void test_two_breakers(void **state)
{
	struct holder holder;
	struct breaker first, second;

	begin();
	holder = holder_start(&(struct holder_options){ .opaque = true, .ignore = true });
	holder_expect(&holder, "holding ");
	first = breaker_start(by_truncate);
	holder_expect(&holder, "notice modify -1 0 -");
	second = breaker_start(by_open);
	holder_expect(&holder, "notice truncate %d %d breaker", PAGE, first.pid);
	assert_true(breaker_is_blocked(&first));
	assert_true(breaker_is_blocked(&second));
	holder_stop(&holder, SIGKILL);
	breaker_finish(&first);
	breaker_finish(&second);
	assert_int_equal(list_revocations().last.state, PINBROKER_REVOCATION_RELEASED);
	world_stop();
}

/* A breaker that dies while it waits has begun a revocation all the same, which ends in order. */
static void test_breaker_dies(void **state)
{
	struct holder holder, next;
	struct breaker b;
	struct list list;

	begin();
	holder = holder_start(&(struct holder_options){ .ignore = true });
	holder_expect(&holder, "holding ");
	b = breaker_start(by_truncate);
	holder_expect(&holder, "notice modify -1 0 -");
	finish(b.pid, SIGKILL);
	close(b.done);
	do
		list = list_revocations();
	while (list.last.end_usec == PINBROKER_UNKNOWN);
	assert_int_equal(list.last.state, PINBROKER_REVOCATION_RELEASED);
	assert_in_range((list.last.end_usec - list.last.start_usec) / 1000, GRACE_MSEC - 5,
			GRACE_MSEC + LATE_MSEC);
	/* and it can be pinned again */
	next = holder_start(&(struct holder_options){});
	holder_expect(&next, "holding ");
	assert_true(WIFEXITED(holder_stop(&next, 0)));
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_own_end),
		cmocka_unit_test(test_setuid),
		cmocka_unit_test(test_thread),
		cmocka_unit_test(test_open),
		cmocka_unit_test(test_open_truncating),
		cmocka_unit_test(test_two_breakers),
		cmocka_unit_test(test_breaker_dies),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
