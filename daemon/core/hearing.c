/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/hearing.h"

#include <inttypes.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

#define COMPLAIN_USEC (10 * USEC_PER_SEC)

struct hearing {
	struct broker *broker;
	struct sentinel sentinel;
	sd_event_source *signal, *overflow, *hints, *sweep;
	uint64_t n_replaced;    /* sentinels that were killed or stopped */
	uint64_t complain_usec; /* … or missed something, of which nothing is said before */
	uint64_t sweep_after;   /* a sweep is under way, and has come to this file */
	uint64_t sweep_usec;    /* it goes on not before this */
	bool sweep_inspects;    /* it looks at what has been done to shared leases, in its second round */
	bool sweep_again;       /* another one is to follow */
};

/* ---- The sweep ---- */

/* Looks at some files; false: these were the last. */
static bool sweep_some(struct hearing *h)
{
	struct slice slice = slice_begin();

	do {
		struct file *file = broker_next_file(h->broker, h->sweep_after);

		if (!file)
			return false;
		h->sweep_after = file->id;
		if (h->sweep_inspects) {
			sharing_look(file);
			continue;
		}
		if (file->n_pins > 0)
			file_keep(file);
		file_update(file);
	} while (!slice_is_over(&slice));
	return true;
}

/* The first round is for those who may be held up, and quick. True if there is a next one. */
static bool begin_round(struct hearing *h)
{
	h->sweep_after = 0;
	h->sweep_inspects = !h->sweep_inspects;
	if (h->sweep_inspects)
		return true;
	if (!h->sweep_again)
		return false;
	h->sweep_again = false;
	return true;
}

static int arm_sweep(struct hearing *h)
{
	int r = sd_event_source_set_time(h->sweep, h->sweep_usec);

	return r < 0 ? r : sd_event_source_set_enabled(h->sweep, SD_EVENT_ONESHOT);
}

static int on_sweep(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct hearing *h = userdata;
	bool more = sweep_some(h) || begin_round(h);

	h->sweep_usec = now_usec() + SLICE_PAUSE_USEC;
	return more ? arm_sweep(h) : 0;
}

void hearing_sweep(struct hearing *h)
{
	int enabled;

	/* One that is under way is finished first, so that it gets to the last file however many
	 * are asked for. */
	if (h->sweep_after > 0 || h->sweep_inspects)
		h->sweep_again = true;
	else if (sd_event_source_get_enabled(h->sweep, &enabled) == 0)
		(void)arm_sweep(h);
}

/* ---- Signals and hints ---- */

/* Clients can bring on what these tell of: said now and then. */
static bool may_complain(struct hearing *h)
{
	uint64_t now = now_usec();

	if (now < h->complain_usec)
		return false;
	h->complain_usec = now + COMPLAIN_USEC;
	return true;
}

static void note_overflow(struct hearing *h)
{
	h->broker->n_overflows++;
	if (may_complain(h))
		log_warning("The signal queue overflowed (%" PRIu64 " time%s so far): looking at "
			    "every lease. The limit is RLIMIT_SIGPENDING (LimitSIGPENDING=).",
			h->broker->n_overflows, PLURAL(h->broker->n_overflows));
	hearing_sweep(h);
}

static void note_replaced(struct hearing *h, bool deaf)
{
	h->n_replaced++;
	if (may_complain(h))
		log_warning("The process that hears of breaks of shared leases was killed or "
			    "stopped (%" PRIu64 " time%s so far)%s: looking at every lease.",
			h->n_replaced, PLURAL(h->n_replaced), deaf ? ", and another one cannot be started" : "");
	hearing_sweep(h);
}

/* The signal's number can be a client's choice, si_fd can be one, too, or stale: it says where to
 * look, and what no lease confirms can be about any. */
static void follow_signal(struct hearing *h, int signal, int fd)
{
	struct file *file = broker_find_lease_fd(h->broker, fd);

	if (file && signal != LEASE_SIGNAL)
		sharing_look(file); /* before it is let go, and with it the trace of who did it */
	else if (file)
		file_update(file);
	if (signal == SIGIO) /* what the kernel sends when the queue is full */
		note_overflow(h);
	else if (!file || signal != LEASE_SIGNAL || !lease_hear(&file->lease) ||
		 h->broker->stale_signals)
		hearing_sweep(h);
}

