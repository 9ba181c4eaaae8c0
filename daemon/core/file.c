/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/file.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>

#include "daemon/core/blame.h"
#include "daemon/core/broker.h"
#include "daemon/core/client.h"
#include "daemon/core/observer.h"
#include "daemon/core/open.h"
#include "daemon/core/settle.h"
#include "daemon/kernel/access.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* The back-off of taking the lease again, the event that should bring it on coming too early. */
#define RETRY_FIRST_USEC   (1 * USEC_PER_MSEC)
#define RETRY_EXPOSED_USEC (1 * USEC_PER_SEC)
#define RETRY_LAST_USEC    (10 * USEC_PER_SEC)

/* The kernel counts its break time in ticks. */
#define SETTLE_SLACK_USEC (20 * USEC_PER_MSEC)
#define SETTLE_RETRY_USEC (100 * USEC_PER_MSEC)

static struct log_fields file_fields(const struct file *file)
{
	const struct use *use = LIST_FIRST(&file->uses);

	return (struct log_fields){
		.file = file->id,
		.path = file->path,
		.charged_uid = use ? &use->client->process.uid : NULL,
	};
}

static void set_fd(struct file *file, int fd)
{
	sharing_clear(file);
	if (file->lease.fd >= 0)
		broker_remove_lease_fd(file->broker, file);
	store_drop(&file->broker->store, &file->copy);
	file->lease.fd = fd;
	observe_file(file, OBSERVED_CHANGED);
	if (fd >= 0)
		broker_add_lease_fd(file->broker, file);
}

void file_keep(struct file *file)
{
	if (!store_has(&file->copy) && file->lease.fd >= 0)
		store_keep(&file->broker->store, &file->copy, STORE_FILE, file->id, file->lease.fd);
}

/* The state has the lease as it is. */
static void record(struct file *file)
{
	const struct lease *now = &file->lease, *then = &file->recorded;

	if (now->state == then->state && now->access == then->access)
		return;
	file->recorded = *now;
	observe_file(file, OBSERVED_RECORDED);
}

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata);

int file_new(struct broker *broker, const struct probe *probe, struct file **ret)
{
	struct file *file;
	int r;

	file = calloc(1, sizeof(*file));
	if (!file)
		return -ENOMEM;
	file->broker = broker;
	file->key = (struct inode_key){ probe->device, probe->inode };
	file->mount = probe->mount;
	file->mount_device = probe->mount_device;
	file->lease.fd = -1;
	file->opening = true;
	file->watched.number = WATCHED_NOT;
	file->change.emergency_size = UINT64_MAX;
	STAILQ_INIT(&file->waiting);
	RB_INIT(&file->pins);
	LIST_INIT(&file->uses);
	snprintf(file->file_system, sizeof(file->file_system), "%s", probe->file_system);
	file->backing = probe->backing;
	file->device_size = probe->size;
	file->path = strdup(probe->path);
	r = file->path ? sd_event_add_time(broker->event, &file->timer, CLOCK_MONOTONIC, 0, 1,
					   on_timer, file)
		       : -ENOMEM;
	if (r < 0) {
		free(file->path);
		free(file);
		return r;
	}
	(void)sd_event_source_set_enabled(file->timer, SD_EVENT_OFF);
	file->id = broker_next_id(broker);
	broker_add_file(broker, file);
	observe_file(file, OBSERVED_RECORDED);
	*ret = file;
	return 0;
}

struct file *file_free(struct file *file)
{
	if (!file)
		return NULL;
	change_clear(&file->change);
	assert(file->n_uses == 0 && file->n_pins == 0 && STAILQ_EMPTY(&file->waiting));
	offload_close(file->broker->offload, NULL, file_take_description(file));
	broker_remove_file(file->broker, file);
	sd_event_source_disable_unref(file->timer);
	free(file->path);
	free(file);
	return NULL;
}

void file_withdraw(struct file *file, uint64_t revocation)
{
	file->withdrawn = revocation;
	file_collect(file);
}

void file_collect(struct file *file)
{
	while (file->withdrawn != 0 && file->n_pins == 0 && file->n_uses > 0)
		use_withdraw(LIST_FIRST(&file->uses), file->withdrawn);
	if (file->n_uses == 0 && !file->opening && STAILQ_EMPTY(&file->waiting))
		file_free(file);
}

int64_t file_size(const struct file *file)
{
	struct stat st;

	if (file->backing.kind == BACKING_DEVICE_DAX)
		return (int64_t)file->device_size;
	return fstat(file->lease.fd, &st) < 0 ? -errno : st.st_size;
}

