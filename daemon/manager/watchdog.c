/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/manager/watchdog.h"

#include <errno.h>
#include <signal.h>
#include <systemd/sd-daemon.h>

#include "daemon/kernel/lease.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* The lease-break-time for which the times in the unit are right, and the part of a shorter one that a hang
 * may last. */
#define PATIENCE_USEC (45 * USEC_PER_SEC)
#define PARTS         3

static void make_timer(struct watchdog *w)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL };

	if (w->has_timer)
		return;
	w->has_timer = timer_create(CLOCK_MONOTONIC, &event, &w->timer) >= 0;
	if (!w->has_timer)
		log_errno(LOG_WARNING, errno, "Cannot watch over ourselves: a hang might outlast the leases");
}

/* 0: never */
static void set_timer(struct watchdog *w, uint64_t usec)
{
	struct itimerspec its = {
		.it_value.tv_sec = (time_t)(usec / USEC_PER_SEC),
		.it_value.tv_nsec = (long)(usec % USEC_PER_SEC * 1000),
	};

	if (w->has_timer)
		(void)timer_settime(w->timer, 0, &its, NULL);
}

void watchdog_feed(struct watchdog *w, bool ready)
{
	/* The manager is to be first, as it says what it does, if it watches already. */
	uint64_t usec = ready ? w->break_usec / PARTS * 2 : w->break_usec / PARTS;

	set_timer(w, w->break_usec < PATIENCE_USEC ? usec : 0);
}

bool watchdog_look(struct watchdog *w, bool ready)
{
	uint64_t before = w->usec, break_usec = w->asked_usec > 0 ? lease_break_usec() : w->break_usec;

	if (break_usec == w->break_usec)
		return false;
	w->break_usec = break_usec;
	w->usec = w->asked_usec;
	if (break_usec < PATIENCE_USEC) {
		if (break_usec / PARTS < w->usec)
			w->usec = break_usec / PARTS;
		make_timer(w);
	}
	/* before anything that could hang, as logging */
	watchdog_feed(w, ready);
	if (break_usec < PATIENCE_USEC)
		log_notice("lease-break-time is %.0f s, where the service is made for %.0f s: this process "
			   "is ended when it hangs for %.1f s.",
			   (double)break_usec / 1e6, PATIENCE_USEC / 1e6, (double)w->usec / 1e6);
	return w->usec != before;
}

void watchdog_open(struct watchdog *w)
{
	*w = (struct watchdog){ .break_usec = PATIENCE_USEC };
	if (sd_watchdog_enabled(false, &w->asked_usec) <= 0)
		w->asked_usec = 0;
	w->usec = w->asked_usec;
	(void)watchdog_look(w, false);
}

void watchdog_close(struct watchdog *w)
{
	if (w->has_timer)
		timer_delete(w->timer);
	w->has_timer = false;
}
