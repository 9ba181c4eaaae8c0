/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/state/restore.h"

#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "daemon/core/admin.h"
#include "daemon/core/broker.h"
#include "daemon/kernel/access.h"
#include "daemon/kernel/freeze.h"
#include "daemon/manager/notify.h"
#include "daemon/state/journal.h"
#include "daemon/state/reader.h"
#include "daemon/state/record.h"
#include "daemon/util/label.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* How long holders without pins are waited for. */
#define RESUME_USEC (60 * USEC_PER_SEC)

struct restorer {
	struct broker *broker;
	struct state_reader reader;
	struct kept_descriptor *kept;
	size_t n_kept;
	unsigned n_lost; /* objects that could not be taken up */
	struct label *label; /* the last one */
};

/* ---- Building ---- */

static int compare_kept(const void *a, const void *b)
{
	const struct kept_descriptor *ka = a, *kb = b;

	if (ka->kind != kb->kind)
		return ka->kind < kb->kind ? -1 : 1;
	return ka->id < kb->id ? -1 : ka->id > kb->id;
}

static void sort_kept(struct restorer *r)
{
	for (size_t i = 0; i < r->n_kept; i++) {
		if (!store_parse_name(r->kept[i].name, &r->kept[i].kind, &r->kept[i].id))
			r->kept[i].kind = 0;
		else
			ids_pass(&r->broker->ids, r->kept[i].id);
	}
	if (r->n_kept > 0)
		qsort(r->kept, r->n_kept, sizeof(*r->kept), compare_kept);
}

static struct kept_descriptor *find_kept(struct restorer *r, char kind, uint64_t id)
{
	const struct kept_descriptor key = { .kind = kind, .id = id };

	return r->n_kept > 0 ? bsearch(&key, r->kept, r->n_kept, sizeof(key), compare_kept) : NULL;
}

static int read_enumeration(const struct record *record, const char *key,
			    const struct enumeration *enumeration, bool *bad)
{
	const char *name = record_string(record, key);
	int value = name ? enumeration_value(enumeration, name) : -1;

	if (value < 0)
		*bad = true;
	return value < 0 ? 0 : value;
}

static int copy_string(const struct record *record, const char *key, char **ret)
{
	const char *value = record_string(record, key);

	*ret = value ? strdup(value) : NULL;
	return value && !*ret ? -ENOMEM : 0;
}

/* Into an array of char: empty if it is not there. */
#define COPY(array, record, key) copy_array(array, sizeof(array), record, key)

static void copy_array(char *array, size_t size, const struct record *record, const char *key)
{
	const char *value = record_string(record, key);

	snprintf(array, size, "%s", value ? value : "");
}

static int read_groups(const struct record *record, struct process *process)
{
	const char *p = record_string(record, "groups");
	size_t n = 1;

	if (!p || !*p)
		return 0;
	for (const char *q = p; *q; q++)
		n += *q == ',';
	process->groups = calloc(n, sizeof(gid_t));
	if (!process->groups)
		return -ENOMEM;
	while (process->n_groups < n) {
		char *end;

		process->groups[process->n_groups++] = (gid_t)strtoul(p, &end, 10);
		if (end == p || (*end && *end != ','))
			return -EBADMSG;
		p = end + 1;
	}
	return 0;
}

static int read_process(const struct record *record, struct process *process)
{
	bool bad = false;
	int error;

	*process = (struct process){
		.pidfd = -1,
		.pid = (pid_t)record_unsigned(record, "pid", 0, &bad),
		.uid = (uid_t)record_unsigned(record, "uid", 0, &bad),
		.gid = (gid_t)record_unsigned(record, "gid", 0, &bad),
		.start_time = record_unsigned(record, "start", 0, &bad),
	};
	COPY(process->comm, record, "comm");
	error = bad || process->pid <= 0 ? -EBADMSG : read_groups(record, process);
	if (error >= 0)
		error = copy_string(record, "unit", &process->unit);
	return error < 0 ? error : process_reopen(process);
}

