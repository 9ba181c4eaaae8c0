/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/process.h"
#include "daemon/kernel/search.h"
#include "protocol/macro.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cmocka.h>

/* Who has a description, in whatever way, and of whom that cannot be seen. */

#define KTHREADD 2
#define USER     54399 /* nobody else's */

static int ring_new(void)
{
	struct io_uring_params params = {};

	return (int)syscall(SYS_io_uring_setup, 8, &params);
}

/* A process that does what is to be seen of it, and then stays. */
static pid_t spawn(void (*f)(int fd), int fd)
{
	int fds[2];
	pid_t pid;
	char c;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		f(fd);
		(void)!write(fds[1], "", 1);
		for (;;)
			pause();
	}
	close(fds[1]);
	assert_int_equal(read(fds[0], &c, 1), 1);
	close(fds[0]);
	return pid;
}

static void end(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static void do_nothing(int fd)
{
}

static void do_close(int fd)
{
	close(fd);
}

static void do_map(int fd)
{
	if (mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED)
		_exit(1);
	close(fd);
}

static void *keep_table(void *userdata)
{
	if (unshare(CLONE_FILES) < 0)
		_exit(1);
	pthread_barrier_wait(userdata);
	for (;;)
		pause();
	return NULL;
}

static void do_keep_in_thread(int fd)
{
	static pthread_barrier_t barrier;
	pthread_t thread;

	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&thread, NULL, keep_table, &barrier);
	pthread_barrier_wait(&barrier);
	close(fd);
}

static int remember(pid_t pid, void *userdata)
{
	*(pid_t *)userdata = pid;
	return 1;
}

static void expect_found(void (*f)(int fd), int fd, bool is_found)
{
	pid_t pid = spawn(f, fd), found = 0;
	struct search search = { .fd = fd, .found = remember, .userdata = &found };

	assert_int_equal(search_process(pid, fd), is_found);
	assert_int_equal(search_run(&search), is_found);
	assert_int_equal(found, is_found ? pid : 0);
	end(pid);
	close(fd);
}

static void test_descriptor(void **state)
{
	expect_found(do_nothing, eventfd(0, EFD_CLOEXEC), true);
	expect_found(do_nothing, ring_new(), true);
}

static void test_closed(void **state)
{
	expect_found(do_close, eventfd(0, EFD_CLOEXEC), false);
	expect_found(do_close, ring_new(), false);
}

static void test_mapping(void **state)
{
	expect_found(do_map, ring_new(), true);
}

static void test_table(void **state)
{
	expect_found(do_keep_in_thread, eventfd(0, EFD_CLOEXEC), true);
	expect_found(do_keep_in_thread, ring_new(), true);
}

/* Another one of the same kind is not the same. */
static void test_other(void **state)
{
	int ring = ring_new(), event = eventfd(0, EFD_CLOEXEC);
	int other_ring = ring_new(), other_event = eventfd(0, EFD_CLOEXEC);
	pid_t pid = fork();

	if (pid == 0) {
		close(other_ring);
		close(other_event);
		for (;;)
			pause();
	}
	/* it closes them in its own time */
	while (search_process(pid, other_ring) > 0 || search_process(pid, other_event) > 0)
		sched_yield();
	assert_int_equal(search_process(pid, ring), 1);
	assert_int_equal(search_process(pid, event), 1);
	end(pid);
	for (int fd = ring; fd <= other_event; fd++)
		close(fd);
}

/* What has ended, and what is the kernel's, has nothing: there is no need to look into it. */
static void test_nothing_to_see(void **state)
{
	int fd = eventfd(0, EFD_CLOEXEC);
	pid_t zombie = fork();
	siginfo_t info;

	if (zombie == 0)
		_exit(0);
	assert_int_equal(waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT), 0);
	assert_int_equal(search_process(zombie, fd), 0);
	waitpid(zombie, NULL, 0);
	assert_int_equal(search_process(zombie, fd), 0);
	assert_int_equal(search_process(KTHREADD, fd), 0);
	close(fd);
}

