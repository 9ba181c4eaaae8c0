/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "admin.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "broker.h"
#include "log.h"
#include "macro.h"

struct selection {
	struct broker *broker;
	struct pin **pins; /* owned */
	size_t n;
};

static void selection_clear(struct selection *s)
{
	free(s->pins);
}

static int selection_init(struct selection *s, struct broker *broker, size_t n_max)
{
	s->broker = broker;
	s->pins = calloc(n_max + 1, sizeof(*s->pins));
	return s->pins ? 0 : -ENOMEM;
}

/* Is it one of those that are meant? use: what one client has of it, as clients may have opened it in several ways;
 * NULL: the broker's own. */
typedef bool (*file_filter)(const struct file *file, const struct use *use, const void *wanted);

/* filter: NULL: all pins */
static void select_file(struct selection *s, struct file *file, file_filter filter,
			const void *wanted)
{
	struct pin *pin = NULL;

	while ((pin = pin_ranges_find(&file->pins, 0, UINT64_MAX, pin)))
		if (!filter || filter(file, pin->use, wanted))
			s->pins[s->n++] = pin;
}

static void select_context(struct selection *s, struct context *context)
{
	struct pin *pin;

	LIST_FOREACH(pin, &context->pins, of_context)
		if (!pin->over)
			s->pins[s->n++] = pin;
}

static int start_revocation(struct selection *s, enum cause cause, const char *reason, uint64_t timeout_usec,
		  uint64_t *ret_id, struct refusal *ret_refusal)
{
	struct conflict conflict = conflict_new(cause);

	if (s->broker->stopping)
		return refuse(ret_refusal, REFUSAL_BUSY, "shutdown", "The broker is shutting down.");
	snprintf(conflict.reason, sizeof(conflict.reason), "%s", reason);
	return revocation_start(s->broker, NULL, false, &conflict, s->pins, s->n,
				timeout_usec == 0 ? UINT64_MAX : timeout_usec, false, ret_id);
}

int admin_revoke_pins(struct broker *broker, const uint64_t *pins, size_t n_pins,
		      const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
		      struct refusal *ret_refusal)
{
	_cleanup_(selection_clear) struct selection s = {};
	int r;

	r = selection_init(&s, broker, n_pins);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_pins; i++) {
		struct pin *pin = broker_find_pin(broker, pins[i]);

		if (!pin || pin->over)
			return refuse_no_such(ret_refusal, "pin", pins[i]);
		s.pins[s.n++] = pin;
	}
	return start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

