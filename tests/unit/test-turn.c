/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/turn.h"
#include "protocol/macro.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cmocka.h>

/* What a build that measures the loop's turns makes of them. */

#define MAX_USEC (TURN_MAX_USEC * PINBROKER_MEASURE_TURNS)

struct work {
	uint64_t usec; /* of CPU time */
	bool stolen;   /* the thread is not seen meanwhile, as if its host ran something else */
};

static int on_turn(sd_event_source *source, uint64_t usec, void *userdata)
{
	const struct work *work = userdata;
	uint64_t begin = turn_cpu_usec();
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGPROF);
	sigprocmask(work->stolen ? SIG_BLOCK : SIG_UNBLOCK, &set, NULL);
	while (turn_cpu_usec() - begin < work->usec)
		;
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	return sd_event_exit(sd_event_source_get_event(source), 0);
}

static _Noreturn void run(struct work work)
{
	static const struct rlimit no_core;
	sd_event_source *source;
	sd_event *event;
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);

	(void)setrlimit(RLIMIT_CORE, &no_core);
	(void)dup2(null, STDERR_FILENO);
	if (sd_event_new(&event) < 0 || turn_add_source(event, &source, on_turn, &work) < 0 ||
		sd_event_source_set_enabled(source, SD_EVENT_ONESHOT) < 0)
		_exit(EXIT_FAILURE);
	_exit(turn_loop(event) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}

/* Returns the signal that ended it, or 0. */
static int end_of(struct work work)
{
	pid_t pid = fork();
	int status;

	if (pid == 0)
		run(work);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (WIFSIGNALED(status))
		return WTERMSIG(status);
	assert_int_equal(WEXITSTATUS(status), EXIT_SUCCESS);
	return 0;
}

static void test_short(void **state)
{
	assert_int_equal(end_of((struct work){}), 0);
	assert_int_equal(end_of((struct work){.usec = MAX_USEC / 2}), 0);
}

/* Whatever the kernel counts besides, it has worked for too long. */
static void test_long(void **state)
{
	assert_int_equal(end_of((struct work){.usec = 3 * MAX_USEC}), SIGABRT);
}

/* The kernel counts it, and it may not be the turn's. */
static void test_stolen(void **state)
{
	for (int i = 0; i < 10; i++)
		assert_int_equal(end_of((struct work){.usec = MAX_USEC + 3000, .stolen = true}), 0);
	assert_int_equal(end_of((struct work){.usec = 5 * MAX_USEC, .stolen = true}), SIGABRT);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_short),
		cmocka_unit_test(test_long),
		cmocka_unit_test(test_stolen),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
