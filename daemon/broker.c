/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "broker.h"

#include <assert.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>

#include "blame.h"
#include "device-monitor.h"
#include "log.h"
#include "macro.h"
#include "state.h"
#include "watch.h"

/* What the signals should have told is looked up now and then all the same: a client that shares the
 * description can redirect them. Orphaned contexts are looked at again, too. */
#define AUDIT_USEC      (5 * USEC_PER_SEC)
#define AUDIT_SOON_USEC (100 * USEC_PER_MSEC)

#define SWEEP_FILES_PER_TURN 1024

static int on_lease_signal(sd_event_source *source, const struct signalfd_siginfo *si,
			   void *userdata)
{
	struct broker *broker = userdata;
	/* si_fd can be stale: it is a hint where to look, nothing more. */
	struct file *file = broker_find_lease_fd(broker, si->ssi_fd);

	if (file)
		file_update(file);
	if (broker->stale_signals)
		broker_sweep(broker);
	return 0;
}

static int on_overflow(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	struct broker *broker = userdata;

	broker->n_overflows++;
	log_warning("The signal queue overflowed (%" PRIu64 " times so far): looking at every lease.",
		    broker->n_overflows);
	broker_sweep(broker);
	return 0;
}

static int on_sweep(sd_event_source *source, void *userdata)
{
	struct broker *broker = userdata;

	for (unsigned n = 0; n < SWEEP_FILES_PER_TURN; n++) {
		struct file *file = broker_next_file(broker, broker->sweep_after);

		if (!file)
			return sd_event_source_set_enabled(source, SD_EVENT_OFF);
		broker->sweep_after = file->id;
		if (file->n_pins > 0)
			file_keep(file);
		file_update(file);
	}
	return 0;
}

void broker_sweep(struct broker *broker)
{
	/* one that is under way begins anew: it may have passed the file already */
	broker->sweep_after = 0;
	(void)sd_event_source_set_enabled(broker->sweep, SD_EVENT_ON);
}

static void reap_orphans(struct broker *broker)
{
	struct client *client;
	uint64_t after = 0;

	while ((client = broker_next_client(broker, after))) {
		struct context *context;

		after = client->id;
		if (!client->dead)
			continue;
		LIST_FOREACH(context, &client->contexts, of_client)
			if (context->n_pins > 0)
				context_reap(context);
	}
}

/* Clients of the run before that have not come back, and hold nothing. */
static void forget_absent(struct broker *broker)
{
	struct client *client;
	uint64_t after = 0;

	if (broker->resume_usec == 0 || now_usec() < broker->resume_usec)
		return;
	broker->resume_usec = 0;
	while ((client = broker_next_client(broker, after))) {
		after = client->id;
		if (LIST_EMPTY(&client->peers))
			client_collect(client);
	}
}

static int on_audit(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct broker *broker = userdata;
	int r;

	/* first: what follows may want the next one sooner */
	r = sd_event_source_set_time(source, now_usec() + AUDIT_USEC);
	if (r >= 0)
		r = sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
	broker_sweep(broker);
	reap_orphans(broker);
	forget_absent(broker);
	state_touch(broker);
	return r;
}

void broker_audit_soon(struct broker *broker)
{
	(void)sd_event_source_set_time(broker->audit, now_usec() + AUDIT_SOON_USEC);
}

static int block_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, LEASE_SIGNAL);
	sigaddset(&set, SIGIO);
	return sigprocmask(SIG_BLOCK, &set, NULL) < 0 ? -errno : 0;
}

/* It has to work without: in a container there are no devices to be removed. */
static void add_devices(struct broker *broker)
{
	int r = device_monitor_new(broker, &broker->devices);

	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot listen for devices that are being removed");
}

