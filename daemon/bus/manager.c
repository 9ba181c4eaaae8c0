/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/manager.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/bus/bus.h"
#include "daemon/bus/object.h"
#include "daemon/bus/path.h"
#include "daemon/core/admin.h"
#include "daemon/core/broker.h"
#include "daemon/kernel/search.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* org.pinbroker1.Manager: from messages to the broker and back. */

#define LIST_MAX    1000U  /* objects in one reply */

static int reply_refusal(sd_bus_message *m, int r, const struct refusal *refusal)
{
	sd_bus_error error = SD_BUS_ERROR_NULL;
	char name[80], message[300];

	if (r < 0)
		return sd_bus_reply_method_errno(m, r, NULL);
	if (refusal->kind == REFUSAL_INVALID_PARAMETER)
		snprintf(name, sizeof(name), "%s", SD_BUS_ERROR_INVALID_ARGS);
	else
		snprintf(name, sizeof(name), "org.pinbroker1.Error.%s", refusal_name(refusal));
	if (refusal->kind == REFUSAL_NO_SUCH_OBJECT && refusal->message[0])
		snprintf(message, sizeof(message), "%s", refusal->message);
	else
		refusal_message(refusal, message);
	(void)sd_bus_error_set(&error, name, message);
	r = sd_bus_reply_method_error(m, &error);
	sd_bus_error_free(&error);
	return r;
}

int bus_reply_revocation(sd_bus_message *m, int r, uint64_t id, const struct refusal *refusal)
{
	return r == 0 ? sd_bus_reply_method_return(m, "t", id) : reply_refusal(m, r, refusal);
}

/* --- Revoke* --- */

static int revoke_pins(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct refusal refusal = {};
	const void *pins;
	const char *reason;
	uint64_t timeout, id;
	size_t size;
	int r;

	r = sd_bus_message_read_array(m, 't', &pins, &size);
	if (r >= 0)
		r = sd_bus_message_read(m, "st", &reason, &timeout);
	if (r < 0)
		return r;
	r = admin_revoke_pins(userdata, pins, size / sizeof(uint64_t), reason, timeout, &id,
			      &refusal);
	return bus_reply_revocation(m, r, id, &refusal);
}

#define REVOKE_BY_ID(what)                                                                         \
	static int revoke_##what(sd_bus_message *m, void *userdata, sd_bus_error *error)           \
	{                                                                                          \
		struct refusal refusal = {};                                                       \
		uint64_t object, timeout, id;                                                      \
		const char *reason;                                                                \
		int r;                                                                             \
                                                                                                   \
		r = sd_bus_message_read(m, "tst", &object, &reason, &timeout);                     \
		if (r < 0)                                                                         \
			return r;                                                                  \
		r = admin_revoke_##what(userdata, object, reason, timeout, &id, &refusal);         \
		return bus_reply_revocation(m, r, id, &refusal);                                       \
	}

#define REVOKE_BY_NAME(what)                                                                       \
	static int revoke_##what(sd_bus_message *m, void *userdata, sd_bus_error *error)           \
	{                                                                                          \
		struct refusal refusal = {};                                                       \
		const char *object, *reason;                                                       \
		uint64_t timeout, id;                                                              \
		int r;                                                                             \
                                                                                                   \
		r = sd_bus_message_read(m, "sst", &object, &reason, &timeout);                     \
		if (r < 0)                                                                         \
			return r;                                                                  \
		r = admin_revoke_##what(userdata, object, reason, timeout, &id, &refusal);         \
		return bus_reply_revocation(m, r, id, &refusal);                                       \
	}

REVOKE_BY_ID(file)
REVOKE_BY_ID(client)
REVOKE_BY_NAME(mount)
REVOKE_BY_NAME(device)

static int revoke_inode(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	uint64_t device, inode, timeout, id;
	struct refusal refusal = {};
	const char *reason;
	int r;

	r = sd_bus_message_read(m, "ttst", &device, &inode, &reason, &timeout);
	if (r < 0)
		return r;
	r = admin_revoke_inode(userdata, device, inode, reason, timeout, &id, &refusal);
	return bus_reply_revocation(m, r, id, &refusal);
}