static int on_signal(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	follow_signal(userdata, (int)si->ssi_signo, si->ssi_fd);
	return 0;
}

static int on_overflow(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	note_overflow(userdata);
	return 0;
}

static void follow_hint(struct hearing *h, const struct hint *hint)
{
	switch (hint->kind) {
	case HINT_SIGNAL:
		follow_signal(h, hint->signal, hint->fd);
		break;
	case HINT_MISSED:
		note_overflow(h);
		break;
	case HINT_REPLACED:
	case HINT_DEAF:
		note_replaced(h, hint->kind == HINT_DEAF);
		break;
	case HINT_STARTED:
		break;
	}
}

/* Without it this process has to hear of shared leases as well. */
static void lose_sentinel(struct hearing *h, int error)
{
	struct file *file;
	uint64_t after = 0;

	log_errno(LOG_ERR, error,
		"The processes that hear of breaks of shared leases have ended: until pinbrokerd "
		"is "
		"restarted, a client that shares one can end or stop it by a signal");
	h->hints = sd_event_source_disable_unref(h->hints);
	sentinel_stop(&h->sentinel);
	lease_set_sentinel(0);
	while ((file = broker_next_file(h->broker, after))) {
		after = file->id;
		if (file->lease.state != LEASE_NONE)
			(void)lease_own(&file->lease);
	}
	hearing_sweep(h);
}

static int on_hints(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct hearing *h = userdata;
	struct slice slice = slice_begin();
	struct hint hint;
	int r;

	do {
		r = sentinel_receive(&h->sentinel, &hint);
		if (r > 0)
			follow_hint(h, &hint);
	} while (r > 0 && !slice_is_over(&slice));
	if (r < 0)
		lose_sentinel(h, r);
	return 0;
}

int hearing_add_sentinel(struct hearing *h, struct sentinel *sentinel, int error)
{
	int r;

	if (sentinel->fd < 0) {
		log_errno(LOG_WARNING, error,
			"Cannot start the processes that are to hear of breaks of shared leases: a "
			"client that shares one can end or stop pinbrokerd by a signal");
		return 0;
	}
	h->sentinel = *sentinel;
	sentinel->fd = -1;
	lease_set_sentinel(h->sentinel.group);
	r = sd_event_add_io(h->broker->event, &h->hints, h->sentinel.fd, EPOLLIN, on_hints, h);
	return r < 0 ? r : sd_event_source_set_priority(h->hints, SD_EVENT_PRIORITY_IMPORTANT);
}

static int block_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, LEASE_SIGNAL);
	sigaddset(&set, SIGIO);
	return sigprocmask(SIG_BLOCK, &set, NULL) < 0 ? -errno : 0;
}

/* Somebody is held up by what they are about. */
static int add_sources(struct hearing *h)
{
	sd_event *event = h->broker->event;
	int r;

	r = block_signals();
	if (r >= 0)
		r = sd_event_add_signal(event, &h->signal, LEASE_SIGNAL, on_signal, h);
	if (r >= 0)
		r = sd_event_source_set_priority(h->signal, SD_EVENT_PRIORITY_IMPORTANT);
	if (r >= 0)
		r = sd_event_add_signal(event, &h->overflow, SIGIO, on_overflow, h);
	if (r >= 0)
		r = sd_event_add_time(event, &h->sweep, CLOCK_MONOTONIC, 0, 1, on_sweep, h);
	if (r >= 0)
		r = sd_event_source_set_enabled(h->sweep, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_source_set_priority(h->sweep, SD_EVENT_PRIORITY_IMPORTANT);
	return r;
}

int hearing_new(struct broker *broker, struct hearing **ret)
{
	struct hearing *h;
	int r;

	h = calloc(1, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->broker = broker;
	h->sentinel.fd = -1;
	r = add_sources(h);
	if (r < 0) {
		hearing_free(h);
		return r;
	}
	*ret = h;
	return 0;
}

struct hearing *hearing_free(struct hearing *h)
{
	if (!h)
		return NULL;
	sd_event_source_disable_unref(h->signal);
	sd_event_source_disable_unref(h->overflow);
	sd_event_source_disable_unref(h->hints);
	sd_event_source_disable_unref(h->sweep);
	sentinel_stop(&h->sentinel);
	free(h);
	return NULL;
}