static int revoke_file(struct file *file, const char *reason, uint64_t timeout_usec,
		       uint64_t *ret_id, struct refusal *ret_refusal)
{
	_cleanup_(selection_clear) struct selection s = {};
	int r;

	r = selection_init(&s, file->broker, file->n_pins);
	if (r < 0)
		return r;
	select_file(&s, file, NULL, NULL);
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

int admin_revoke_client(struct broker *broker, uint64_t id, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	_cleanup_(selection_clear) struct selection s = {};
	struct client *client = broker_find_client(broker, id);
	struct context *context;
	int r;

	if (!client)
		return refuse_no_such(ret_refusal, "client", id);
	r = selection_init(&s, broker, client->n_pins);
	if (r < 0)
		return r;
	LIST_FOREACH(context, &client->contexts, of_client)
		select_context(&s, context);
	return start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
}

static bool is_below(const struct file *file, const struct use *use, const void *wanted)
{
	const char *path = file->path, *directory = wanted;
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
static bool is_on_mount(const struct file *file, const struct use *use, const void *wanted)
{
	const struct mounts *mounts = wanted;

	return file->mount_device == mounts->device &&
	       (is_through(mounts, file->mount) || (use && is_through(mounts, use->mount)));
}

static void select_files(struct selection *s, file_filter filter, const void *wanted)
{
	struct file *file;
	uint64_t after = 0;

	while ((file = broker_next_file(s->broker, after))) {
		after = file->id;
		select_file(s, file, filter, wanted);
	}
}

static bool has_file(struct broker *broker, file_filter filter, const void *wanted)
{
	struct file *file = broker_next_file(broker, 0);

	while (file && !filter(file, NULL, wanted))
		file = broker_next_file(broker, file->id);
	return file;
}

static void withdraw_uses(struct file *file, file_filter filter, const void *wanted,
			  uint64_t revocation)
{
	struct use *use, *next;

	for (use = LIST_FIRST(&file->uses); use; use = next) {
		next = LIST_NEXT(use, of_file);
		if (filter(file, use, wanted))
			use_withdraw(use, revocation);
	}
	file_collect(file);
}

static void withdraw_files(struct broker *broker, file_filter filter, const void *wanted,
			   uint64_t revocation)
{
	struct file *file;
	uint64_t after = 0;

	while ((file = broker_next_file(broker, after))) {
		after = file->id;
		if (filter(file, NULL, wanted))
			file_withdraw(file, revocation);
		else
			withdraw_uses(file, filter, wanted, revocation);
	}
}

static int revoke_files(struct broker *broker, file_filter filter, const void *wanted,
			const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
			struct refusal *ret_refusal)
{
	_cleanup_(selection_clear) struct selection s = {};
	int r;

	r = selection_init(&s, broker, broker->n_pins);
	if (r < 0)
		return r;
	select_files(&s, filter, wanted);
	r = start_revocation(&s, CAUSE_ADMIN, reason, timeout_usec, ret_id, ret_refusal);
	if (r == 0)
		withdraw_files(broker, filter, wanted, *ret_id);
	return r;
}

int admin_revoke_mount(struct broker *broker, const char *path, const char *reason,
		       uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	if (path[0] != '/')
		return refuse_parameter(ret_refusal, "path");
	if (!has_file(broker, is_below, path))
		return refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "file",
			      "No file is listed at or below %.150s.", path);
	return revoke_files(broker, is_below, path, reason, timeout_usec, ret_id, ret_refusal);
}

int admin_revoke_mounts(struct broker *broker, const struct mounts *mounts, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	return revoke_files(broker, is_on_mount, mounts, reason, timeout_usec, ret_id, ret_refusal);
}
/* A device by its name, as contexts and files have it, or, without one, by its number. */
struct device {
	const char *name;
	dev_t number;
};

static bool is_on(const struct context *context, const struct device *device)
{
	const struct context_description *description = &context->description;

	return device->name ? strcmp(description->device, device->name) == 0
			    : description->number == device->number;
}

static bool lies_on(const struct file *file, const struct use *use, const void *wanted)
{
	const struct device *device = wanted;

	return device->name && backing_is_on(&file->backing, device->name);
}

static struct context *next_on(struct broker *broker, const struct device *device, uint64_t after)
{
	struct context *context = broker_next_context(broker, after);

	while (context && !is_on(context, device))
		context = broker_next_context(broker, context->id);
	return context;
}

static int revoke_device(struct broker *broker, const struct device *device, const char *reason,
			 uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	_cleanup_(selection_clear) struct selection s = {};
	struct context *context;
	uint64_t after = 0;
	int r;

	/* a pin may be there both by its file and by its context */
	r = selection_init(&s, broker, 2 * (size_t)broker->n_pins);
	if (r < 0)
		return r;
	select_files(&s, lies_on, device);
	for (; (context = next_on(broker, device, after)); after = context->id)
		select_context(&s, context);
	r = start_revocation(&s, CAUSE_DEVICE, reason, timeout_usec, ret_id, ret_refusal);
	if (r != 0)
		return r;
	withdraw_files(broker, lies_on, device, *ret_id);
	for (after = 0; (context = next_on(broker, device, after)); after = context->id)
		context_withdraw(context, *ret_id);
	return 0;
}

int admin_revoke_device(struct broker *broker, const char *name, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal)
{
	const struct device device = { .name = name };

	/* that is what contexts without a device have */
	if (!name[0])
		return refuse_parameter(ret_refusal, "device");
	if (!next_on(broker, &device, 0) && !has_file(broker, lies_on, &device))
		return refuse(ret_refusal, REFUSAL_NO_SUCH_OBJECT, "device",
			      "No context and no file is on a device %.100s.", name);
	return revoke_device(broker, &device, reason, timeout_usec, ret_id, ret_refusal);
}

void admin_remove_device(struct broker *broker, dev_t number)
{
	const struct device device = { .number = number };
	struct context *context = next_on(broker, &device, 0);
	struct refusal refusal;
	uint64_t id;
	int r;

	if (!context)
		return;
	r = revoke_device(broker, &device, "it is being removed", 0, &id, &refusal);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot revoke the pins through %s, which is being removed",
			  context->description.device);
}
