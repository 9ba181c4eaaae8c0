/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/holders.h"
#include "daemon/macro.h"

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
		cmocka_unit_test_setup_teardown(test_forking, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
