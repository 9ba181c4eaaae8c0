/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

/*
 * One turn of the loop does a bounded amount of work, whatever a client holds: TURN_MAX_USEC of CPU
 * at most. What has more to do does a slice of it, and goes on in its next turn. A build with
 * -Dturns=true measures every turn, and aborts after one that took longer.
 */
#define TURN_MAX_USEC 5000
#define SLICE_USEC    1000
/* After a slice of what comes before everything else: so it takes half of the loop's time at most. */
#define SLICE_PAUSE_USEC 1000

/* CPU time of the calling thread. */
uint64_t turn_cpu_usec(void);

/* Runs the loop to its end, like sd_event_loop(). */
int turn_loop(sd_event *event);

/* Part of a turn's work. slice_is_over() is asked after each step, which should take far less than a slice. */
struct slice {
	uint64_t end_usec;
};

struct slice slice_begin(void);
bool slice_is_over(const struct slice *slice);

/* A source, not enabled yet, for what is done in slices: while it is enabled, its handler is called again and
 * again, in turn with everything that is as urgent. A deferred source would come before all that. */
int turn_add_source(sd_event *event, sd_event_source **ret, sd_event_time_handler_t handler,
	void *userdata);
