/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/sharing.h"

#include <stdio.h>
#include <sys/stat.h>

#include "daemon/core/broker.h"
#include "daemon/core/client.h"
#include "daemon/core/file.h"
#include "daemon/core/hearing.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

#define LOOK_USEC (100 * USEC_PER_MSEC)

TAILQ_HEAD(file_queue, file);

struct sharings {
	struct broker *broker;
	struct file_queue files; /* that several uids share; the next to be looked at first */
	unsigned n_files;
	unsigned n_left;     /* of the round that is under way */
	uint64_t round_usec; /* when the next one begins */
	sd_event_source *timer;
};

/* ---- Who shares a file ---- */

static bool uses(const struct file *file, uid_t uid)
{
	const struct use *use;

	LIST_FOREACH (use, &file->uses, of_file)
		if (use->writable && use->client->process.uid == uid)
			return true;
	return false;
}

int sharing_check_pin(const struct file *file, uid_t uid, struct refusal *ret_refusal)
{
	if (!file->sharing.has_culprit || file->sharing.culprit != uid)
		return 0;
	return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "tampered",
		"Uid %u has changed who hears of breaks of the lease of %s.", uid, file->path);
}

int sharing_check(const struct file *file, uid_t uid, struct refusal *ret_refusal)
{
	int r = sharing_check_pin(file, uid, ret_refusal);

	if (r != 0 || !file->sharing.tampered || uses(file, uid))
		return r;
	return refuse(ret_refusal, REFUSAL_BUSY, "tampered",
		"%s is shared with no further user: one of those who do has tampered with its "
		"lease.",
		file->path);
}

static void look_at(struct sharings *s, uint64_t usec)
{
	(void)sd_event_source_set_time(s->timer, usec);
	(void)sd_event_source_set_enabled(s->timer, SD_EVENT_ONESHOT);
}

static void set_several(struct file *file)
{
	struct sharings *s = file->broker->sharings;

	file->sharing.several = true;
	TAILQ_INSERT_TAIL(&s->files, file, sharing.of_sharings);
	if (s->n_files++ == 0)
		look_at(s, now_usec() + LOOK_USEC);
	observe_file(file, OBSERVED_RECORDED);
}

void sharing_add(struct file *file, uid_t uid)
{
	if (!lease_is_shared(&file->lease))
		return;
	if (!file->sharing.handed_out)
		file->sharing.uid = uid;
	else if (file->sharing.uid != uid && !file->sharing.several)
		set_several(file);
	file->sharing.handed_out = true;
}

void sharing_resume(struct file *file, bool several, bool tampered)
{
	file->sharing.tampered = tampered;
	file->sharing.handed_out = several;
	if (several)
		set_several(file);
}

void sharing_clear(struct file *file)
{
	struct sharings *s = file->broker->sharings;

	if (file->sharing.several) {
		TAILQ_REMOVE(&s->files, file, sharing.of_sharings);
		if (--s->n_files == 0)
			(void)sd_event_source_set_enabled(s->timer, SD_EVENT_OFF);
	}
	file->sharing = (struct sharing){};
}

/* ---- What follows ---- */

/* May there be pins, of one uid or of all, that no revocation wants gone already? */
static bool has_pins(const struct file *file, const uid_t *uid)
{
	const struct use *use;

	if (file->n_wanted == file->n_pins || !uid)
		return file->n_wanted < file->n_pins;
	LIST_FOREACH (use, &file->uses, of_file)
		if (use->n_pins > 0 && use->client->process.uid == *uid)
			return true;
	return false;
}

/* Returns how many have been found, at least. */
static size_t revoke_pins(struct file *file, const uid_t *uid, const char *what)
{
	struct conflict conflict = conflict_new(CAUSE_MODIFY);
	struct selection selection = selection_of_file(file, 0);
	const struct revocation *rev;
	uint64_t id;
	int r;

	if (!has_pins(file, uid))
		return 0;
	selection.unwanted = true;
	selection.of_uid = uid;
	if (uid)
		conflict.uid = selection.uid = *uid;
	snprintf(conflict.reason, sizeof(conflict.reason), "%s", what);
	r = revocation_start(file->broker, file, false, &conflict, &selection, uid ? 0 : UINT64_MAX, uid,
			     &id);
	if (r < 0) {
		log_errno(LOG_ERR, r, "Cannot revoke the pins of %s", file->path);
		return 0;
	}
	rev = broker_find_revocation(file->broker, id);
	return rev ? rev->n_pinning : 0;
}

static struct client *find_connected(struct broker *broker, uint64_t file_id, uid_t uid)
{
	struct file *file = broker_find_file(broker, file_id);
	struct use *use;

	if (file)
		LIST_FOREACH (use, &file->uses, of_file)
			if (use->client->process.uid == uid && client_is_connected(use->client))
				return use->client;
	return NULL;
}

static void log_tampering(const struct file *file, const uid_t *uid, const char *what)
{
	struct log_fields fields = {.file = file->id, .path = file->path, .uid = uid};

	if (uid)
		log_event(LOG_WARNING, MESSAGE_LEASE_TAMPERED, &fields,
			"%s, which uid %u shares: %s. Its clients of the file are disconnected, "
			"their pins revoked.",
			file->path, *uid, what);
	else
		log_event(LOG_WARNING, MESSAGE_LEASE_TAMPERED, &fields,
			"%s, which several users share: %s. It is not known who did it: its pins "
			"are "
			"revoked.",
			file->path, what);
}