static void do_hide(int fd)
{
	if (prctl(PR_SET_DUMPABLE, 0) < 0)
		_exit(1);
}

static int seen_by_user(int fd)
{
	struct process holder = { .pid = getpid(), .uid = USER }, stranger = { .pid = INT32_MAX, .uid = USER + 1 };
	pid_t found = 0, pid = spawn(do_hide, fd);
	struct search search = { .fd = fd, .holder = &holder, .found = remember, .userdata = &found };
	int wrong = 0;

	wrong |= search_process(pid, fd) >= 0 ? 1 : 0;
	wrong |= search_run(&search) != 0 || search.unseen != pid ? 2 : 0;
	/* with others' pins it has nothing to do */
	search.holder = &stranger;
	wrong |= search_run(&search) != 0 || search.unseen != 0 ? 4 : 0;
	end(pid);
	search.holder = &holder;
	wrong |= search_run(&search) != 0 || search.unseen != 0 ? 8 : 0;
	return wrong;
}

/* What cannot be looked into is no find, and no answer either. */
static void test_unseen(void **state)
{
	int fd = eventfd(0, EFD_CLOEXEC), status;
	pid_t user;

	if (getuid() != 0)
		skip();
	user = fork();
	if (user == 0) {
		if (setresuid(USER, USER, USER) < 0 || prctl(PR_SET_DUMPABLE, 1) < 0)
			_exit(64);
		_exit(seen_by_user(fd));
	}
	waitpid(user, &status, 0);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	close(fd);
}

/* The first thread has ended, and with it the program that /proc shows; the others go on. */
static void *say_when_alone(void *userdata)
{
	struct process_stat stat;

	do
		sched_yield();
	while (process_read_stat(getpid(), getpid(), &stat) < 0 || stat.state != 'Z');
	(void)!write(*(int *)userdata, "", 1);
	for (;;)
		pause();
	return NULL;
}

static void test_first_thread_ended(void **state)
{
	static int fds[2]; /* outlives the first thread's stack */
	int fd = eventfd(0, EFD_CLOEXEC);
	pid_t pid, found = 0;
	struct search search = { .fd = fd, .found = remember, .userdata = &found };
	char c;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0) {
		pthread_t thread;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pthread_create(&thread, NULL, say_when_alone, &fds[1]);
		pthread_exit(NULL);
	}
	assert_int_equal(read(fds[0], &c, 1), 1);
	assert_int_equal(search_run(&search), 1);
	assert_int_equal(found, pid);
	end(pid);
	close(fds[0]);
	close(fds[1]);
	close(fd);
}

static void do_become_user(int fd)
{
	if (setresuid(USER, USER, USER) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		_exit(1);
}

/* Whose descriptors may be listed need not be one of whom may be seen what they are: root in a container. */
static void test_listed_only(void **state)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct process holder = { .pid = INT32_MAX, .uid = USER };
	int fd = eventfd(0, EFD_CLOEXEC);
	struct __user_cap_data_struct all[2], some[2];
	struct search search = { .fd = fd, .holder = &holder, .found = remember };
	pid_t pid;

	if (getuid() != 0)
		skip();
	pid = spawn(do_become_user, fd);
	search.userdata = &pid;
	assert_int_equal(syscall(SYS_capget, &header, all), 0);
	memcpy(some, all, sizeof(all));
	some[0].effective &= ~(1U << CAP_SYS_PTRACE);
	assert_int_equal(syscall(SYS_capset, &header, some), 0);
	assert_int_equal(search_process(pid, fd), -EACCES);
	assert_int_equal(search_run(&search), 0);
	assert_int_equal(syscall(SYS_capset, &header, all), 0);
	assert_int_equal(search.unseen, pid);
	end(pid);
	close(fd);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_descriptor),
		cmocka_unit_test(test_closed),
		cmocka_unit_test(test_mapping),
		cmocka_unit_test(test_table),
		cmocka_unit_test(test_other),
		cmocka_unit_test(test_nothing_to_see),
		cmocka_unit_test(test_unseen),
		cmocka_unit_test(test_first_thread_ended),
		cmocka_unit_test(test_listed_only),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
