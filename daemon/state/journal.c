/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/state/journal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/state/record.h"
#include "daemon/util/label.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* It is written anew when it has grown to this, and to so many times what it was then. */
#define REWRITE_MIN   (1024U * 1024U)
#define REWRITE_TIMES 4U

#define TOUCH_USEC       (5 * USEC_PER_SEC)
#define TOUCH_SLACK_USEC (250 * USEC_PER_MSEC)

struct log_file {
	int fd; /* owned; -1: none */
	uint64_t n;
};

struct state {
	struct observer observer;
	struct journal journal;
	struct broker *broker;
	char *path, *new_path;      /* owned */
	struct record_buffer buffer; /* not yet written */
	struct log_file log;         /* what counts; may be behind: `failed` */
	struct log_file next;        /* being written anew, in its place soon */
	uint64_t n_first;            /* what the log was when it had just been written */
	uint64_t after;              /* rewriting: has come to this object */
	uint64_t client, after_use;  /* … and, of this client, to its use of this file */
	sd_event_source *rewrite, *post, *touch;
	bool failed; /* to be written anew */
};

static const char *access_name(enum access access)
{
	return enumeration_name(&enumeration_access, (int)access);
}

static void write_groups(struct record_buffer *b, const struct process *process)
{
	size_t size = process->n_groups * 12 + 1;
	char *text = malloc(size), *p = text;

	if (!text) {
		b->failed = true;
		return;
	}
	*p = 0;
	for (size_t i = 0; i < process->n_groups; i++)
		p += snprintf(p, size - (size_t)(p - text), "%s%u", i > 0 ? "," : "",
			      process->groups[i]);
	record_put_string(b, "groups", text);
	free(text);
}

static void write_client(struct record_buffer *b, const struct client *client)
{
	const struct process *process = &client->process;

	record_begin(b, "client");
	record_put(b, "id", client->id);
	record_put(b, "pid", (uint64_t)process->pid);
	record_put(b, "start", process->start_time);
	record_put(b, "uid", process->uid);
	record_put(b, "gid", process->gid);
	write_groups(b, process);
	record_put_string(b, "token", client->token);
	record_put_string(b, "comm", process->comm);
	record_put_string(b, "unit", process->unit);
	record_put_string(b, "name", client->name);
	record_put_string(b, "bus-name", client->bus_name);
	record_end(b);
}

static void put_if_any(struct record_buffer *b, const char *key, const char *value)
{
	if (value[0])
		record_put_string(b, key, value);
}

static void write_backing(struct record_buffer *b, const struct backing *backing)
{
	record_put_string(b, "backing", enumeration_name(&enumeration_backing_kind, (int)backing->kind));
	put_if_any(b, "block-device", backing->device);
	put_if_any(b, "namespace", backing->nvdimm_namespace);
	put_if_any(b, "region", backing->region);
	if (backing->numa_node >= 0)
		record_put(b, "node", (uint64_t)backing->numa_node);
}

static void write_file(struct record_buffer *b, const struct file *file)
{
	const struct lease *lease = &file->lease;

	record_begin(b, "file");
	record_put(b, "id", file->id);
	record_put(b, "device", file->key.device);
	record_put(b, "inode", file->key.inode);
	record_put_string(b, "access", access_name(lease->access));
	record_put_string(b, "lease", enumeration_name(&enumeration_lease_state, (int)lease->state));
	if (lease->state == LEASE_SETTLING)
		record_put(b, "settled", lease->settled_usec);
	if (lease->state == LEASE_BREAKING)
		record_put(b, "broken", lease->broken_usec);
	if (file->sharing.several)
		record_put(b, "shared", true);
	if (file->sharing.tampered)
		record_put(b, "tampered", true);
	record_put(b, "mount", file->mount);
	record_put(b, "mount-device", file->mount_device);
	record_put_string(b, "file-system", file->file_system);
	write_backing(b, &file->backing);
	if (file->backing.kind == BACKING_DEVICE_DAX)
		record_put(b, "size", file->device_size);
	record_put_string(b, "path", file->path);
	record_end(b);
}

