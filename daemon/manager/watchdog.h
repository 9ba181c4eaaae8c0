/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/*
 * Whoever hangs is to be ended, and followed by the next run, before the kernel takes a broken lease. The
 * service manager sees to that by the unit's times, which suit a lease-break-time of 45 s. Where it is shorter
 * the manager is asked to watch more closely, which it does once the service is ready, and a timer of our own
 * ends the process, too: by SIGKILL, as whoever hangs may have all other signals blocked.
 */
struct watchdog {
	uint64_t asked_usec; /* how often the manager wants to hear of us; 0: never, it does not restart us */
	uint64_t usec;       /* how often it is to, as the kernel's patience is */
	uint64_t break_usec; /* that is */
	timer_t timer;
	bool has_timer;
};

void watchdog_open(struct watchdog *watchdog);
/* What follows ends by itself, or by the manager's word. */
void watchdog_close(struct watchdog *watchdog);
/* Here we are, and get on. ready: from now on the manager watches, too. */
void watchdog_feed(struct watchdog *watchdog, bool ready);
/* Looks how patient the kernel is by now. True: `usec` is another than before. */
bool watchdog_look(struct watchdog *watchdog, bool ready);
