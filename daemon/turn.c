/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "turn.h"

#include "macro.h"

struct slice slice_begin(void)
{
	return (struct slice){.end_usec = now_usec() + SLICE_USEC};
}

bool slice_is_over(const struct slice *slice)
{
	return now_usec() >= slice->end_usec;
}

uint64_t turn_cpu_usec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * USEC_PER_SEC + (uint64_t)ts.tv_nsec / 1000;
}

int turn_add_source(
	sd_event *event, sd_event_source **ret, sd_event_time_handler_t handler, void *userdata)
{
	/* The time has always come; and a time is noticed anew in each turn. */
	int r = sd_event_add_time(event, ret, CLOCK_MONOTONIC, 0, 1, handler, userdata);

	return r < 0 ? r : sd_event_source_set_enabled(*ret, SD_EVENT_OFF);
}

#ifndef PINBROKER_MEASURE_TURNS

int turn_loop(sd_event *event)
{
	return sd_event_loop(event);
}

#else

#include <execinfo.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

/* Sanitizers make everything slower. */
#define MAX_USEC            (TURN_MAX_USEC * PINBROKER_MEASURE_TURNS)

/* Interrupts and the machine's host take some milliseconds of whoever runs, every now and then. */
#define STOLEN_USEC         (4 * MAX_USEC)
#define BETWEEN_STOLEN_USEC (10 * USEC_PER_SEC)

/* Where the turn was when half of its time was up, which the kernel's tick may let be seen late. */
static struct {
	void *addresses[64];
	int n;
} found;

static void on_half_time(int sig)
{
	int e = errno;

	found.n = backtrace(found.addresses, ELEMENTS(found.addresses));
	errno = e;
}

static int make_timer(timer_t *ret)
{
	struct sigaction action = {.sa_handler = on_half_time, .sa_flags = SA_RESTART};
	struct sigevent event = {
		.sigev_notify = SIGEV_THREAD_ID,
		.sigev_signo = SIGPROF,
		._sigev_un._tid = gettid(),
	};

	(void)backtrace(found.addresses, 1); /* loads what it needs */
	return sigaction(SIGPROF, &action, NULL) < 0 ||
			       timer_create(CLOCK_THREAD_CPUTIME_ID, &event, ret) < 0
		       ? -errno
		       : 0;
}

static void set_timer(const timer_t *timer, long usec)
{
	struct itimerspec spec = {.it_value.tv_nsec = usec * 1000};

	if (timer)
		(void)timer_settime(*timer, 0, &spec, NULL);
}

/* Whether it may have been the machine: not a second time within a while. */
static bool is_stolen(uint64_t took_usec)
{
	static uint64_t last_usec;
	uint64_t now = turn_cpu_usec();
	bool recent = last_usec != 0 && now - last_usec < BETWEEN_STOLEN_USEC;

	last_usec = now;
	return took_usec <= STOLEN_USEC && !recent;
}

static void check(uint64_t begin_usec, const char *what)
{
	uint64_t took = turn_cpu_usec() - begin_usec;
	char line[200];
	int n;

	if (took <= MAX_USEC)
		return;
	/* the log's thread would not get to it any more */
	n = snprintf(line, sizeof(line),
		"pinbrokerd: %s of the loop took %u us of CPU, of %u at most.\n", what,
		(unsigned)took, (unsigned)MAX_USEC);
	(void)!write(STDERR_FILENO, line, (size_t)n);
	backtrace_symbols_fd(found.addresses, found.n, STDERR_FILENO);
	if (!is_stolen(took))
		abort();
}

static int run_once(sd_event *event, const timer_t *timer)
{
	uint64_t begin = turn_cpu_usec();
	int r;

	r = sd_event_prepare(event);
	check(begin, "Preparing a turn");
	if (r == 0)
		r = sd_event_wait(event, UINT64_MAX);
	if (r <= 0)
		return r;
	found.n = 0;
	set_timer(timer, MAX_USEC / 2);
	begin = turn_cpu_usec();
	r = sd_event_dispatch(event);
	set_timer(timer, 0);
	check(begin, "A turn");
	return r;
}

int turn_loop(sd_event *event)
{
	timer_t timer;
	/* without one (RLIMIT_SIGPENDING) it is not seen what takes long, but how long */
	bool timed = make_timer(&timer) >= 0;
	int r = 0, code;

	while (r >= 0 && sd_event_get_state(event) != SD_EVENT_FINISHED)
		r = run_once(event, timed ? &timer : NULL);
	if (timed)
		timer_delete(timer);
	if (r >= 0)
		r = sd_event_get_exit_code(event, &code);
	return r < 0 ? r : code;
}

#endif
