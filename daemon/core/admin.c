/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/admin.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

static int start_revocation(struct selection *s, enum cause cause, const char *reason, uint64_t timeout_usec,
			    uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct conflict conflict = conflict_new(cause);

	if (s->broker->stopping) {
		selection_clear(s);
		return refuse(ret_refusal, REFUSAL_BUSY, "shutdown", "The broker is shutting down.");
	}
	snprintf(conflict.reason, sizeof(conflict.reason), "%s", reason);
	return revocation_start(s->broker, NULL, false, &conflict, s,
				timeout_usec == 0 ? UINT64_MAX : timeout_usec, false, ret_id);
}

int admin_revoke_pins(struct broker *broker, const uint64_t *pins, size_t n_pins,
		      const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
		      struct refusal *ret_refusal)
{
	struct selection s;
	int r;

	for (size_t i = 0; i < n_pins; i++) {
		struct pin *pin = broker_find_pin(broker, pins[i]);

		if (!pin || pin->over)
			return refuse_no_such(ret_refusal, "pin", pins[i]);
	}
	r = selection_of_pins(broker, pins, n_pins, &s);
	return r < 0 ? r : start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

static int revoke_file(struct file *file, const char *reason, uint64_t timeout_usec,
		       uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct selection s = selection_of_file(file, 0);

	return start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

int admin_revoke_file(struct broker *broker, uint64_t id, const char *reason,
		      uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct file *file = broker_find_file(broker, id);

	return file ? revoke_file(file, reason, timeout_usec, ret_id, ret_refusal)
		    : refuse_no_such(ret_refusal, "file", id);
}

int admin_revoke_inode(struct broker *broker, uint64_t device, uint64_t inode, const char *reason,
		       uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct file *file = broker_find_inode(broker, (struct inode_key){ device, inode });

	return file ? revoke_file(file, reason, timeout_usec, ret_id, ret_refusal)
		    : refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "file",
			     "It is not open through the broker.");
}

/* One path can be that of several files, at several times or in several mount namespaces. */
static int find_path(struct broker *broker, const char *path, struct file **ret,
		     struct refusal *ret_refusal)
{
	struct file *file, *found = NULL;
	uint64_t after = 0;

	while ((file = broker_next_file(broker, after))) {
		after = file->id;
		if (strcmp(file->path, path) != 0)
			continue;
		if (found)
			return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "ambiguous",
				      "Several files are listed as %.80s: name one by its id, or by "
				      "device and inode.", path);
		found = file;
	}
	if (!found)
		return refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "file", "No file %.150s is listed.",
			      path);
	*ret = found;
	return 0;
}

int admin_revoke_path(struct broker *broker, const char *path, const struct inode_key *now,
		      const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
		      struct refusal *ret_refusal)
{
	struct file *file = NULL;
	int r;

	r = find_path(broker, path, &file, ret_refusal);
	if (r != 0)
		return r;
	if (now && (now->device != file->key.device || now->inode != file->key.inode))
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "renamed",
			      "%.80s is another file now than file %" PRIu64 ", which is listed so: name "
			      "it by its id, or by device and inode.", path, file->id);
	return revoke_file(file, reason, timeout_usec, ret_id, ret_refusal);
}

static bool is_of_client(const struct context *context, const struct selection *s)
{
	return context->client->id == s->client;
}