static void arm(struct file *file, uint64_t usec)
{
	int r = sd_event_source_set_time(file->timer, usec);

	if (r >= 0)
		r = sd_event_source_set_enabled(file->timer, SD_EVENT_ONESHOT);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot arm the timer of %s", file->path);
}

static void disarm(struct file *file)
{
	(void)sd_event_source_set_enabled(file->timer, SD_EVENT_OFF);
}

static void set_exposed(struct file *file)
{
	bool unguarded = file->n_pins > 0 && file->lease.state == LEASE_NONE &&
			 backing_needs_lease(&file->backing);
	bool exposed = unguarded && file_n_pinning(file) > 0;
	struct log_fields fields = file_fields(file);

	observe_file(file, OBSERVED_CHANGED);
	record(file);
	file->unguarded = unguarded;
	if (exposed == file->exposed)
		return;
	file->exposed = exposed;
	file->change.touched &= !exposed;
	if (exposed)
		log_event(LOG_WARNING, MESSAGE_LEASE_EXPOSED, &fields,
			  "%s is exposed: it has %u pin%s, and its lease cannot be held at present.",
			  file->path, file_n_pinning(file), PLURAL(file_n_pinning(file)));
}

/* Where leases never settle, readers would wait for ever. */
bool file_admits_readers(const struct broker *broker)
{
	return broker->config->readers == READERS_ADMIT || lease_break_usec() == USEC_INFINITY;
}

static bool admits_readers(const struct file *file)
{
	return file_admits_readers(file->broker) ||
	       listened_until(&file->broker->listened, file->mount_device) != 0;
}

static void settle(struct file *file)
{
	int r = file->settle ? 0 : settle_start(file);

	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot settle the lease of %s yet", file->path);
	arm(file, now_usec() + (r < 0 ? RETRY_EXPOSED_USEC : SETTLE_LOOK_USEC));
}

void file_settle_done(struct file *file, bool opened)
{
	uint64_t now = now_usec(), usec = now + SETTLE_PROBE_USEC;

	if (opened && file->lease.state == LEASE_SETTLING) {
		struct log_fields fields = file_fields(file);

		lease_settled(&file->lease);
		disarm(file);
		log_event(LOG_INFO, MESSAGE_LEASE_SETTLED, &fields,
			  "Lease of %s settled: readers come and go freely.", file->path);
	} else if (file->lease.state == LEASE_SETTLING) {
		uint64_t again = now + SETTLE_RETRY_USEC,
			 due = file->lease.settled_usec + SETTLE_SLACK_USEC;

		if (due < again)
			due = again;
		arm(file, due < usec ? due : usec);
	} else if (file->lease.state == LEASE_WRITE) {
		arm(file, usec);
	}
	file_update(file);
}

/* Without a lease whoever closes it matters, too. */
static void watch_file(struct file *file)
{
	if (!backing_needs_lease(&file->backing) || file->lease.fd < 0)
		return;
	if (file->lease.state == LEASE_NONE)
		watch_add(file->broker->watch, &file->watched, file->lease.fd, file->path, IN_CLOSE | IN_MODIFY | IN_ATTRIB);
	else if (file->n_pins > 0)
		watch_add(file->broker->watch, &file->watched, file->lease.fd, file->path, IN_MODIFY);
	else
		watch_remove(file->broker->watch, &file->watched);
}

static void retry_later(struct file *file)
{
	uint64_t last = file->n_pins > 0 ? RETRY_EXPOSED_USEC : RETRY_LAST_USEC;

	file->retry_usec = file->retry_usec == 0 ? RETRY_FIRST_USEC : file->retry_usec * 2;
	if (file->retry_usec > last)
		file->retry_usec = last;
	watch_file(file);
	arm(file, now_usec() + file->retry_usec);
}

void file_pinned(struct file *file, uint64_t end)
{
	change_begin(file, end);
	if (file->n_pins == 1)
		watch_file(file);
}

static void release(struct file *file);

/* What holds our open up has the file open itself, or waits for that, until it is admitted. */
static void note_listener(struct file *file)
{
	struct log_fields fields = file_fields(file);

	listened_note(&file->broker->listened, file->mount_device);
	log_event(LOG_WARNING, NULL, &fields,
		  "A program decides on opens on the file system of %s (fanotify), and waits for leases "
		  "to settle: readers are admitted there at once, which exposes files to writers "
		  "meanwhile.", file->path);
}

