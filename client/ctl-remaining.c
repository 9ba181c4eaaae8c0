/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-remaining.h"

#include <string.h>

struct remaining {
	pinbroker *pb;
	const struct target *target;
	uint64_t *contexts; /* owned; of the target's device */
	size_t n_contexts;
	uint64_t *files; /* owned; the target's */
	size_t n_files;
	json_object *array; /* owned */
};

static bool is_among(uint64_t id, const uint64_t *ids, size_t n_ids)
{
	for (size_t i = 0; i < n_ids; i++)
		if (ids[i] == id)
			return true;
	return false;
}

static bool is_wanted(const struct remaining *rm, const struct pinbroker_pin_info *info)
{
	const struct target *t = rm->target;

	if (t->path)
		return is_among(info->file, rm->files, rm->n_files);
	if (t->device_name)
		return is_among(info->context, rm->contexts, rm->n_contexts);
	if (t->client > 0)
		return info->client == t->client;
	return is_among(info->pin, t->pins, t->n_pins);
}

static int add_context(const struct pinbroker_context_info *info, void *userdata)
{
	struct remaining *rm = userdata;

	if (!info->device || strcmp(info->device, rm->target->device_name) != 0)
		return 0;
	rm->contexts = must(realloc(rm->contexts, (rm->n_contexts + 1) * sizeof(*rm->contexts)));
	rm->contexts[rm->n_contexts++] = info->context;
	return 0;
}

/* Which of those on a mount are through another is not listed: where there are such, paths say it. */
static int add_file(const struct pinbroker_file_info *info, void *userdata)
{
	struct remaining *rm = userdata;
	const struct target *t = rm->target;
	bool wanted = info->device == t->device;

	if (t->mount)
		wanted = (wanted && t->n_others == 0) || is_below(info->path, t->mount->point);
	else
		wanted &= info->inode == t->inode;
	if (!wanted)
		return 0;
	rm->files = must(realloc(rm->files, (rm->n_files + 1) * sizeof(*rm->files)));
	rm->files[rm->n_files++] = info->file;
	return 0;
}

static int add_client(const struct pinbroker_client_info *info, void *userdata)
{
	json_object *o = userdata, *client;

	if (!json_object_object_get_ex(o, "client", &client) ||
		info->client != (uint64_t)json_object_get_int64(client))
		return 0;
	json_add_string(o, "comm", info->comm);
	json_add_number(o, "pid", (uint64_t)info->pid);
	json_add_number(o, "uid", info->uid);
	json_add_bool(o, "alive", info->alive);
	return 1;
}

static int add_remaining(const struct pinbroker_pin_info *info, void *userdata)
{
	struct remaining *rm = userdata;
	json_object *o;

	if (!is_wanted(rm, info))
		return 0;
	o = must(json_object_new_object());
	json_add_number(o, "pin", info->pin);
	json_add_string(o, "path", info->path);
	json_add_number(o, "client", info->client);
	json_object_array_add(rm->array, o);
	return 0;
}

json_object *remaining_list(const struct ctl *ctl, const struct target *target)
{
	struct remaining rm = {.target = target};
	int r = 0;

	if (ctl_client(ctl, &rm.pb) > 0)
		return NULL;
	rm.array = must(json_object_new_array());
	if (target->device_name)
		r = pinbroker_list_contexts(rm.pb, 0, add_context, &rm);
	if (target->path)
		r = pinbroker_list_files(rm.pb, add_file, &rm);
	if (r >= 0)
		r = pinbroker_list_pins(rm.pb, 0, 0, add_remaining, &rm);
	for (size_t i = 0; i < json_object_array_length(rm.array) && r >= 0; i++)
		r = pinbroker_list_clients(
			rm.pb, add_client, json_object_array_get_idx(rm.array, i));
	if (r < 0) {
		fail_call(rm.pb, r, "Cannot list who remains");
		json_object_put(rm.array);
		rm.array = NULL;
	}
	pinbroker_unref(rm.pb);
	free(rm.contexts);
	free(rm.files);
	return rm.array;
}

static const char *string_of(json_object *o, const char *key)
{
	json_object *value = NULL;

	json_object_object_get_ex(o, key, &value);
	return value ? json_object_get_string(value) : "?";
}

void remaining_say(json_object *array)
{
	for (size_t i = 0; i < json_object_array_length(array); i++) {
		json_object *o = json_object_array_get_idx(array, i);
		_cleanup_(freep) char *path = escape_text(string_of(o, "path"));
		_cleanup_(freep) char *comm = escape_text(string_of(o, "comm"));

		fprintf(stderr, "  pin %s on %s, held by client %s (%s, pid %s, uid %s)\n",
			string_of(o, "pin"), path, string_of(o, "client"), comm,
			string_of(o, "pid"), string_of(o, "uid"));
	}
	if (json_object_array_length(array) == 0)
		fputs("  Nothing: the last pins have ended meanwhile.\n", stderr);
}
