/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <string.h>

enum { OPTION_FILE = OPTION_VERB, OPTION_CLIENT };

static bool list_wants(const struct list *list, uint64_t id)
{
	for (size_t i = 0; i < list->n_ids; i++)
		if (list->ids[i] == id) {
			if (list->found)
				list->found[i] = true;
			return true;
		}
	return !list->ids;
}

static void table_size(struct table *t, uint64_t size)
{
	char text[32];

	format_size(size, text);
	table_number_as(t, size, text);
}

static void table_when(struct table *t, uint64_t usec)
{
	char text[64];

	format_when(usec, text, sizeof(text));
	table_number_as(t, usec, text);
}

static const struct column pin_columns[] = {
	{"PIN", "pin", COLUMN_RIGHT},
	{"CLIENT", "client", COLUMN_RIGHT},
	{"FILE", "file", COLUMN_RIGHT},
	{"CONTEXT", "context", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"OFFSET", "offset", COLUMN_RIGHT},
	{"LENGTH", "length", COLUMN_RIGHT},
	{"ACCESS", "access"},
	{"STATE", "state"},
	{"ON-DEMAND", "onDemand", COLUMN_OPTIONAL},
	{"HANDLE", "handle", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"REVOCATION", "revocation", COLUMN_RIGHT},
	{"LABEL", "label", COLUMN_FLEXIBLE},
	{"PATH", "path", COLUMN_FLEXIBLE | COLUMN_TAIL},
};

static int add_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct list *list = userdata;
	struct table *t = list->table;

	if (!list_wants(list, info->pin))
		return 0;
	table_number(t, info->pin);
	table_number(t, info->client);
	table_number(t, info->file);
	table_number(t, info->context);
	table_size(t, info->offset);
	table_size(t, info->length);
	table_string(t, pinbroker_access_name(info->access));
	table_string(t, pinbroker_pin_state_name(info->state));
	table_bool(t, info->on_demand);
	table_number(t, info->handle);
	table_number(t, info->revocation);
	table_string(t, info->label);
	table_string(t, info->path);
	return 0;
}

static int list_pins(struct list *list)
{
	list->table = table_new(pin_columns, ELEMENTS(pin_columns));
	return pinbroker_list_pins(list->pb, list->file, list->client, add_pin, list);
}

static const struct column file_columns[] = {
	{"FILE", "file", COLUMN_RIGHT},
	{"FILESYSTEM", "fileSystem"},
	{"BACKING", "kind", COLUMN_OPTIONAL},
	{"ON", "deviceName", COLUMN_OPTIONAL},
	{"NAMESPACE", "namespace", COLUMN_JSON_ONLY},
	{"REGION", "region", COLUMN_JSON_ONLY},
	{"NODE", "numaNode", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"DEVICE", "device", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"INODE", "inode", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"SIZE", "size", COLUMN_RIGHT},
	{"ACCESS", "access", COLUMN_OPTIONAL},
	{"LEASE", "lease"},
	{"SETTLED", "settledUSec"},
	{"EXPOSED", "exposed"},
	{"CLIENTS", "clients", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"PINS", "pins", COLUMN_RIGHT},
	{"PATH", "path", COLUMN_FLEXIBLE | COLUMN_TAIL},
};

static int add_file(const struct pinbroker_file_info *info, void *userdata)
{
	struct list *list = userdata;
	struct table *t = list->table;

	if (!list_wants(list, info->file))
		return 0;
	table_number(t, info->file);
	table_string(t, info->file_system);
	table_string(t, pinbroker_backing_name(info->backing));
	table_string(t, info->device_name);
	table_string(t, info->nvdimm_namespace);
	table_string(t, info->nvdimm_region);
	table_number(t, info->numa_node);
	table_number(t, info->device);
	table_number(t, info->inode);
	table_size(t, info->size);
	table_string(t, pinbroker_access_name(info->access));
	table_string(t, pinbroker_lease_state_name(info->lease));
	table_when(t, info->settled_usec);
	table_bool(t, info->exposed);
	table_number(t, info->n_clients);
	table_number(t, info->n_pins);
	table_string(t, info->path);
	return 0;
}