static int revoke_file_system(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct refusal refusal = {};
	struct mounts mounts;
	uint64_t timeout, id;
	const void *others;
	const char *reason;
	size_t size;
	int r;

	r = sd_bus_message_read(m, "t", &mounts.device);
	if (r >= 0)
		r = sd_bus_message_read_array(m, 't', &others, &size);
	if (r >= 0)
		r = sd_bus_message_read(m, "st", &reason, &timeout);
	if (r < 0)
		return r;
	mounts.others = others;
	mounts.n_others = size / sizeof(uint64_t);
	r = admin_revoke_mounts(userdata, &mounts, reason, timeout, &id, &refusal);
	return bus_reply_revocation(m, r, id, &refusal);
}

/* --- List* --- */

struct list {
	uint64_t file, client; /* filters; 0: any */
	uint64_t after;
	uint32_t limit;
};

static int read_filter(sd_bus_message *m, struct list *list)
{
	int r;

	r = sd_bus_message_enter_container(m, 'a', "{sv}");
	while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
		const char *key;

		r = sd_bus_message_read(m, "s", &key);
		if (r >= 0 && strcmp(key, "file") == 0)
			r = sd_bus_message_read(m, "v", "t", &list->file);
		else if (r >= 0 && strcmp(key, "client") == 0)
			r = sd_bus_message_read(m, "v", "t", &list->client);
		else if (r >= 0)
			r = -EINVAL;
		if (r >= 0)
			r = sd_bus_message_exit_container(m);
	}
	return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int read_list(sd_bus_message *m, struct list *list)
{
	int r;

	r = read_filter(m, list);
	if (r >= 0)
		r = sd_bus_message_read(m, "tu", &list->after, &list->limit);
	if (list->limit == 0 || list->limit > LIST_MAX)
		list->limit = LIST_MAX;
	return r;
}

static bool matches(uint64_t wanted, uint64_t id)
{
	return wanted == 0 || wanted == id;
}

static bool matches_client(const struct client *client, const struct list *list)
{
	return matches(list->client, client->id) && list->file == 0;
}

static bool matches_context(const struct context *context, const struct list *list)
{
	return matches_client(context->client, list);
}

static bool matches_file(const struct file *file, const struct list *list)
{
	return matches(list->file, file->id) && list->client == 0;
}

static bool matches_pin(const struct pin *pin, const struct list *list)
{
	return !pin->over && matches(list->file, pin->use->file->id) &&
	       matches(list->client, pin->context->client->id);
}

static bool matches_revocation(const struct revocation *rev, const struct list *list)
{
	return matches(list->file, rev->file) && list->client == 0;
}

static int append_fields(sd_bus_message *m, const struct schema *schema, const void *p);

static int append_field(sd_bus_message *m, const struct field *field, const void *p)
{
	const void *value = (const char *)p + field->offset;
	int r;

	if (field->kind == FIELD_OBJECT) /* a conflict: its fields stand beside the others */
		return append_fields(m, field->schema, value);
	if ((field->kind == FIELD_INT && *(const int64_t *)value == INT_NULL) ||
	    (field->kind == FIELD_STRING && !*(const char *const *)value) ||
	    (field->kind == FIELD_ENUM && *(const int *)value == ENUM_NULL))
		return 0;
	r = sd_bus_message_open_container(m, 'e', "sv");
	if (r >= 0)
		r = sd_bus_message_append(m, "s", field->name);
	if (r >= 0)
		r = sd_bus_message_open_container(m, 'v', bus_field_type(field));
	if (r >= 0)
		r = bus_append_value(m, field, value);
	if (r >= 0)
		r = sd_bus_message_close_container(m);
	return r < 0 ? r : sd_bus_message_close_container(m);
}

/* An object as the socket shows it; the same names, null fields left out. */
static int append_fields(sd_bus_message *m, const struct schema *schema, const void *p)
{
	int r = 0;

	for (size_t i = 0; r >= 0 && i < schema->n_fields; i++)
		r = append_field(m, &schema->fields[i], p);
	return r;
}

static int append_object(sd_bus_message *m, const struct schema *schema, const void *info)
{
	int r;

	r = sd_bus_message_open_container(m, 'a', "{sv}");
	if (r >= 0)
		r = append_fields(m, schema, info);
	return r < 0 ? r : sd_bus_message_close_container(m);
}

