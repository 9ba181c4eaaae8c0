/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/freeze.h"
#include "protocol/macro.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cmocka.h>

#define NOBODY       65534
#define TIMEOUT_USEC (10 * USEC_PER_SEC)

/* Processes that have the context, an eventfd, and answer each byte with that byte. */
struct world {
	int context;
	struct process client;
	pid_t child;
	int client_socket, child_socket;
};

static void (*before_stop)(void), (*before_open)(void); /* once */

static void run_once(void (**f)(void))
{
	void (*g)(void) = *f;

	*f = NULL;
	if (g)
		g();
}

int __real_process_is_stopped(pid_t pid);
int __wrap_process_is_stopped(pid_t pid);
int __real_pidfd_open(pid_t pid, unsigned flags);
int __wrap_pidfd_open(pid_t pid, unsigned flags);

int __wrap_process_is_stopped(pid_t pid)
{
	int r = __real_process_is_stopped(pid);

	run_once(&before_stop);
	return r;
}

int __wrap_pidfd_open(pid_t pid, unsigned flags)
{
	run_once(&before_open);
	return __real_pidfd_open(pid, flags);
}

static pid_t spawn(int *ret_socket)
{
	int pair[2];
	char byte;
	pid_t pid;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (read(pair[1], &byte, 1) == 1)
			(void)!write(pair[1], &byte, 1);
		_exit(0);
	}
	close(pair[1]);
	*ret_socket = pair[0];
	return pid;
}

static void end(pid_t pid, int fd)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	close(fd);
}

static void assert_runs(int fd)
{
	char byte = 'a';

	assert_int_equal(write(fd, &byte, 1), 1);
	assert_int_equal(read(fd, &byte, 1), 1);
}

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	w->context = eventfd(0, EFD_CLOEXEC);
	w->client = (struct process){.uid = getuid()};
	w->client.pid = spawn(&w->client_socket);
	w->client.pidfd = pidfd_open(w->client.pid, 0);
	w->child = spawn(&w->child_socket);
	assert_true(w->context >= 0 && w->client.pidfd >= 0);
	*state = w;
	return 0;
}

static int teardown(void **state)
{
	struct world *w = *state;

	end(w->client.pid, w->client_socket);
	end(w->child, w->child_socket);
	close(w->client.pidfd);
	close(w->context);
	free(w);
	return 0;
}

static void test_everybody(void **state)
{
	struct world *w = *state;
	struct holders holders;

	assert_int_equal(holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &holders), 0);
	assert_int_equal(process_is_stopped(w->client.pid), 1);
	assert_int_equal(process_is_stopped(w->child), 1);
	holders_continue(&holders);
	assert_runs(w->client_socket);
	assert_runs(w->child_socket);
}

static void test_client_dead(void **state)
{
	struct world *w = *state;
	struct holders holders;

	kill(w->client.pid, SIGKILL);
	waitpid(w->client.pid, NULL, 0);
	assert_int_equal(holders_stop(w->context, &w->client, false, TIMEOUT_USEC, &holders), 0);
	assert_int_equal(process_is_stopped(w->child), 1);
	holders_continue(&holders);
	assert_runs(w->child_socket);
}

static void test_without_context(void **state)
{
	struct world *w = *state;
	int other = eventfd(0, EFD_CLOEXEC);
	struct holders holders;

	/* Whoever has another one of that kind is left alone. */
	assert_int_equal(holders_stop(other, &w->client, false, TIMEOUT_USEC, &holders), 0);
	assert_int_equal(process_is_stopped(w->child), 0);
	holders_continue(&holders);
	close(other);
}

static void test_stopped_before(void **state)
{
	struct world *w = *state;
	struct holders holders;

	kill(w->client.pid, SIGSTOP);
	assert_int_equal(waitpid(w->client.pid, NULL, WUNTRACED), w->client.pid);
	assert_int_equal(holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &holders), 0);
	holders_continue(&holders);
	assert_runs(w->child_socket);
	assert_int_equal(process_is_stopped(w->client.pid), 1);
}

/* The last of two to be done with a process lets it go on, whoever has stopped it. */
static void test_two_at_a_time(void **state)
{
	struct world *w = *state;
	struct holders first, second;

	assert_int_equal(holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &first), 0);
	assert_int_equal(holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &second), 0);
	holders_continue(&first);
	assert_int_equal(process_is_stopped(w->client.pid), 1);
	assert_int_equal(process_is_stopped(w->child), 1);
	holders_continue(&second);
	assert_runs(w->client_socket);
	assert_runs(w->child_socket);
}

static void test_not_allowed(void **state)
{
	struct world *w = *state;
	struct holders holders;

	if (getuid() != 0)
		skip();
	w->client.uid = NOBODY;
	assert_int_equal(
		holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &holders), -EPERM);
	holders_continue(&holders);
	assert_runs(w->client_socket);
	assert_runs(w->child_socket);
}

/* One whose uids are these, and which becomes root, or lets go of the context, at a byte. */
static pid_t spawn_as(uid_t real, uid_t effective, uid_t saved, int context, int *ret_socket)
{
	int pair[2];
	char byte;
	pid_t pid;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		(void)!setresuid(real, effective, saved);
		(void)!write(pair[1], "", 1);
		while (read(pair[1], &byte, 1) == 1) {
			if (byte == 'r')
				(void)!setresuid(0, 0, 0);
			if (byte == 'c')
				close(context);
			(void)!write(pair[1], &byte, 1);
		}
		_exit(0);
	}
	close(pair[1]);
	assert_int_equal(read(pair[0], &byte, 1), 1);
	*ret_socket = pair[0];
	return pid;
}