static int list_files(struct list *list)
{
	list->table = table_new(file_columns, ELEMENTS(file_columns));
	return pinbroker_list_files(list->pb, add_file, list);
}

static const struct column client_columns[] = {
	{"CLIENT", "client", COLUMN_RIGHT},
	{"PID", "pid", COLUMN_RIGHT},
	{"UID", "uid", COLUMN_RIGHT},
	{"COMM", "comm", COLUMN_FLEXIBLE},
	{"NAME", "name", COLUMN_FLEXIBLE},
	{"UNIT", "unit", COLUMN_FLEXIBLE | COLUMN_OPTIONAL},
	{"BUS", "busName", COLUMN_JSON_ONLY},
	{"ALIVE", "alive"},
	{"CONNECTED", "connected", COLUMN_OPTIONAL},
	{"FILES", "files", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"CONTEXTS", "contexts", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"PINS", "pins", COLUMN_RIGHT},
	{"PINNED", "pinnedBytes", COLUMN_RIGHT},
};

static int add_client(const struct pinbroker_client_info *info, void *userdata)
{
	struct list *list = userdata;
	struct table *t = list->table;

	if (!list_wants(list, info->client))
		return 0;
	table_number(t, info->client);
	table_number(t, (uint64_t)info->pid);
	table_number(t, info->uid);
	table_string(t, info->comm);
	table_string(t, info->name);
	table_string(t, info->unit);
	table_string(t, info->bus_name);
	table_bool(t, info->alive);
	table_bool(t, info->connected);
	table_number(t, info->n_files);
	table_number(t, info->n_contexts);
	table_number(t, info->n_pins);
	table_size(t, info->pinned_bytes);
	return 0;
}

static int list_clients(struct list *list)
{
	list->table = table_new(client_columns, ELEMENTS(client_columns));
	return pinbroker_list_clients(list->pb, add_client, list);
}

static const struct column context_columns[] = {
	{"CONTEXT", "context", COLUMN_RIGHT},
	{"CLIENT", "client", COLUMN_RIGHT},
	{"KIND", "kind"},
	{"DEVICE", "device"},
	{"FORCIBLE", "forcible"},
	{"PROOF", "proof"},
	{"PINS", "pins", COLUMN_RIGHT},
	{"LABEL", "label", COLUMN_FLEXIBLE},
};

static int add_context(const struct pinbroker_context_info *info, void *userdata)
{
	struct list *list = userdata;
	struct table *t = list->table;

	if (!list_wants(list, info->context))
		return 0;
	table_number(t, info->context);
	table_number(t, info->client);
	table_string(t, info->kind);
	table_string(t, info->device);
	table_bool(t, info->forcible);
	table_string(t, pinbroker_proof_name(info->proof));
	table_number(t, info->n_pins);
	table_string(t, info->label);
	return 0;
}

static int list_contexts(struct list *list)
{
	list->table = table_new(context_columns, ELEMENTS(context_columns));
	return pinbroker_list_contexts(list->pb, list->client, add_context, list);
}

static const struct column revocation_columns[] = {
	{"REVOCATION", "revocation", COLUMN_RIGHT},
	{"STATE", "state"},
	{"CAUSE", "cause"},
	{"OFFSET", "offset", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"LENGTH", "length", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"SIZE", "size", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"PID", "pid", COLUMN_RIGHT},
	{"UID", "uid", COLUMN_RIGHT | COLUMN_OPTIONAL},
	{"COMM", "comm", COLUMN_FLEXIBLE},
	{"REASON", "reason", COLUMN_FLEXIBLE | COLUMN_OPTIONAL},
	{"STARTED", "startUSec", COLUMN_OPTIONAL},
	{"", "deadlineUSec", COLUMN_JSON_ONLY},
	{"ENDS", "endUSec"},
	{"PINS", "pins", COLUMN_RIGHT},
	{"LEFT", "remaining", COLUMN_RIGHT},
	{"PROOF", "proof", COLUMN_OPTIONAL},
	{"FILE", "file", COLUMN_RIGHT | COLUMN_JSON_ONLY},
	{"PATH", "path", COLUMN_FLEXIBLE | COLUMN_TAIL},
};