/* Said once, and then whenever it costs pins. */
static void punish(struct file *file, bool named, uid_t uid, const char *what)
{
	struct sharing *sharing = &file->sharing;
	struct broker *broker = file->broker;
	bool first = !sharing->tampered ||
		     (named && (!sharing->has_culprit || sharing->culprit != uid));
	uint64_t id = file->id;
	struct client *client;

	sharing->tampered = true;
	if (named) {
		sharing->has_culprit = true;
		sharing->culprit = uid;
	}
	if (first)
		observe_file(file, OBSERVED_RECORDED);
	if (revoke_pins(file, named ? &uid : NULL, what) > 0 || first)
		log_tampering(file, named ? &uid : NULL, what);
	while (named && (client = find_connected(broker, id, uid)))
		client_disconnect(client);
}

/* Who did it? True if that is known: it is whoever is the only one to share the file; and it takes
 * the file's owner, or CAP_LEASE, to give its lease up. */
static bool find_culprit(const struct file *file, enum lease_tampering tampering, uid_t *ret_uid)
{
	const struct sharing *sharing = &file->sharing;
	struct stat st;

	*ret_uid = tampering == LEASE_REOWNED ? sharing->seen_uid : sharing->uid;
	if (tampering == LEASE_REOWNED || !sharing->several)
		return true;
	if (tampering != LEASE_GIVEN_UP || fstat(file->lease.fd, &st) < 0)
		return false;
	*ret_uid = st.st_uid;
	return uses(file, st.st_uid);
}

static const char *const descriptions[] = {
	[LEASE_RESIGNALLED] = "the signal of breaks of its lease was changed (F_SETSIG)",
	[LEASE_DISOWNED] = "who hears of breaks of its lease was changed (F_SETOWN)",
	[LEASE_REOWNED] = "who hears of breaks of its lease was changed (F_SETOWN)",
	[LEASE_GIVEN_UP] = "its lease was given up (F_SETLEASE)",
};

static void see(struct file *file, enum lease_tampering tampering)
{
	file->sharing.seen = tampering;
	hearing_sweep(file->broker->hearing);
}

void sharing_inspect(struct file *file)
{
	struct sharing *sharing = &file->sharing;
	enum lease_tampering tampering;

	if (!sharing->handed_out || sharing->seen != LEASE_UNTOUCHED)
		return;
	tampering = lease_inspect(&file->lease, &sharing->seen_uid);
	if (tampering != LEASE_UNTOUCHED)
		see(file, tampering);
}

void sharing_stripped(struct file *file)
{
	if (file->sharing.seen == LEASE_UNTOUCHED)
		see(file, LEASE_GIVEN_UP);
}

void sharing_look(struct file *file)
{
	enum lease_tampering tampering;
	bool known;
	uid_t uid;

	if (file->lease.fd >= 0 && !file->opening)
		sharing_inspect(file);
	/* a break may have gone unheard until now */
	file_update(file);
	tampering = file->sharing.seen;
	if (tampering == LEASE_UNTOUCHED || file->opening)
		return;
	file->sharing.seen = LEASE_UNTOUCHED;
	known = find_culprit(file, tampering, &uid);
	punish(file, known, uid, descriptions[tampering]);
}

/* ---- The look ---- */

static int on_look(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct sharings *s = userdata;
	struct slice slice = slice_begin();
	struct file *file;
	uint64_t next;

	if (s->n_left == 0) {
		s->n_left = s->n_files;
		s->round_usec = now_usec() + LOOK_USEC;
	}
	do {
		file = TAILQ_FIRST(&s->files);
		if (!file) {
			s->n_left = 0;
			break;
		}
		s->n_left--;
		TAILQ_REMOVE(&s->files, file, sharing.of_sharings);
		TAILQ_INSERT_TAIL(&s->files, file, sharing.of_sharings);
		sharing_look(file);
	} while (s->n_left > 0 && !slice_is_over(&slice));
	if (s->n_files > 0) {
		next = now_usec() + SLICE_PAUSE_USEC;
		look_at(s, s->n_left > 0 || s->round_usec < next ? next : s->round_usec);
	}
	return 0;
}

int sharings_new(struct broker *broker, struct sharings **ret)
{
	struct sharings *s;
	int r;

	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->broker = broker;
	TAILQ_INIT(&s->files);
	r = sd_event_add_time(broker->event, &s->timer, CLOCK_MONOTONIC, 0, 1, on_look, s);
	if (r >= 0)
		r = sd_event_source_set_enabled(s->timer, SD_EVENT_OFF);
	/* somebody may be held up that nobody has heard of */
	if (r >= 0)
		r = sd_event_source_set_priority(s->timer, SD_EVENT_PRIORITY_IMPORTANT);
	if (r < 0) {
		sharings_free(s);
		return r;
	}
	*ret = s;
	return 0;
}

struct sharings *sharings_free(struct sharings *s)
{
	if (!s)
		return NULL;
	sd_event_source_disable_unref(s->timer);
	free(s);
	return NULL;
}