static int restore_client(struct restorer *r, uint64_t id, const struct record *record)
{
	const char *token = record_string(record, "token");
	struct client *client;
	struct process process;
	struct refusal refusal;
	struct user *user;
	int error;

	if (!token || strlen(token) != CLIENT_TOKEN_SIZE - 1)
		return -EBADMSG;
	error = read_process(record, &process);
	if (error >= 0)
		error = user_get(r->broker->users, process.uid, &user);
	if (error < 0) {
		process_clear(&process);
		return error;
	}
	ids_give(&r->broker->ids, id);
	error = client_new(r->broker, user, &process, &client, &refusal);
	user_unref(user);
	if (error != 0) {
		process_clear(&process);
		return error;
	}
	client->restored = true;
	memcpy(client->token, token, CLIENT_TOKEN_SIZE);
	error = copy_string(record, "name", &client->name);
	return error < 0 ? error : copy_string(record, "bus-name", &client->bus_name);
}

static int restore_file(struct restorer *r, uint64_t id, const struct record *record)
{
	struct kept_descriptor *kept = find_kept(r, STORE_FILE, id);
	int fd = kept ? kept->fd : -1;
	const char *path = record_string(record, "path");
	bool bad = !path;
	struct lease lease = { .fd = -1 };
	struct probe probe = {
		.device = record_unsigned(record, "device", 0, &bad),
		.inode = record_unsigned(record, "inode", 0, &bad),
		.mount = record_unsigned(record, "mount", 0, &bad),
		.size = record_unsigned(record, "size", 0, &bad),
		.path = (char *)path,
		.backing.numa_node = (int)record_signed(record, "node", -1, &bad),
	};
	bool shared, tampered;
	struct file *file;
	struct stat st;
	int error;

	state_reader_find(&r->reader, (const uint64_t[2]){ id })->path = path;
	probe.mount_device = record_unsigned(record, "mount-device", probe.device, &bad);
	probe.backing.kind = (enum backing_kind)read_enumeration(record, "backing",
								 &enumeration_backing_kind, &bad);
	COPY(probe.backing.device, record, "block-device");
	COPY(probe.backing.nvdimm_namespace, record, "namespace");
	COPY(probe.backing.region, record, "region");
	COPY(probe.file_system, record, "file-system");
	lease.access = (enum access)read_enumeration(record, "access", &enumeration_access, &bad);
	lease.state = (enum lease_state)read_enumeration(record, "lease", &enumeration_lease_state,
							 &bad);
	lease.settled_usec = record_unsigned(record, "settled", r->reader.since_usec, &bad);
	lease.broken_usec = record_unsigned(record, "broken", r->reader.since_usec, &bad);
	shared = record_unsigned(record, "shared", 0, &bad);
	tampered = record_unsigned(record, "tampered", 0, &bad);
	if (bad)
		return -EBADMSG;
	/* It was being opened, and nobody was told of it; or, if somebody uses it, it is lost to those. */
	if (fd < 0)
		return 0;
	if (fstat(fd, &st) < 0)
		return -errno;
	if (st.st_dev != probe.device || st.st_ino != probe.inode)
		return -ESTALE;
	ids_give(&r->broker->ids, id);
	error = file_new(r->broker, &probe, &file);
	if (error < 0)
		return error;
	lease.fd = TAKE_FD(kept->fd);
	file_resume(file, &lease);
	sharing_resume(file, shared, tampered);
	return 0;
}

static void log_lost(struct restorer *r, const struct client *client, const char *what, uint64_t id,
		     const char *path)
{
	struct log_fields fields = client_fields(client);

	fields.path = path;
	r->n_lost++;
	log_event(LOG_CRIT, MESSAGE_LEASE_LOST, &fields,
		  "%s %" PRIu64 " of %s (pid %d) was lost by the restart: nothing protects %s any more.", what,
		  id, client->process.comm, client->process.pid, path ? path : "it");
}

/* The client is told when it resumes, and whenever it does so, until it has let go. */
static int lose_use(struct restorer *r, struct client *client, uint64_t file_id,
		    const struct record *record)
{
	const struct entry *file = state_reader_find(&r->reader, (const uint64_t[2]){ file_id });
	const char *path = record_string(record, "path");
	bool bad = false;
	uint64_t lost = record_unsigned(record, "lost", 0, &bad);

	if (!path && file)
		path = file->path;
	if (lost == 0 || lost > IDS_MAX || bad) {
		lost = broker_next_id(r->broker);
		log_lost(r, client, "File", file_id, path);
	}
	ids_pass(&r->broker->ids, lost);
	return client_add_lost_use(client, file_id, lost, path);
}

