/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/turn.h"

#include "protocol/macro.h"

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
#define MAX_USEC (TURN_MAX_USEC * PINBROKER_MEASURE_TURNS)

/*
 * What the kernel counts as a thread's CPU time is not all its own: interrupts, and a host that runs somebody
 * else, take some milliseconds now and then. So a turn is looked at every now and then by a signal, and each look
 * vouches for a little time before it: whoever is not running is not looked at. A long system call is looked
 * at once, at its end; so what nobody vouches for has a bound as well.
 */
#define LOOK_USEC    250U
#define VOUCHED_USEC (2 * LOOK_USEC)
#define STOLEN_USEC  (4 * MAX_USEC)

static struct {
	uint64_t begin_usec, looked_usec; /* CPU time */
	uint64_t seen_usec;
	void *addresses[64]; /* where it was when half of its time was up */
	int n_addresses;
} turn;

static void look(void)
{
	uint64_t now = turn_cpu_usec(), gap = now - turn.looked_usec;

	turn.looked_usec = now;
	turn.seen_usec += gap < VOUCHED_USEC ? gap : VOUCHED_USEC;
}

static void on_look(int sig)
{
	int e = errno;

	look();
	if (turn.n_addresses == 0 && turn.seen_usec > MAX_USEC / 2)
		turn.n_addresses = backtrace(turn.addresses, ELEMENTS(turn.addresses));
	errno = e;
}

static int make_timer(timer_t *ret)
{
	struct sigaction action = {.sa_handler = on_look, .sa_flags = SA_RESTART};
	struct sigevent event = {
		.sigev_notify = SIGEV_THREAD_ID,
		.sigev_signo = SIGPROF,
		._sigev_un._tid = gettid(),
	};

	(void)backtrace(turn.addresses, 1); /* loads what it needs */
	return sigaction(SIGPROF, &action, NULL) < 0 ||
			       timer_create(CLOCK_MONOTONIC, &event, ret) < 0
		       ? -errno
		       : 0;
}

static void set_timer(const timer_t *timer, long usec)
{
	struct itimerspec spec = {{0, usec * 1000}, {0, usec * 1000}};

	if (timer)
		(void)timer_settime(*timer, 0, &spec, NULL);
}

static void begin(const timer_t *timer)
{
	turn.seen_usec = 0;
	turn.n_addresses = 0;
	turn.begin_usec = turn.looked_usec = turn_cpu_usec();
	set_timer(timer, LOOK_USEC);
}

static void end(const timer_t *timer, const char *what)
{
	uint64_t took;
	char line[200];
	int n;

	set_timer(timer, 0);
	look();
	took = turn.looked_usec - turn.begin_usec;
	if (took <= MAX_USEC)
		return;
	/* the log's thread would not get to it any more */
	n = snprintf(line, sizeof(line),
		"pinbrokerd: %s of the loop took %u us of CPU, of %u at most, and was seen at work for %u.\n",
		what, (unsigned)took, (unsigned)MAX_USEC, (unsigned)turn.seen_usec);
	(void)!write(STDERR_FILENO, line, (size_t)n);
	backtrace_symbols_fd(turn.addresses, turn.n_addresses, STDERR_FILENO);
	if (turn.seen_usec > MAX_USEC || took > STOLEN_USEC)
		abort();
}

static int run_once(sd_event *event, const timer_t *timer)
{
	int r;

	begin(timer);
	r = sd_event_prepare(event);
	end(timer, "Preparing a turn");
	if (r == 0)
		r = sd_event_wait(event, UINT64_MAX);
	if (r <= 0)
		return r;
	begin(timer);
	r = sd_event_dispatch(event);
	end(timer, "A turn");
	return r;
}

int turn_loop(sd_event *event)
{
	timer_t timer;
	/* without one (RLIMIT_SIGPENDING) nobody vouches for anything */
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