int admin_revoke_client(struct broker *broker, uint64_t id, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	static const struct selection_filter filter = { .context = is_of_client };
	struct selection s = selection_of(broker, &filter);

	if (!broker_find_client(broker, id))
		return refuse_no_such(ret_refusal, "client", id);
	s.client = id;
	return start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

static bool is_below(const struct file *file, const struct use *use, const struct selection *s)
{
	const char *path = file->path, *directory = s->name;
	size_t n = strlen(directory);

	while (n > 1 && directory[n - 1] == '/')
		n--;
	return strncmp(path, directory, n) == 0 && (n == 1 || path[n] == '/' || path[n] == 0);
}

static bool is_through(const struct mounts *mounts, uint64_t mount)
{
	for (size_t i = 0; i < mounts->n_others; i++)
		if (mounts->others[i] == mount)
			return false;
	return true;
}

/* All of it is in the way where the broker's own description is. */
static bool is_on_mount(const struct file *file, const struct use *use, const struct selection *s)
{
	return file->mount_device == s->mounts.device &&
	       (is_through(&s->mounts, file->mount) || (use && is_through(&s->mounts, use->mount)));
}

static bool has_file(const struct selection *s)
{
	struct file *file = broker_next_file(s->broker, 0);

	while (file && !s->filter->file(file, NULL, s))
		file = broker_next_file(s->broker, file->id);
	return file;
}

static void withdraw_uses(struct file *file, const struct selection *s, uint64_t revocation)
{
	struct use *use, *next;

	for (use = LIST_FIRST(&file->uses); use; use = next) {
		next = LIST_NEXT(use, of_file);
		if (s->filter->file(file, use, s))
			use_withdraw(use, revocation);
	}
	file_collect(file);
}

static void withdraw_files(const struct selection *s, uint64_t revocation)
{
	struct file *file;
	uint64_t after = 0;

	while ((file = broker_next_file(s->broker, after))) {
		after = file->id;
		if (s->filter->file(file, NULL, s))
			file_withdraw(file, revocation);
		else
			withdraw_uses(file, s, revocation);
	}
}

/* meant: what the revocation gets a copy of */
static int revoke_files(const struct selection *meant, enum cause cause, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct selection s;
	int r;

	r = selection_copy(meant, &s);
	if (r >= 0)
		r = start_revocation(&s, cause, reason, timeout_usec, ret_id, ret_refusal);
	if (r == 0)
		withdraw_files(meant, *ret_id);
	return r;
}

int admin_revoke_mount(struct broker *broker, const char *path, const char *reason,
		       uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	static const struct selection_filter filter = { .file = is_below };
	struct selection s = selection_of(broker, &filter);

	if (path[0] != '/')
		return refuse_parameter(ret_refusal, "path");
	s.name = (char *)path;
	if (!has_file(&s))
		return refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "file",
			      "No file is listed at or below %.150s.", path);
	return revoke_files(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

int admin_revoke_mounts(struct broker *broker, const struct mounts *mounts, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	static const struct selection_filter filter = { .file = is_on_mount };
	struct selection s = selection_of(broker, &filter);

	s.mounts = *mounts;
	return revoke_files(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

/* A device by its name, as contexts and files have it, or, without one, by its number. */
static bool is_on(const struct context *context, const struct selection *s)
{
	const struct context_description *description = &context->description;

	return s->name ? strcmp(description->device, s->name) == 0 : description->number == s->number;
}

static bool lies_on(const struct file *file, const struct use *use, const struct selection *s)
{
	return s->name && backing_is_on(&file->backing, s->name);
}

static struct selection selection_of_device(struct broker *broker, const char *name, dev_t number)
{
	static const struct selection_filter filter = { .file = lies_on, .context = is_on };
	struct selection s = selection_of(broker, &filter);

	s.name = (char *)name;
	s.number = number;
	return s;
}

static struct context *next_on(const struct selection *s, uint64_t after)
{
	struct context *context = broker_next_context(s->broker, after);

	while (context && !is_on(context, s))
		context = broker_next_context(s->broker, context->id);
	return context;
}

static int revoke_device(const struct selection *s, const char *reason, uint64_t timeout_usec,
			 uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct context *context;
	int r;

	r = revoke_files(s, CAUSE_DEVICE, reason, timeout_usec, ret_id, ret_refusal);
	for (uint64_t after = 0; r == 0 && (context = next_on(s, after)); after = context->id)
		context_withdraw(context, *ret_id);
	return r;
}

int admin_revoke_device(struct broker *broker, const char *name, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	const struct selection s = selection_of_device(broker, name, 0);

	/* that is what contexts without a device have */
	if (!name[0])
		return refuse_parameter(ret_refusal, "device");
	if (!next_on(&s, 0) && !has_file(&s))
		return refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "device",
			      "No context and no file is on a device %.100s.", name);
	return revoke_device(&s, reason, timeout_usec, ret_id, ret_refusal);
}

void admin_remove_device(struct broker *broker, dev_t number)
{
	const struct selection s = selection_of_device(broker, NULL, number);
	struct context *context = next_on(&s, 0);
	struct refusal refusal;
	uint64_t id;
	int r;

	if (!context)
		return;
	r = revoke_device(&s, "it is being removed", 0, &id, &refusal);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins through %s, which is being removed",
			  context->description.device);
}