static int restore_use(struct restorer *r, const struct entry *e, const struct record *record)
{
	struct client *client = broker_find_client(r->broker, e->key[0]);
	struct file *file = broker_find_file(r->broker, e->key[1]);
	struct refusal refusal;
	bool bad = false, writable = record_unsigned(record, "writable", 0, &bad);
	int error, access = read_enumeration(record, "access", &enumeration_access, &bad);
	uint64_t lost = record_unsigned(record, "lost", 0, &bad);
	uint64_t mount = record_unsigned(record, "mount", 0, &bad);
	struct use *use;

	if (!client)
		return -ENOENT;
	if (!file)
		return lose_use(r, client, e->key[1], record);
	if (bad || lost > IDS_MAX)
		return -EBADMSG;
	ids_pass(&r->broker->ids, lost);
	error = client_add_use(client, file, (enum access)access, writable, &use, &refusal);
	if (error != 0)
		return error;
	use_set_lost(use, lost);
	use->mount = mount;
	if (writable)
		sharing_add(file, client->process.uid);
	return 0;
}

/* Contexts of one description share what is kept of it. */
static int take_context(struct restorer *r, uint64_t id, uint64_t name)
{
	struct kept_descriptor *kept = find_kept(r, STORE_CONTEXT, name);
	const struct context *other =
		kept && kept->fd < 0 ? broker_find_context(r->broker, kept->taken_by) : NULL;

	if (!kept)
		return -1;
	kept->taken_by = id;
	return other ? fcntl(other->fd, F_DUPFD_CLOEXEC, 3) : TAKE_FD(kept->fd);
}

/* From the store, or else from the client; -1: it is lost. */
static int find_context(struct restorer *r, uint64_t id, uint64_t name, const struct client *client,
			const struct context_ops *ops, int64_t remote)
{
	int fd = take_context(r, id, name);

	if (fd >= 0)
		user_charge_force(client->user, LIMIT_DESCRIPTORS, 1);
	else if (ops && remote >= 0 && remote <= INT_MAX)
		(void)context_fetch(client, (int)remote, ops, &fd);
	return fd;
}

/* The configuration may be another by now; what cannot be asked any more is as it was. */
static void describe(struct restorer *r, const struct context_ops *ops, int fd,
		     struct context_description *description)
{
	struct context_description fresh = { .proof = PROOF_CLAIMED };

	if (ops->describe && ops->describe(fd, r->broker->config, &fresh) >= 0)
		*description = fresh;
	description->number = context_device_number(fd);
}

/* One whose descriptor is lost is still what pins are on, but nothing can be done through it. */
static int restore_context(struct restorer *r, uint64_t id, const struct record *record)
{
	const char *kind = record_string(record, "kind");
	const struct context_ops *ops = kind ? context_find_kind(kind) : NULL;
	struct context_description description = {};
	struct context *context;
	struct refusal refusal;
	bool bad = false;
	struct client *client =
		broker_find_client(r->broker, record_unsigned(record, "client", 0, &bad));
	bool closed = record_unsigned(record, "closed", 0, &bad);
	int64_t remote = record_signed(record, "remote", -1, &bad);
	uint64_t name = record_unsigned(record, "stored", id, &bad);
	int error, fd;

	description.forcible = record_unsigned(record, "forcible", 0, &bad);
	description.proof = (enum proof)read_enumeration(record, "proof", &enumeration_proof, &bad);
	COPY(description.device, record, "device");
	if (bad)
		return -EBADMSG;
	if (!client)
		return -ENOENT;
	fd = closed ? -1 : find_context(r, id, name, client, ops, remote);
	if (fd < 0 && !closed)
		log_warning("Context %" PRIu64 " was not kept: nothing can be done through it.", id);
	if (fd < 0 || !ops) {
		ops = &context_opaque;
		description.forcible = false;
		description.proof = PROOF_CLAIMED;
	}
	if (fd >= 0)
		describe(r, ops, fd, &description);
	if (fd >= 0 && record_unsigned(record, "detaching", 0, &bad) > 0)
		holders_continue_left(fd, &client->process);
	ids_give(&r->broker->ids, id);
	error = context_new(client, ops, &description, fd, record_string(record, "label"), &context,
			    &refusal);
	if (error != 0) {
		offload_close(r->broker->offload, client->user, fd);
		return error;
	}
	context->remote = (int)remote;
	context->doubt = (struct context_doubt){
		.counter.acquired = record_unsigned(record, "acquired", 0, &bad),
		.counter.released = record_unsigned(record, "released", 0, &bad),
		.n_pages = record_unsigned(record, "kept-pages", 0, &bad),
		.unseen = (pid_t)record_unsigned(record, "unseen", 0, &bad),
	};
	if (fd >= 0 && remote < 0)
		store_kept(&r->broker->store, &context->copy, STORE_CONTEXT, name, fd);
	return 0;
}