static int add_revocation(const struct pinbroker_revocation_info *info, void *userdata)
{
	struct list *list = userdata;
	struct table *t = list->table;
	char ends[64];

	if (!list_wants(list, info->revocation))
		return 0;
	table_number(t, info->revocation);
	table_string(t, pinbroker_revocation_state_name(info->state));
	table_string(t, pinbroker_cause_name(info->cause));
	table_number(t, info->offset);
	table_number(t, info->length);
	table_number(t, info->size);
	table_number(t, info->pid > 0 ? (uint64_t)info->pid : PINBROKER_UNKNOWN);
	table_number(t, info->uid != PINBROKER_NO_UID ? info->uid : PINBROKER_UNKNOWN);
	table_string(t, info->comm);
	table_string(t, info->reason);
	table_when(t, info->start_usec);
	table_when(t, info->deadline_usec);
	/* Of one that runs: when it will have, at the latest, or go on by force. */
	format_when(info->end_usec != PINBROKER_UNKNOWN ? info->end_usec : info->deadline_usec,
		ends, sizeof(ends));
	table_number_as(t, info->end_usec, ends);
	table_number(t, info->n_pins);
	table_number(t, info->n_remaining);
	table_string(t, info->has_proof ? pinbroker_proof_name(info->proof) : NULL);
	table_number(t, info->file);
	table_string(t, info->path);
	return 0;
}

static int list_revocations(struct list *list)
{
	list->table = table_new(revocation_columns, ELEMENTS(revocation_columns));
	return pinbroker_list_revocations(list->pb, add_revocation, list);
}

const struct list_kind list_kinds[LIST_KINDS] = {
	{"pin", "pins", list_pins, .by_file = true, .by_client = true},
	{"file", "files", list_files},
	{"client", "clients", list_clients},
	{"context", "contexts", list_contexts, .by_client = true},
	{"revocation", "revocations", list_revocations},
};

int list_fill(struct list *list, const struct list_kind *kind)
{
	int r = kind->fill(list);

	if (r >= 0)
		return 0;
	return fail_call(list->pb, reaching(list->pb, r), "Cannot list the %s", kind->plural);
}

static int list_run(struct ctl *ctl, struct list *list, const char *what)
{
	const struct list_kind *kind = NULL;
	int r;

	for (size_t i = 0; i < LIST_KINDS; i++)
		if (strcmp(what, list_kinds[i].plural) == 0)
			kind = &list_kinds[i];
	if (!kind)
		return fail_usage("pins, files, clients, contexts or revocations can be listed, not %s.",
			visible(what));
	if ((list->file != 0 && !kind->by_file) || (list->client != 0 && !kind->by_client))
		return fail_usage("%s are not listed by %s.", what,
			list->file != 0 && !kind->by_file ? "--file" : "--client");
	r = ctl_client(ctl, &list->pb);
	if (r == 0)
		r = list_fill(list, kind);
	if (r == 0)
		table_print(list->table, ctl, what);
	return r;
}

static int list_parse(struct ctl *ctl, struct list *list, int argc, char *argv[])
{
	static const struct option options[] = {
		{"file", required_argument, NULL, OPTION_FILE},
		{"client", required_argument, NULL, OPTION_CLIENT},
		COMMON_OPTIONS,
	};
	int c, r;

	while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
		r = -1;
		switch (c) {
		case OPTION_FILE:
			if (!parse_id(optarg, &list->file))
				r = fail_usage("--file is the id of a file, not %s.", visible(optarg));
			break;
		case OPTION_CLIENT:
			if (!parse_id(optarg, &list->client))
				r = fail_usage("--client is the id of a client, not %s.", visible(optarg));
			break;
		default:
			r = ctl_common_option(ctl, c);
		}
		if (r >= 0)
			return r;
	}
	return -1;
}

int ctl_list(struct ctl *ctl, int argc, char *argv[])
{
	struct list list = {};
	int r;

	r = list_parse(ctl, &list, argc, argv);
	if (r >= 0)
		return r;
	if (argc - optind > 1)
		return fail_usage("One kind of object can be listed at a time.");
	r = list_run(ctl, &list, optind < argc ? argv[optind] : "pins");
	table_free(list.table);
	pinbroker_unref(list.pb);
	return r;
}