static void write_use(struct record_buffer *b, const struct use *use)
{
	record_begin(b, "use");
	record_put(b, "client", use->client->id);
	record_put(b, "file", use->file_id);
	record_put_string(b, "access", access_name(use->access));
	record_put(b, "writable", use->writable);
	record_put(b, "mount", use->mount);
	if (use->lost != 0)
		record_put(b, "lost", use->lost);
	record_put_string(b, "path", use->path);
	record_end(b);
}

static void write_context(struct record_buffer *b, const struct context *context)
{
	record_begin(b, "context");
	record_put(b, "id", context->id);
	record_put(b, "client", context->client->id);
	record_put_string(b, "kind", context->ops->kind);
	put_if_any(b, "device", context->description.device);
	record_put(b, "forcible", context->description.forcible);
	record_put_string(b, "proof",
			  enumeration_name(&enumeration_proof, (int)context->description.proof));
	record_put(b, "closed", context->fd < 0);
	if (context->doubt.n_pages > 0) {
		record_put(b, "kept-pages", context->doubt.n_pages);
		record_put(b, "acquired", context->doubt.counter.acquired);
		record_put(b, "released", context->doubt.counter.released);
	}
	if (context->doubt.unseen > 0)
		record_put(b, "unseen", (uint64_t)context->doubt.unseen);
	if (context->n_detaching > 0)
		record_put(b, "detaching", true);
	if (context->remote >= 0)
		record_put(b, "remote", (uint64_t)context->remote);
	if (store_has(&context->copy) && store_name(&context->copy) != context->id)
		record_put(b, "stored", store_name(&context->copy));
	record_put_string(b, "label", context->label);
	record_end(b);
}

static void write_pin(struct record_buffer *b, const struct pin *pin)
{
	record_begin(b, "pin");
	record_put(b, "id", pin->id);
	record_put(b, "context", pin->context->id);
	record_put(b, "offset", pin->offset);
	record_put(b, "length", pin->length);
	record_put_string(b, "access", access_name(pin->access));
	if (pin->on_demand)
		record_put(b, "on-demand", true);
	if (pin->on_demand && !pin->over && pin->revocation != 0)
		record_put(b, "told", pin->revocation);
	if (pin->destroyed)
		record_put(b, "destroyed", true);
	if (pin->over) {
		record_put(b, "over", pin->revocation);
		if (pin->lost)
			record_put(b, "lost", true);
	} else {
		record_put(b, "file", pin->use->file->id);
		record_put_string(b, "state",
				  enumeration_name(&enumeration_pin_state, (int)pin->state));
	}
	if (pin->handle != INT_NULL) {
		record_put_signed(b, "handle", pin->handle);
		record_put(b, "address", pin->identity.address);
		record_put(b, "registered", pin->identity.length);
		record_put(b, "key", pin->identity.key);
	}
	record_put_string(b, "label", label_text(pin->label));
	record_end(b);
}

/* ---- The file ---- */

static int write_all(struct log_file *file, const char *data, size_t n)
{
	while (n > 0) {
		ssize_t k = write(file->fd, data, n);

		if (k < 0)
			return -errno;
		data += k;
		n -= (size_t)k;
		file->n += (uint64_t)k;
	}
	return 0;
}

static void give_up(struct state *state, int error)
{
	if (!state->failed)
		log_errno(LOG_ERR, error,
			  "Cannot write %s: what is pinned would not outlive a crash of this process",
			  state->path);
	state->failed = true;
	state->next.fd = safe_close(state->next.fd);
	(void)sd_event_source_set_enabled(state->rewrite, SD_EVENT_OFF);
}

static void flush(struct state *state)
{
	struct record_buffer *b = &state->buffer;
	int r = b->failed ? -ENOMEM : 0;

	if (b->n == 0 && r == 0)
		return;
	if (r == 0 && !state->failed)
		r = write_all(&state->log, b->data, b->n);
	if (r == 0 && state->next.fd >= 0)
		r = write_all(&state->next, b->data, b->n);
	b->n = 0;
	b->failed = false;
	if (r < 0)
		give_up(state, r);
}