/* Until it has settled whoever opens the file to read it waits. */
static void go_on_settling(struct file *file)
{
	uint64_t until_usec = listened_until(&file->broker->listened, file->mount_device);

	if (file->lease.state == LEASE_SETTLING && file->settle && settle_is_held(file->settle))
		note_listener(file);
	else if (until_usec == 0) {
		settle(file);
		return;
	}
	if (file->lease.state == LEASE_SETTLING)
		release(file);
	else
		arm(file, until_usec);
}

static int take(struct file *file)
{
	struct log_fields fields = file_fields(file);
	int r;

	if (!backing_needs_lease(&file->backing))
		return 0;
	r = lease_take(&file->lease);
	if (r < 0)
		return r;
	/* What happened before the lease was there again counts. */
	change_check(file);
	watch_file(file);
	disarm(file);
	file->retry_usec = 0;
	set_exposed(file);
	log_event(LOG_INFO, MESSAGE_LEASE_TAKEN, &fields, "Lease of %s taken (%s).", file->path,
		  enumeration_name(&enumeration_lease_state, file->lease.state));
	if (file->lease.state == LEASE_WRITE && !file_admits_readers(file->broker))
		go_on_settling(file);
	return 0;
}

static void go_without(struct file *file)
{
	watch_file(file);
	set_exposed(file);
	file->retry_usec = 0;
	retry_later(file);
}

static void release(struct file *file)
{
	struct log_fields fields = file_fields(file);

	if (lease_give(&file->lease) < 0 && file_n_pinning(file) > 0)
		log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
			  "The lease of %s was lost, with %u pin%s alive.", file->path,
			  file_n_pinning(file), PLURAL(file_n_pinning(file)));
	else
		log_event(LOG_INFO, MESSAGE_LEASE_RELEASED, &fields, "Lease of %s released.",
			  file->path);
	go_without(file);
}

/* The kernel's time was over before anybody here had a look, or before the ladder was: whoever waited has gone
 * ahead, and nobody waits any more. */
static void lease_gone(struct file *file)
{
	struct log_fields fields = file_fields(file);

	log_event(file_n_pinning(file) > 0 ? LOG_CRIT : LOG_WARNING, MESSAGE_LEASE_LOST, &fields,
		  "The lease of %s was lost, with %u pin%s alive: the kernel took it away after its "
		  "lease-break-time, or a holder gave it up.",
		  file->path, file_n_pinning(file), PLURAL(file_n_pinning(file)));
	go_without(file);
	change_check(file);
	if (file->revocation)
		revocation_event(file->revocation, REVOKE_FORCE);
}

static void break_by_reader(struct file *file)
{
	struct log_fields fields = file_fields(file);

	if (admits_readers(file)) {
		log_event(LOG_INFO, MESSAGE_LEASE_BROKEN, &fields,
			  "Lease of %s broken by a reader, who is admitted.", file->path);
		release(file);
		return;
	}
	lease_settle(&file->lease, lease_break_usec());
	arm(file, now_usec() + SETTLE_LOOK_USEC);
}

static void break_by_writer(struct file *file)
{
	struct conflict conflict = conflict_new(CAUSE_MODIFY);
	struct log_fields fields = file_fields(file);
	unsigned n_pinning = file_n_pinning(file);
	struct selection selection;
	int r;

	if (file->n_pins == 0) {
		log_event(LOG_INFO, MESSAGE_LEASE_BROKEN, &fields,
			  "Lease of %s broken, with nothing pinned.", file->path);
		release(file);
		return;
	}
	selection = selection_of_file(file, 0);
	r = revocation_start(file->broker, file, true, &conflict, &selection, UINT64_MAX, false, NULL);
	/* The holders have been told first: somebody is waiting for them. */
	log_event(LOG_NOTICE, MESSAGE_LEASE_BROKEN, &fields,
		  "Lease of %s broken: somebody opens it for writing or truncates it, with %u "
		  "pin%s in the way.",
		  file->path, n_pinning, PLURAL(n_pinning));
	if (r < 0) {
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s, trying again", file->path);
		arm(file, now_usec() + SETTLE_RETRY_USEC);
		return;
	}
	blame_request(file->broker->blame, file);
}

/* Somebody who shares the description has given the lease up. What came until it was taken again counts. */
static void go_on_after_stripping(struct file *file)
{
	file->unguarded = file->n_pins > 0;
	change_check(file);
	disarm(file);
	if (!file_admits_readers(file->broker))
		go_on_settling(file);
	sharing_stripped(file);
}