static int add_sources(struct broker *broker)
{
	int r;

	r = block_signals();
	if (r >= 0)
		r = sd_event_add_signal(broker->event, &broker->lease_signal, LEASE_SIGNAL,
					on_lease_signal, broker);
	/* somebody is held up by what it tells of */
	if (r >= 0)
		r = sd_event_source_set_priority(broker->lease_signal, SD_EVENT_PRIORITY_IMPORTANT);
	if (r >= 0)
		r = sd_event_add_signal(broker->event, &broker->overflow_signal, SIGIO, on_overflow,
					broker);
	if (r >= 0)
		r = sd_event_add_defer(broker->event, &broker->sweep, on_sweep, broker);
	if (r >= 0)
		r = sd_event_source_set_enabled(broker->sweep, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &broker->audit, CLOCK_MONOTONIC,
				      now_usec() + AUDIT_USEC, USEC_PER_SEC, on_audit, broker);
	return r;
}

int broker_new(sd_event *event, struct config *config, struct broker **ret)
{
	struct broker *broker;
	int r;

	broker = calloc(1, sizeof(*broker));
	if (!broker)
		return -ENOMEM;
	broker->event = sd_event_ref(event);
	TAILQ_INIT(&broker->ended);
	broker->ids.fd = -1;
	r = users_new(config->limits, &broker->users);
	if (r >= 0)
		r = add_sources(broker);
	if (r >= 0)
		r = offload_new(event, NULL, &broker->offload);
	if (r >= 0)
		r = watch_new(broker, &broker->watch);
	if (r >= 0)
		r = blame_new(broker, &broker->blame);
	if (r < 0) {
		broker_free(broker);
		return r;
	}
	add_devices(broker);
	broker->config = config;
	*ret = broker;
	return 0;
}

struct broker *broker_free(struct broker *broker)
{
	struct client *client;
	struct revocation *rev;

	if (!broker)
		return NULL;
	while ((rev = broker_next_revocation(broker, 0)))
		revocation_free(rev);
	while ((client = broker_next_client(broker, 0)))
		client_free(client);
	/* what jobs come back with may go through everything once more */
	if (offload_free(broker->offload) > 0) {
		log_warning("Some work hangs, and is left behind.");
		return NULL; /* it may use anything yet: the process's exit frees all */
	}
	broker->offload = NULL;
	assert(broker->n_files == 0 && broker->n_pins == 0);
	blame_free(broker->blame);
	watch_free(broker->watch);
	sd_device_monitor_unref(broker->devices);
	sd_event_source_disable_unref(broker->lease_signal);
	sd_event_source_disable_unref(broker->overflow_signal);
	sd_event_source_disable_unref(broker->sweep);
	sd_event_source_disable_unref(broker->audit);
	users_free(broker->users);
	ids_close(&broker->ids);
	config_unref(broker->config);
	sd_event_unref(broker->event);
	free(broker);
	return NULL;
}

void broker_set_config(struct broker *broker, struct config *config)
{
	config_unref(broker->config);
	broker->config = config;
	users_set_maxima(broker->users, config->limits);
}

static int revoke_all(struct broker *broker)
{
	_cleanup_(freep) struct pin **pins = NULL;
	struct conflict conflict = conflict_new(CAUSE_SHUTDOWN);
	struct pin *pin;
	size_t n = 0;

	pins = calloc(broker->n_pins + 1, sizeof(*pins));
	if (!pins)
		return -ENOMEM;
	for (pin = broker_next_pin(broker, 0); pin; pin = broker_next_pin(broker, pin->id))
		if (!pin->over)
			pins[n++] = pin;
	return n == 0 ? 0
		      : revocation_start(broker, NULL, false, &conflict, pins, n, UINT64_MAX, false,
					 NULL);
}

void broker_check_stopped(struct broker *broker)
{
	if (broker->stopping && broker->n_running == 0 && broker->stopped)
		broker->stopped(broker->stopped_userdata);
}

void broker_stop(struct broker *broker, void (*stopped)(void *userdata), void *userdata)
{
	int r;

	broker->stopping = true;
	broker->stopped = stopped;
	broker->stopped_userdata = userdata;
	r = revoke_all(broker);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins that are left");
	broker_check_stopped(broker);
}