static int begin_rewrite(struct state *state)
{
	char head[64];

	state->after = state->client = 0;
	/* what is there may be anything, and opening it could wait */
	(void)unlink(state->new_path);
	state->next = (struct log_file){
		.fd = open(state->new_path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0600),
	};
	snprintf(head, sizeof(head), STATE_HEADER "\nids reserved=%" PRIu64 "\n",
		 state->broker->ids.reserved);
	return state->next.fd < 0 ? -errno : write_all(&state->next, head, strlen(head));
}

static int end_rewrite(struct state *state)
{
	if (rename(state->new_path, state->path) < 0)
		return -errno;
	safe_close(state->log.fd);
	state->log = state->next;
	state->next = (struct log_file){ .fd = -1 };
	state->n_first = state->log.n;
	if (state->failed)
		log_notice("%s is written again.", state->path);
	state->failed = false;
	return 0;
}

static uint64_t least(uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	uint64_t ab = a < b ? a : b, cd = c < d ? c : d;

	return ab < cd ? ab : cd;
}

/* The next object, of whichever kind: identifiers are of one series. False: that was the last. */
static bool write_next(struct state *state, struct record_buffer *b)
{
	struct broker *broker = state->broker;
	struct client *client = broker_next_client(broker, state->after);
	struct file *file = broker_next_file(broker, state->after);
	struct context *context = broker_next_context(broker, state->after);
	struct pin *pin = broker_next_pin(broker, state->after);
	uint64_t id = least(client ? client->id : UINT64_MAX, file ? file->id : UINT64_MAX,
			    context ? context->id : UINT64_MAX, pin ? pin->id : UINT64_MAX);

	if (id == UINT64_MAX)
		return false;
	if (client && client->id == id) {
		bool begun = state->client == id;
		struct use *use = client_next_use(client, begun ? state->after_use : 0);

		if (!begun)
			write_client(b, client);
		state->client = id;
		if (use && (use->file || use->lost != 0))
			write_use(b, use);
		state->after_use = use ? use->file_id : 0;
		if (use)
			return true; /* it may have more */
	} else if (file && file->id == id) {
		write_file(b, file);
	} else if (context && context->id == id) {
		write_context(b, context);
	} else {
		write_pin(b, pin);
	}
	state->after = id;
	return true;
}

/* 1: there is more to write; 0: it is done. */
static int rewrite_some(struct state *state, const struct slice *slice)
{
	struct record_buffer b = {};
	bool more;
	int r;

	do
		more = write_next(state, &b);
	while (more && !(slice && slice_is_over(slice)));
	r = b.failed ? -ENOMEM : b.n > 0 ? write_all(&state->next, b.data, b.n) : 0;
	record_buffer_clear(&b);
	if (r >= 0 && !more)
		r = end_rewrite(state);
	return r < 0 ? r : more;
}

static int on_rewrite(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct state *state = userdata;
	int r;

	/* in this order: an object that has gone must not come after the line that says so */
	flush(state);
	if (state->next.fd < 0)
		return sd_event_source_set_enabled(source, SD_EVENT_OFF);
	r = rewrite_some(state, &slice);
	if (r < 0)
		give_up(state, r);
	return r > 0 ? 0 : sd_event_source_set_enabled(source, SD_EVENT_OFF);
}

static void start_rewrite(struct state *state)
{
	int r;

	if (state->next.fd >= 0)
		return;
	flush(state);
	r = begin_rewrite(state);
	if (r >= 0)
		r = sd_event_source_set_enabled(state->rewrite, SD_EVENT_ON);
	if (r < 0)
		give_up(state, r);
}

/* What nobody was told of is written by the end of the turn. */
static int on_post(sd_event_source *source, void *userdata)
{
	struct state *state = userdata;

	flush(state);
	if (!state->failed && state->log.n > REWRITE_MIN &&
	    state->log.n > state->n_first * REWRITE_TIMES)
		start_rewrite(state);
	return 0;
}

static struct record_buffer *buffer_of(struct observer *observer)
{
	return &container_of(observer, struct state, observer)->buffer;
}

static void write_gone(struct observer *observer, uint64_t id)
{
	struct record_buffer *b = buffer_of(observer);

	record_begin(b, "gone");
	record_put(b, "id", id);
	record_end(b);
}

static void on_client(struct observer *observer, struct client *client, enum observed what)
{
	if (what == OBSERVED_RECORDED)
		write_client(buffer_of(observer), client);
	else if (what == OBSERVED_REMOVED)
		write_gone(observer, client->id);
}

