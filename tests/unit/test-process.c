/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/process.h"
#include "protocol/macro.h"

#include <grp.h>
#include <linux/capability.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/fsuid.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

#define ALICE 61001
#define BOB   61002
#define CREW  61003 /* a group */

struct child {
	pid_t pid;
	int fd; /* its socket's other end: it answers each byte, and ends with it */
};

static struct child spawn(void (*become)(void))
{
	struct child child;
	int pair[2];
	char byte = 0;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	child.pid = fork();
	assert_true(child.pid >= 0);
	if (child.pid == 0) {
		close(pair[0]);
		if (become)
			become();
		while (write(pair[1], &byte, 1) == 1 && read(pair[1], &byte, 1) == 1)
			;
		_exit(0);
	}
	close(pair[1]);
	child.fd = pair[0];
	assert_int_equal(read(child.fd, &byte, 1), 1);
	return child;
}

static void end(struct child *child)
{
	close(child->fd);
	assert_int_equal(waitpid(child->pid, NULL, 0), child->pid);
}

static struct process describe(const struct child *child, uid_t uid)
{
	struct process p = {.pid = child->pid, .uid = uid, .pidfd = pidfd_open(child->pid, 0)};

	assert_int_equal(process_describe(&p), 0);
	return p;
}

static void all(void)
{
	(void)!setresuid(ALICE, ALICE, ALICE);
}

static void other_real(void)
{
	(void)!setresuid(BOB, ALICE, ALICE);
}

static void other_effective(void)
{
	(void)!setresuid(ALICE, BOB, ALICE);
	setfsuid(ALICE);
}

static void other_saved(void)
{
	(void)!setresuid(ALICE, ALICE, BOB);
}

static void other_fs(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	prctl(PR_SET_KEEPCAPS, 1);
	all();
	syscall(SYS_capget, &header, data);
	data[0].effective = data[0].permitted;
	syscall(SYS_capset, &header, data);
	setfsuid(BOB);
}

/* It is the one that connected only with that user in each of its four uids. */
static void test_uids(void **state)
{
	static void (*const others[])(void) = {other_real, other_effective, other_saved, other_fs};
	struct process p;
	struct child child;

	if (getuid() != 0)
		skip();
	child = spawn(all);
	p = describe(&child, ALICE);
	assert_true(process_is_same(&p));
	p.uid = BOB;
	assert_false(process_is_same(&p));
	p.uid = ALICE;
	p.start_time--;
	assert_false(process_is_same(&p));
	process_clear(&p);
	end(&child);
	for (size_t i = 0; i < ELEMENTS(others); i++) {
		child = spawn(others[i]);
		p = describe(&child, ALICE);
		assert_false(process_is_same(&p));
		process_clear(&p);
		end(&child);
	}
}

static void test_ended(void **state)
{
	struct child child = spawn(NULL);
	struct process p = describe(&child, getuid()),
		       again = {.pid = p.pid, .start_time = p.start_time};

	assert_true(process_is_alive(&p));
	assert_true(process_is_same(&p));
	assert_int_equal(process_reopen(&again), 0);
	assert_true(process_is_alive(&again));
	process_clear(&again);
	again = (struct process){.pid = p.pid, .start_time = p.start_time + 1};
	assert_int_equal(process_reopen(&again), 0);
	assert_false(process_is_alive(&again));
	process_clear(&again);
	end(&child);
	assert_false(process_is_alive(&p));
	assert_false(process_is_same(&p));
	assert_int_equal(process_describe(&p), -ESRCH);
	process_clear(&p);
}

static void join_crew(void)
{
	gid_t groups[] = {CREW, CREW + 1};

	(void)!setgroups(2, groups);
	(void)!setresgid(BOB, BOB, BOB);
}

/* What the kernel says of who is at the other end of a socket. */
static void test_peer(void **state)
{
	struct process p, copy;
	int pair[2], status;
	pid_t pid;

	if (getuid() != 0)
		skip();
	pid = fork();
	if (pid == 0) {
		join_crew();
		all();
		if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0 ||
			process_from_socket(pair[0], &p) < 0)
			_exit(1);
		if (p.pid != getpid() || p.uid != ALICE || p.gid != BOB || p.n_groups != 2 ||
			p.groups[0] != CREW || p.groups[1] != CREW + 1 || !process_is_alive(&p))
			_exit(2);
		if (process_copy(&p, &copy) < 0 || copy.pid != p.pid || copy.gid != BOB ||
			copy.n_groups != 2 || copy.groups == p.groups ||
			copy.groups[1] != CREW + 1 || copy.pidfd == p.pidfd)
			_exit(3);
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void name_oddly(void)
{
	prctl(PR_SET_NAME, "a) R 1 2\xff");
}

static void test_odd_name(void **state)
{
	struct child child = spawn(name_oddly);
	struct process p = describe(&child, getuid());

	assert_string_equal(p.comm, "a) R 1 2?");
	assert_true(process_is_same(&p));
	assert_int_equal(process_is_stopped(child.pid), 0);
	kill(child.pid, SIGSTOP);
	assert_int_equal(waitpid(child.pid, NULL, WUNTRACED), child.pid);
	assert_int_equal(process_is_stopped(child.pid), 1);
	kill(child.pid, SIGCONT);
	process_clear(&p);
	end(&child);
}

static void test_manager(void **state)
{
	char text[16];

	unsetenv("SYSTEMD_EXEC_PID");
	unsetenv("MANAGERPID");
	assert_true(process_is_manager(1));
	if (getppid() != 1)
		assert_false(process_is_manager(getppid()));
	snprintf(text, sizeof(text), "%d", getpid());
	setenv("SYSTEMD_EXEC_PID", text, true);
	assert_true(process_is_manager(getppid()));
	assert_false(process_is_manager(getpid()));
	snprintf(text, sizeof(text), "%d", getpid() + 1);
	setenv("SYSTEMD_EXEC_PID", text, true);
	if (getppid() != 1)
		assert_false(process_is_manager(getppid()));
	snprintf(text, sizeof(text), "%d", getppid());
	setenv("MANAGERPID", text, true);
	assert_true(process_is_manager(getppid()));
	unsetenv("SYSTEMD_EXEC_PID");
	unsetenv("MANAGERPID");
}

static void test_stopped(void **state)
{
	struct child child = spawn(NULL);
	int status;

	assert_int_equal(process_wait_stopped(child.pid, 0), -ETIMEDOUT);
	assert_int_equal(kill(child.pid, SIGSTOP), 0);
	assert_int_equal(waitpid(child.pid, &status, WUNTRACED), child.pid);
	assert_int_equal(process_is_stopped(child.pid), 1);
	assert_int_equal(process_wait_stopped(child.pid, 0), 0);
	kill(child.pid, SIGCONT);
	end(&child);
	assert_int_equal(process_is_stopped(child.pid), -ESRCH);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_uids),
		cmocka_unit_test(test_ended),
		cmocka_unit_test(test_peer),
		cmocka_unit_test(test_odd_name),
		cmocka_unit_test(test_manager),
		cmocka_unit_test(test_stopped),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