void file_update(struct file *file)
{
	enum lease_event event;

	if (file->lease.fd < 0 || file->opening)
		return;
	event = lease_look(&file->lease);
	if (event != LEASE_INTACT)
		sharing_inspect(file);
	switch (event) {
	case LEASE_READER:
		break_by_reader(file);
		break;
	case LEASE_WRITER:
		break_by_writer(file);
		break;
	case LEASE_STRIPPED:
		go_on_after_stripping(file);
		break;
	case LEASE_GONE:
		lease_gone(file);
		break;
	case LEASE_INTACT:
		/* Could not be acted on the last time? */
		if (file->lease.state == LEASE_BREAKING && !file->revocation)
			break_by_writer(file);
		break;
	}
	change_check(file);
	if (file->watched.number < 0 && file->n_pins > 0)
		watch_file(file);
	set_exposed(file);
}

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct file *file = userdata;

	if (file->opening)
		return 0;
	if (file->lease.state == LEASE_NONE) {
		change_check(file);
		if (take(file) < 0)
			retry_later(file);
	} else if (file->lease.state == LEASE_WRITE || file->lease.state == LEASE_SETTLING) {
		go_on_settling(file);
	}
	file_update(file);
	return 0;
}

void file_touched(struct file *file, uint32_t mask)
{
	if (file->opening)
		return;
	change_check(file);
	change_event(file, mask);
	if (file->lease.state != LEASE_NONE)
		return;
	/* The event comes before the close is complete. */
	file->retry_usec = 0;
	if (take(file) < 0)
		retry_later(file);
}

void file_revocation_ended(struct file *file, bool lost)
{
	/* it may have gone, and been taken again, before its revocation was over */
	if (file->lease.state == LEASE_BREAKING && (lost || file_n_pinning(file) == 0))
		release(file);
	else
		file_update(file);
}

bool file_ensure_lease(struct file *file)
{
	file_update(file);
	if (file->lease.state == LEASE_NONE && !file->opening)
		(void)take(file);
	return lease_is_held(&file->lease) || !backing_needs_lease(&file->backing);
}

int file_set_description(struct file *file, int fd, enum access access)
{
	assert(file->lease.fd < 0);

	set_fd(file, fd);
	file->lease.access = access;
	return take(file);
}

void file_resume(struct file *file, const struct lease *lease)
{
	set_fd(file, lease->fd);
	file->lease = *lease;
	store_kept(&file->broker->store, &file->copy, STORE_FILE, file->id, lease->fd);
	file->opening = false;
	file->change.resumed = true;
}

void file_go_on(struct file *file)
{
	uint64_t since_usec = file->lease.broken_usec;

	if (lease_resume(&file->lease, since_usec) > 0)
		file->broker->stale_signals = true;
	/* what has happened meanwhile cannot be seen but by its size */
	set_exposed(file);
	if (!backing_needs_lease(&file->backing))
		return;
	change_check(file);
	watch_file(file);
	if (file->lease.state == LEASE_NONE || !file_admits_readers(file->broker))
		arm(file, now_usec());
	file_update(file);
}

void file_give_lease(struct file *file)
{
	(void)lease_give(&file->lease);
	observe_file(file, OBSERVED_CHANGED);
	disarm(file);
}

int file_try_lease(struct file *file)
{
	return file->lease.state == LEASE_NONE ? take(file) : 0;
}

int file_take_description(struct file *file)
{
	int fd = file->lease.fd;

	(void)lease_give(&file->lease);
	watch_remove(file->broker->watch, &file->watched);
	disarm(file);
	set_fd(file, -1);
	return fd;
}

void file_info(const struct file *file, struct msg_file_info *ret)
{
	int64_t size = file->lease.fd >= 0 ? file_size(file) : 0;

	*ret = (struct msg_file_info){
		.file = (int64_t)file->id,
		.path = file->path,
		.fileSystem = file->file_system,
		.device = (int64_t)file->key.device,
		.inode = (int64_t)file->key.inode,
		.size = size >= 0 ? size : 0,
		.access = file->lease.access,
		.lease = file->lease.state,
		.settledUSec = file->lease.state == LEASE_SETTLING
				       ? (int64_t)file->lease.settled_usec
				       : INT_NULL,
		.exposed = file->exposed,
		.clients = file->n_uses,
		.pins = file->n_pins,
	};
	backing_info(&file->backing, &ret->backing);
}