/* The pins of a call share their label, and stand one after the other. */
static int set_label(struct restorer *r, const char *text)
{
	const char *last = label_text(r->label);

	if (text && last && strcmp(text, last) == 0)
		return 0;
	label_unref(r->label);
	r->label = text ? label_new(text) : NULL;
	return text && !r->label ? -ENOMEM : 0;
}

/* Its file has not been taken up, or nobody can read what it was: it is kept to tell its holder so. */
static int lose_pin(struct restorer *r, uint64_t id, struct context *context, struct use *use)
{
	struct pin_past past = { .over = true, .lost = true, .handle = INT_NULL };
	const char *path = use->file ? use->file->path : use->path;

	if (use->lost == 0)
		use_set_lost(use, broker_next_id(r->broker));
	past.revocation = use->lost;
	log_lost(r, context->client, "Pin", id, path);
	ids_give(&r->broker->ids, id);
	return pin_resume(context, NULL, &past, NULL);
}

static int restore_pin(struct restorer *r, uint64_t id, const struct record *record)
{
	bool bad = false, over = record_string(record, "over");
	struct context *context =
		broker_find_context(r->broker, record_unsigned(record, "context", 0, &bad));
	uint64_t file = record_unsigned(record, "file", 0, &bad);
	struct refusal refusal;
	struct use *use = context ? client_find_use_of(context->client, (int64_t)file, &refusal) : NULL;
	int access = read_enumeration(record, "access", &enumeration_access, &bad);
	struct pin_past past = {
		.offset = record_unsigned(record, "offset", 0, &bad),
		.length = record_unsigned(record, "length", 0, &bad),
		.on_demand = record_unsigned(record, "on-demand", 0, &bad),
		.over = over,
		.lost = record_unsigned(record, "lost", 0, &bad),
		.destroyed = record_unsigned(record, "destroyed", 0, &bad),
		.revocation = record_unsigned(record, over ? "over" : "told", 0, &bad),
		.handle = record_signed(record, "handle", INT_NULL, &bad),
		.identity = {
			.address = record_unsigned(record, "address", 0, &bad),
			.length = record_unsigned(record, "registered", 0, &bad),
			.key = record_unsigned(record, "key", 0, &bad),
		},
	};
	int error;

	past.access = (enum access)access;
	if (!over)
		past.state = (enum pin_state)read_enumeration(record, "state", &enumeration_pin_state,
							      &bad);
	bad |= past.revocation > IDS_MAX;
	bad |= !past.lost && (past.length == 0 || past.offset > INT64_MAX ||
			      past.length > INT64_MAX - past.offset);
	if (use && (bad || !use->file) && !over)
		return lose_pin(r, id, context, use);
	if (bad)
		return -EBADMSG;
	ids_pass(&r->broker->ids, past.revocation);
	if (!context || (!over && !use))
		return -ENOENT;
	error = set_label(r, record_string(record, "label"));
	if (error < 0)
		return error;
	ids_give(&r->broker->ids, id);
	return pin_resume(context, over ? NULL : use, &past, r->label);
}