/* Replies with aa{sv} and the id to go on after, 0 when that was all. */
#define LIST_METHOD(type)                                                                          \
	static int append_##type##s(sd_bus_message *reply, struct broker *broker,                  \
				    struct list *list)                                             \
	{                                                                                          \
		struct slice slice = slice_begin();                                                \
		uint32_t n = 0;                                                                    \
		int r = 0;                                                                         \
                                                                                                   \
		while (r >= 0) {                                                                   \
			struct type *p = broker_next_##type(broker, list->after);                  \
			struct msg_##type##_info info;                                             \
                                                                                                   \
			if (!p)                                                                    \
				list->after = 0;                                                   \
			if (!p || n == list->limit || slice_is_over(&slice))                       \
				break;                                                             \
			list->after = p->id;                                                       \
			if (!matches_##type(p, list))                                              \
				continue;                                                          \
			type##_info(p, &info);                                                     \
			r = append_object(reply, &schema_msg_##type##_info, &info);                \
			n++;                                                                       \
		}                                                                                  \
		return r;                                                                          \
	}                                                                                          \
	static int list_##type##s(sd_bus_message *m, void *userdata, sd_bus_error *error)          \
	{                                                                                          \
		return reply_list(m, userdata, append_##type##s);                                  \
	}

static int reply_list(sd_bus_message *m, struct broker *broker,
		      int (*append)(sd_bus_message *reply, struct broker *broker,
				    struct list *list))
{
	sd_bus_message *reply = NULL;
	struct list list = {};
	int r;

	r = read_list(m, &list);
	if (r < 0)
		return r;
	r = sd_bus_message_new_method_return(m, &reply);
	if (r >= 0)
		r = sd_bus_message_open_container(reply, 'a', "a{sv}");
	if (r >= 0)
		r = append(reply, broker, &list);
	if (r >= 0)
		r = sd_bus_message_close_container(reply);
	if (r >= 0)
		r = sd_bus_message_append(reply, "t", list.after);
	if (r >= 0)
		r = sd_bus_send(NULL, reply, NULL);
	sd_bus_message_unref(reply);
	return r;
}

LIST_METHOD(pin)
LIST_METHOD(file)
LIST_METHOD(client)
LIST_METHOD(context)
LIST_METHOD(revocation)

/* --- properties --- */

static int get_version(sd_bus *bus, const char *path, const char *interface, const char *property,
		       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
	return sd_bus_message_append(reply, "s", PINBROKER_VERSION);
}

static int get_features(sd_bus *bus, const char *path, const char *interface, const char *property,
			sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
	int r = sd_bus_message_open_container(reply, 'a', "s");

	for (size_t i = 0; r >= 0 && context_kind(i); i++)
		r = sd_bus_message_append(reply, "s", context_kind(i));
	return r < 0 ? r : sd_bus_message_close_container(reply);
}

static int get_restrictions(sd_bus *bus, const char *path, const char *interface, const char *property,
			    sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
	const struct search_powers *powers = search_powers();
	int r = sd_bus_message_open_container(reply, 'a', "s");

	if (r >= 0 && !powers->kcmp)
		r = sd_bus_message_append(reply, "s", "kcmp");
	if (r >= 0 && !powers->others)
		r = sd_bus_message_append(reply, "s", "processes");
	return r < 0 ? r : sd_bus_message_close_container(reply);
}

static int get_counts(sd_bus *bus, const char *path, const char *interface, const char *property,
		      sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
	const struct broker *broker = userdata;

	return sd_bus_message_append(reply, "a{st}", 6, "clients", (uint64_t)broker->n_clients,
				     "files", (uint64_t)broker->n_files, "pins",
				     (uint64_t)broker->n_pins, "revocations",
				     (uint64_t)broker->n_running, "unfinishedJobs",
				     (uint64_t)offload_unfinished(broker->offload),
				     "signalQueueOverflows", broker->n_overflows);
}

#define METHOD(name, in, in_names, out, out_names, handler)                                        \
	SD_BUS_METHOD_WITH_NAMES(name, in, in_names, out, out_names, handler,                      \
				 SD_BUS_VTABLE_UNPRIVILEGED)
#define LIST_ARGS "a{sv}tu", SD_BUS_PARAM(filter) SD_BUS_PARAM(after) SD_BUS_PARAM(limit), \
	"aa{sv}t", SD_BUS_PARAM(objects) SD_BUS_PARAM(after)
#define REVOKE_ARGS(type, what)                                                                    \
	type "st", SD_BUS_PARAM(what) SD_BUS_PARAM(reason) SD_BUS_PARAM(timeoutUSec), "t",         \
		SD_BUS_PARAM(revocation)
#define EXPAND(macro, ...) macro(__VA_ARGS__)

/* UNPRIVILEGED: sd-bus would ask for the sender's credentials and wait; authorization.c does not. */
static const sd_bus_vtable manager_vtable[] = {
	SD_BUS_VTABLE_START(0),
	EXPAND(METHOD, "ListPins", LIST_ARGS, list_pins),
	EXPAND(METHOD, "ListFiles", LIST_ARGS, list_files),
	EXPAND(METHOD, "ListClients", LIST_ARGS, list_clients),
	EXPAND(METHOD, "ListContexts", LIST_ARGS, list_contexts),
	EXPAND(METHOD, "ListRevocations", LIST_ARGS, list_revocations),
	EXPAND(METHOD, "RevokePins", REVOKE_ARGS("at", pins), revoke_pins),
	EXPAND(METHOD, "RevokeFile", REVOKE_ARGS("t", file), revoke_file),
	METHOD("RevokeInode", "ttst",
	       SD_BUS_PARAM(device) SD_BUS_PARAM(inode) SD_BUS_PARAM(reason)
		       SD_BUS_PARAM(timeoutUSec),
	       "t", SD_BUS_PARAM(revocation), revoke_inode),
	EXPAND(METHOD, "RevokePath", REVOKE_ARGS("s", path), bus_revoke_path),
	EXPAND(METHOD, "RevokeClient", REVOKE_ARGS("t", client), revoke_client),
	EXPAND(METHOD, "RevokeMount", REVOKE_ARGS("s", path), revoke_mount),
	METHOD("RevokeFileSystem", "tatst",
	       SD_BUS_PARAM(fileSystem) SD_BUS_PARAM(otherMounts) SD_BUS_PARAM(reason)
		       SD_BUS_PARAM(timeoutUSec),
	       "t", SD_BUS_PARAM(revocation), revoke_file_system),
	EXPAND(METHOD, "RevokeDevice", REVOKE_ARGS("s", device), revoke_device),
	SD_BUS_PROPERTY("Version", "s", get_version, 0, SD_BUS_VTABLE_PROPERTY_CONST),
	SD_BUS_PROPERTY("Features", "as", get_features, 0, SD_BUS_VTABLE_PROPERTY_CONST),
	SD_BUS_PROPERTY("Restrictions", "as", get_restrictions, 0, SD_BUS_VTABLE_PROPERTY_CONST),
	SD_BUS_PROPERTY("Counts", "a{st}", get_counts, 0, 0),
	SD_BUS_SIGNAL_WITH_NAMES("RevocationStarted", "t", SD_BUS_PARAM(revocation), 0),
	SD_BUS_SIGNAL_WITH_NAMES("RevocationEnded", "ts",
				 SD_BUS_PARAM(revocation) SD_BUS_PARAM(outcome), 0),
	SD_BUS_SIGNAL_WITH_NAMES("Revoke", "tttsatttsust",
				 SD_BUS_PARAM(revocation) SD_BUS_PARAM(client) SD_BUS_PARAM(file)
					 SD_BUS_PARAM(path) SD_BUS_PARAM(pins) SD_BUS_PARAM(offset)
						 SD_BUS_PARAM(length) SD_BUS_PARAM(cause)
							 SD_BUS_PARAM(pid) SD_BUS_PARAM(comm)
								 SD_BUS_PARAM(deadlineUSec),
				 0),
	SD_BUS_VTABLE_END,
};

int bus_manager_add(sd_bus *bus, struct broker *broker)
{
	return sd_bus_add_object_vtable(bus, NULL, BUS_PATH, BUS_INTERFACE, manager_vtable, broker);
}