static void on_file(struct observer *observer, struct file *file, enum observed what)
{
	if (what == OBSERVED_RECORDED)
		write_file(buffer_of(observer), file);
	else if (what == OBSERVED_REMOVED)
		write_gone(observer, file->id);
}

static void on_use(struct observer *observer, struct use *use, enum observed what)
{
	struct record_buffer *b = buffer_of(observer);

	if (what == OBSERVED_RECORDED) {
		write_use(b, use);
	} else if (what == OBSERVED_REMOVED) {
		record_begin(b, "unuse");
		record_put(b, "client", use->client->id);
		record_put(b, "file", use->file_id);
		record_end(b);
	}
}

static void on_context(struct observer *observer, struct context *context, enum observed what)
{
	if (what == OBSERVED_RECORDED)
		write_context(buffer_of(observer), context);
	else if (what == OBSERVED_REMOVED)
		write_gone(observer, context->id);
}

static void on_pin(struct observer *observer, struct pin *pin, enum observed what)
{
	if (what == OBSERVED_RECORDED)
		write_pin(buffer_of(observer), pin);
	else if (what == OBSERVED_REMOVED)
		write_gone(observer, pin->id);
}

/* Should the file of the identifiers be lost. */
static void on_ids(struct observer *observer, uint64_t reserved)
{
	struct record_buffer *b = buffer_of(observer);

	record_begin(b, "ids");
	record_put(b, "reserved", reserved);
	record_end(b);
}

static void on_flush(struct journal *journal)
{
	flush(container_of(journal, struct state, journal));
}

/* Somebody was awake at this time: says so by the file's time, and tries again what could not be written. */
static int on_touch(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct state *state = userdata;
	int r;

	(void)futimens(state->log.fd, NULL);
	if (state->failed)
		start_rewrite(state);
	r = sd_event_source_set_time(source, now_usec() + TOUCH_USEC);
	return r < 0 ? r : sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
}

int state_new(struct broker *broker, const char *path, struct state **ret)
{
	struct state *state;
	int r;

	state = calloc(1, sizeof(*state));
	if (!state)
		return -ENOMEM;
	state->broker = broker;
	state->log.fd = state->next.fd = -1;
	state->observer = (struct observer){
		.client = on_client,
		.file = on_file,
		.use = on_use,
		.context = on_context,
		.pin = on_pin,
		.ids = on_ids,
	};
	observer_add(&broker->observers, &state->observer);
	state->path = strdup(path);
	r = !state->path || asprintf(&state->new_path, "%s.new", path) < 0 ? -ENOMEM : 0;
	if (r >= 0)
		r = turn_add_source(broker->event, &state->rewrite, on_rewrite, state);
	if (r >= 0)
		r = sd_event_add_post(broker->event, &state->post, on_post, state);
	/* before what goes on in slices: one of them is written at a time */
	if (r >= 0)
		r = sd_event_source_set_priority(state->post, SD_EVENT_PRIORITY_NORMAL - 1);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &state->touch, CLOCK_MONOTONIC,
				      now_usec() + TOUCH_USEC, TOUCH_SLACK_USEC, on_touch, state);
	if (r >= 0)
		r = begin_rewrite(state);
	if (r >= 0)
		r = rewrite_some(state, NULL);
	if (r < 0) {
		state_free(state, false);
		return r;
	}
	state->journal.flush = on_flush;
	broker->journal = &state->journal;
	*ret = state;
	return 0;
}

struct state *state_free(struct state *state, bool remove)
{
	if (!state)
		return NULL;
	observer_remove(&state->broker->observers, &state->observer);
	state->broker->journal = NULL;
	flush(state);
	if (remove)
		(void)unlink(state->path);
	if (state->next.fd >= 0)
		(void)unlink(state->new_path);
	sd_event_source_disable_unref(state->rewrite);
	sd_event_source_disable_unref(state->post);
	sd_event_source_disable_unref(state->touch);
	safe_close(state->log.fd);
	safe_close(state->next.fd);
	record_buffer_clear(&state->buffer);
	free(state->path);
	free(state->new_path);
	free(state);
	return NULL;
}