/* As kill(2): the real and the saved uid decide, and not the effective one. */
static void test_uids(void **state)
{
	static const struct {
		uid_t real, effective, saved;
		int result;
	} cases[] = {
		{ NOBODY, NOBODY, NOBODY, 0 },
		{ NOBODY, 0, 0, 0 },
		{ 0, 0, NOBODY, 0 },
		{ 0, NOBODY, 0, -EPERM },
		{ 0, 0, 0, -EPERM },
	};
	int context, fd;

	if (getuid() != 0)
		skip();
	for (size_t i = 0; i < ELEMENTS(cases); i++) {
		struct process client = { .uid = NOBODY };
		struct holders holders;
		pid_t pid;

		context = eventfd(0, EFD_CLOEXEC);
		pid = spawn_as(cases[i].real, cases[i].effective, cases[i].saved, context, &fd);
		assert_int_equal(holders_stop(context, &client, false, TIMEOUT_USEC, &holders),
			cases[i].result);
		assert_int_equal(process_is_stopped(pid), cases[i].result == 0);
		holders_continue(&holders);
		assert_runs(fd);
		end(pid, fd);
		close(context);
	}
}

static int change_fd;
static char change;

static void tell_to_change(void)
{
	char byte;

	assert_int_equal(write(change_fd, &change, 1), 1);
	assert_int_equal(read(change_fd, &byte, 1), 1);
}

/* It becomes another user while it is looked at. */
static void test_another_user_by_then(void **state)
{
	int context = eventfd(0, EFD_CLOEXEC), fd;
	struct process client = { .uid = NOBODY };
	struct holders holders;
	pid_t pid;

	if (getuid() != 0)
		skip();
	pid = spawn_as(NOBODY, NOBODY, 0, context, &fd);
	change_fd = fd;
	change = 'r';
	before_stop = tell_to_change;
	/* its saved uid is what lets it, and is root's: only the real one is the client's */
	assert_int_equal(holders_stop(context, &client, false, TIMEOUT_USEC, &holders), -EPERM);
	assert_int_equal(process_is_stopped(pid), 0);
	holders_continue(&holders);
	assert_runs(fd);
	end(pid, fd);
	close(context);
}

/* It lets go of the context while it is looked at: it might be another process by then. */
static void test_no_holder_by_then(void **state)
{
	int context = eventfd(0, EFD_CLOEXEC), fd;
	struct process client = { .uid = getuid() };
	struct holders holders;
	pid_t pid;

	pid = spawn_as(getuid(), getuid(), getuid(), context, &fd);
	change_fd = fd;
	change = 'c';
	before_open = tell_to_change;
	assert_int_equal(holders_stop(context, &client, false, TIMEOUT_USEC, &holders), 0);
	assert_int_equal(holders.n, 0);
	assert_int_equal(process_is_stopped(pid), 0);
	holders_continue(&holders);
	end(pid, fd);
	close(context);
}

/* What a daemon that was killed has stopped goes on; what its user may not stop is left alone. */
static void test_left(void **state)
{
	int context, fd;

	if (getuid() != 0)
		skip();
	for (unsigned i = 0; i < 2; i++) {
		uid_t uid = i == 0 ? NOBODY : 0;
		struct process client = { .uid = NOBODY, .pidfd = -1 };
		pid_t pid;

		context = eventfd(0, EFD_CLOEXEC);
		pid = spawn_as(uid, uid, uid, context, &fd);
		kill(pid, SIGSTOP);
		assert_int_equal(waitpid(pid, NULL, WUNTRACED), pid);
		holders_continue_left(context, &client);
		if (i == 0)
			assert_runs(fd);
		else
			assert_int_equal(process_is_stopped(pid), 1);
		end(pid, fd);
		close(context);
	}
}

/* A process that forks on and on while it is being stopped. */
static void test_forking(void **state)
{
	struct world *w = *state;
	struct holders holders;
	pid_t forker = fork();

	if (forker == 0) {
		setpgid(0, 0);
		for (int i = 0; i < 1000; i++)
			if (fork() == 0)
				pause();
		pause();
	}
	setpgid(forker, forker);
	assert_int_equal(holders_stop(w->context, &w->client, true, TIMEOUT_USEC, &holders), 0);
	assert_int_equal(process_is_stopped(forker), 1);
	holders_continue(&holders);
	kill(-forker, SIGKILL);
	waitpid(forker, NULL, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_everybody, setup, teardown),
		cmocka_unit_test_setup_teardown(test_client_dead, setup, teardown),
		cmocka_unit_test_setup_teardown(test_without_context, setup, teardown),
		cmocka_unit_test_setup_teardown(test_stopped_before, setup, teardown),
		cmocka_unit_test_setup_teardown(test_two_at_a_time, setup, teardown),
		cmocka_unit_test_setup_teardown(test_not_allowed, setup, teardown),
		cmocka_unit_test(test_uids),
		cmocka_unit_test(test_another_user_by_then),
		cmocka_unit_test(test_no_holder_by_then),
		cmocka_unit_test(test_left),
		cmocka_unit_test_setup_teardown(test_forking, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