static const struct {
	const char *kind;
	int (*restore)(struct restorer *r, uint64_t id, const struct record *record);
} builders[] = {
	{ "client", restore_client }, { "file", restore_file }, { "use", NULL },
	{ "context", restore_context }, { "pin", restore_pin },
};

static void build_one(struct restorer *r, size_t builder, struct entry *e)
{
	const char *kind = builders[builder].kind;
	size_t n = strlen(kind);
	struct record record;
	int error;

	if (strncmp(e->line, kind, n) != 0 || e->line[n] != ' ')
		return;
	notifier_tell_progress(r->broker->store.notifier);
	error = record_parse(e->line, &record);
	if (error >= 0)
		error = builders[builder].restore
				? builders[builder].restore(r, e->key[0], &record)
				: restore_use(r, e, &record);
	ids_give(&r->broker->ids, 0);
	if (error == 0)
		return;
	r->n_lost++;
	log_errno(LOG_ERR, error < 0 ? error : -EDQUOT, "Cannot take up %s %" PRIu64 " again", kind,
		  e->key[0]);
}

static void build(struct restorer *r)
{
	struct entry *e;

	users_enforce(r->broker->users, false);
	for (size_t i = 0; i < ELEMENTS(builders); i++)
		for (e = NULL; (e = state_reader_next(&r->reader, e));)
			build_one(r, i, e);
	users_enforce(r->broker->users, true);
	label_unref(r->label);
}

/* ---- */

static void drop_rest(struct restorer *r)
{
	for (size_t i = 0; i < r->n_kept; i++) {
		if (r->kept[i].fd < 0)
			continue;
		store_drop_name(&r->broker->store, r->kept[i].name);
		offload_close(r->broker->offload, NULL, TAKE_FD(r->kept[i].fd));
	}
}

/* Nobody will be told again that it went. */
static bool device_exists(dev_t number)
{
	char path[64];

	snprintf(path, sizeof(path), "/sys/dev/char/%u:%u", major(number), minor(number));
	return access(path, F_OK) >= 0 || errno != ENOENT;
}

static void go_on(struct restorer *r)
{
	struct broker *broker = r->broker;
	struct context *context;
	struct file *file;
	uint64_t after = 0;

	broker->resume_usec = now_usec() + RESUME_USEC;
	while ((context = broker_next_context(broker, after))) {
		dev_t number = context->description.number;

		after = context->id;
		notifier_tell_progress(broker->store.notifier);
		if (number != 0 && !device_exists(number))
			admin_remove_device(broker, number);
		context_check(context);
	}
	for (after = 0; (file = broker_next_file(broker, after));) {
		after = file->id;
		notifier_tell_progress(broker->store.notifier);
		if (file->n_uses == 0)
			file_collect(file);
		else
			file_go_on(file);
	}
	log_event(r->n_lost > 0 ? LOG_ERR : LOG_NOTICE, MESSAGE_STATE_RESTORED, NULL,
		  "Took up %u pin%s of %u file%s by %u client%s from the run before, %.3f s after it "
		  "was last awake; %u object%s lost.",
		  broker->n_pins, PLURAL(broker->n_pins), broker->n_files, PLURAL(broker->n_files),
		  broker->n_clients, PLURAL(broker->n_clients),
		  (double)(now_usec() - r->reader.since_usec) / 1e6, r->n_lost, PLURAL(r->n_lost));
}

void restore(struct broker *broker, const char *path, struct kept_descriptor *kept, size_t n_kept)
{
	struct restorer r = {
		.broker = broker,
		.reader = { .ids = &broker->ids, .notifier = broker->store.notifier },
		.kept = kept,
		.n_kept = n_kept,
	};
	int error;

	sort_kept(&r);
	error = state_reader_open(&r.reader, path);
	r.n_lost = r.reader.n_damaged;
	if (error >= 0 && state_reader_next(&r.reader, NULL)) {
		build(&r);
		go_on(&r);
	} else if (error < 0 && (error != -ENOENT || n_kept > 0)) {
		log_errno(LOG_ERR, error, "Cannot read %s, beginning anew with %zu descriptor%s lost",
			  path, n_kept, PLURAL(n_kept));
	}
	drop_rest(&r);
	state_reader_close(&r.reader);
}
