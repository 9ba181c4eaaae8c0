/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/broker.h"

#include <assert.h>
#include <string.h>
#include <sys/resource.h>

#include "daemon/core/admin.h"
#include "daemon/core/blame.h"
#include "daemon/core/hearing.h"
#include "daemon/core/open.h"
#include "daemon/kernel/udev.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* What the signals should have told is looked up now and then all the same: a client that shares the
 * description can redirect them. Orphaned contexts are looked at again, too. */
#define AUDIT_USEC          (5 * USEC_PER_SEC)
#define AUDIT_SOON_USEC     (100 * USEC_PER_MSEC)
#define AUDIT_SLACK_USEC    (250 * USEC_PER_MSEC)
/* There are pinned files that inotify does not watch. */
#define AUDIT_UNWATCHED_USEC (500 * USEC_PER_MSEC)
#define RESERVED_DESCRIPTORS 1024U
/* So many contexts are looked at each time: see look_for_holders(). */
#define LOOKS_PER_AUDIT 1024U

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

/* Holders that have closed their connections may have executed another program, without their contexts. */
static void look_for_holders(struct broker *broker)
{
	struct context *context;
	unsigned n = 0;

	while (n < LOOKS_PER_AUDIT && (context = broker_next_context(broker, broker->looked_for))) {
		broker->looked_for = context->id;
		context_look_for_holder(context);
		n++;
	}
	if (n < LOOKS_PER_AUDIT)
		broker->looked_for = 0;
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
		if (!client_is_connected(client))
			client_collect(client);
	}
}

/* Files are looked at by the sweep, all the time. */
static void keep_contexts(struct broker *broker)
{
	struct context *context;
	uint64_t after = 0;

	if (!store_has_room_again(&broker->store))
		return;
	while (!broker->store.full && (context = broker_next_context(broker, after))) {
		after = context->id;
		context_keep(context);
	}
}

static int on_audit(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct broker *broker = userdata;
	int r;

	/* first: what follows may want the next one sooner */
	r = sd_event_source_set_time(
		source, now_usec() + (watch_was_incomplete(broker->watch) ? AUDIT_UNWATCHED_USEC
									  : AUDIT_USEC));
	if (r >= 0)
		r = sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
	hearing_sweep(broker->hearing);
	reap_orphans(broker);
	keep_contexts(broker);
	look_for_holders(broker);
	forget_absent(broker);
	return r;
}

void broker_audit_soon(struct broker *broker)
{
	(void)sd_event_source_set_time(broker->audit, now_usec() + AUDIT_SOON_USEC);
}

static void on_device_removed(dev_t number, void *userdata)
{
	admin_remove_device(userdata, number);
}

/* It has to work without: in a container there are no devices to be removed. */
static void add_devices(struct broker *broker)
{
	int r = device_monitor_new(broker->event, on_device_removed, broker, &broker->devices);

	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot listen for devices that are being removed");
}

/* Numbers are left for one read, for the threads, and for what is the broker's own. */
static void set_capacity(struct users *users)
{
	struct rlimit limit;
	rlim_t reserved;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY)
		return;
	reserved = limit.rlim_cur / 3 < RESERVED_DESCRIPTORS ? limit.rlim_cur / 3
							     : RESERVED_DESCRIPTORS;
	users_set_capacity(users, limit.rlim_cur - reserved);
}

static void on_touched(struct watched *watched, uint32_t mask)
{
	file_touched(container_of(watched, struct file, watched), mask);
}

static void on_missed(void *userdata)
{
	struct broker *broker = userdata;

	hearing_sweep(broker->hearing);
}

/* The next audit, which looks at each file, follows soon, and once a second. */
static void on_incomplete(void *userdata)
{
	broker_audit_soon(userdata);
}

static const struct watch_ops watch_ops = {
	.touched = on_touched,
	.missed = on_missed,
	.incomplete = on_incomplete,
};

int broker_new(sd_event *event, struct config *config, struct broker **ret)
{
	struct broker *broker;
	int r;

	broker = calloc(1, sizeof(*broker));
	if (!broker)
		return -ENOMEM;
	broker->event = sd_event_ref(event);
	TAILQ_INIT(&broker->ended);
	STAILQ_INIT(&broker->observers);
	broker->ids.fd = -1;
	r = users_new(config->limits, &broker->users);
	if (r >= 0)
		set_capacity(broker->users);
	if (r >= 0)
		r = hearing_new(broker, &broker->hearing);
	if (r >= 0)
		r = sharings_new(broker, &broker->sharings);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &broker->audit, CLOCK_MONOTONIC,
				      now_usec() + AUDIT_USEC, AUDIT_SLACK_USEC, on_audit, broker);
	if (r >= 0)
		r = offload_new(event, &broker->offload);
	if (r >= 0)
		r = watch_new(event, &watch_ops, broker, &broker->watch);
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
	open_give_up(broker);
	/* what jobs come back with may go through everything once more */
	if (offload_free(broker->offload) > 0) {
		log_warning("Some work hangs, and is left behind.");
		return NULL; /* it may use anything yet: the process's exit frees all */
	}
	broker->offload = NULL;
	assert(broker->n_files == 0 && broker->n_pins == 0);
	blame_free(broker->blame);
	watch_free(broker->watch);
	device_monitor_free(broker->devices);
	hearing_free(broker->hearing);
	sharings_free(broker->sharings);
	sd_event_source_disable_unref(broker->audit);
	users_free(broker->users);
	ids_close(&broker->ids);
	config_unref(broker->config);
	sd_event_unref(broker->event);
	free(broker);
	return NULL;
}

void broker_flush(struct broker *broker)
{
	if (broker->journal)
		broker->journal->flush(broker->journal);
}

void broker_set_config(struct broker *broker, struct config *config)
{
	config_unref(broker->config);
	broker->config = config;
	users_set_maxima(broker->users, config->limits);
}

static bool is_any(const struct file *file, const struct use *use, const struct selection *selection)
{
	return true;
}

static int revoke_all(struct broker *broker)
{
	static const struct selection_filter all = { .file = is_any };
	struct conflict conflict = conflict_new(CAUSE_SHUTDOWN);
	struct selection selection = selection_of(broker, &all);

	if (broker->n_pins == 0)
		return 0;
	return revocation_start(broker, NULL, false, &conflict, &selection, UINT64_MAX, false, NULL);
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
