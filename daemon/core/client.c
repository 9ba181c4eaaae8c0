/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/client.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/label.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

static int make_token(char token[static CLIENT_TOKEN_SIZE])
{
	uint8_t random[(CLIENT_TOKEN_SIZE - 1) / 2];

	if (getrandom(random, sizeof(random), 0) != (ssize_t)sizeof(random))
		return -EIO;
	for (size_t i = 0; i < sizeof(random); i++)
		snprintf(token + 2 * i, 3, "%02x", random[i]);
	return 0;
}

bool client_check_token(const struct client *client, const char *token)
{
	unsigned char difference = 0;

	if (strlen(token) != CLIENT_TOKEN_SIZE - 1)
		return false;
	/* in constant time: whoever guesses learns nothing from how long it takes */
	for (size_t i = 0; i < CLIENT_TOKEN_SIZE - 1; i++)
		difference |= (unsigned char)(token[i] ^ client->token[i]);
	return difference == 0;
}

struct log_fields client_fields(const struct client *client)
{
	return (struct log_fields){
		.client = client->id,
		.pid = client->process.pid,
		.uid = &client->process.uid,
		.unit = client->process.unit,
	};
}

static int compare_use(const struct use *a, const struct use *b)
{
	return a->file_id < b->file_id ? -1 : a->file_id > b->file_id;
}

TREE_GENERATE(uses, use, of_client, compare_use)

static int compare_lost(const struct use *a, const struct use *b)
{
	return a->lost < b->lost ? -1 : a->lost > b->lost;
}

TREE_GENERATE(lost_uses, use, by_lost, compare_lost)

static int on_work(sd_event_source *source, uint64_t usec, void *userdata);

/* Returns false if it cannot, and all has to be done at once. */
static bool work_later(struct client *client)
{
	if (!client->work && turn_add_source(client->broker->event, &client->work, on_work, client) < 0)
		return false;
	return sd_event_source_set_enabled(client->work, SD_EVENT_ONESHOT) >= 0;
}

/* Looks whether its pins have died with it; true: there are more contexts. */
static bool reap_some(struct client *client, const struct slice *slice)
{
	struct context *context;

	LIST_FOREACH(context, &client->contexts, of_client) {
		if (context->orphaned)
			continue;
		if (slice_is_over(slice))
			return true;
		context->orphaned = true;
		if (context->n_pins > 0)
			context_reap(context);
	}
	return false;
}

static void reap_contexts(struct client *client)
{
	struct slice slice = slice_begin();
	bool more;

	client->working = true; /* not to be freed meanwhile */
	do
		more = reap_some(client, &slice);
	while (more && !work_later(client));
	client->working = false;
	if (!more)
		client_collect(client);
}

static int on_death(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct client *client = userdata;
	struct log_fields fields = client_fields(client);

	sd_event_source_set_enabled(source, SD_EVENT_OFF);
	client->dead = true;
	observe_client(client, OBSERVED_CHANGED);
	if (client->n_pins > 0)
		log_event(LOG_NOTICE, NULL, &fields,
			  "Holder %s (pid %d) died with %u pin%s; looking what died with it.",
			  client->process.comm, client->process.pid, client->n_pins,
			  PLURAL(client->n_pins));
	reap_contexts(client);
	return 0;
}

int client_new(struct broker *broker, struct user *user, struct process *process,
	       struct client **ret, struct refusal *ret_refusal)
{
	struct client *client;
	int r;

	if (user_charge(user, LIMIT_CLIENTS, 1) < 0)
		return refuse_limit(ret_refusal, user, LIMIT_CLIENTS);
	client = calloc(1, sizeof(*client));
	if (!client) {
		user_discharge(user, LIMIT_CLIENTS, 1);
		return -ENOMEM;
	}
	client->broker = broker;
	client->user = user_ref(user);
	client->process.pidfd = -1;
	RB_INIT(&client->uses);
	RB_INIT(&client->lost);
	LIST_INIT(&client->contexts);
	LIST_INIT(&client->sessions);
	r = make_token(client->token);
	if (r >= 0)
		r = sd_event_add_io(broker->event, &client->death, process->pidfd, EPOLLIN,
				    on_death, client);
	if (r < 0) {
		client_free(client);
		return r;
	}
	client->process = *process;
	*process = (struct process){ .pidfd = -1 };
	client->id = broker_next_id(broker);
	broker_add_client(broker, client);
	*ret = client;
	return 0;
}

/* Frees what it has; true: there is more. */
static bool clear_some(struct client *client, const struct slice *slice)
{
	struct context *context;
	struct use *use;

	while ((context = LIST_FIRST(&client->contexts))) {
		struct pin *pin = context_next_pin(context, 0);

		if (slice && slice_is_over(slice))
			return true;
		if (pin)
			pin_free(pin);
		else
			context_free(context);
	}
	while ((use = RB_ROOT(&client->uses))) {
		if (slice && slice_is_over(slice))
			return true;
		use_free(use);
	}
	return false;
}

struct client *client_free(struct client *client)
{
	if (!client)
		return NULL;
	assert(!client_is_connected(client));
	(void)clear_some(client, NULL);
	assert(client->n_pins == 0);
	if (client->id != 0)
		broker_remove_client(client->broker, client);
	sd_event_source_disable_unref(client->death);
	sd_event_source_disable_unref(client->work);
	user_discharge(client->user, LIMIT_CLIENTS, 1);
	user_unref(client->user);
	process_clear(&client->process);
	free(client->name);
	free(client->bus_name);
	free(client);
	return NULL;
}

void client_set_names(struct client *client, char *name, char *bus_name)
{
	free(client->name);
	client->name = name;
	free(client->bus_name);
	client->bus_name = bus_name;
	client->bus_name_verified = false;
	observe_client(client, OBSERVED_CHANGED);
	observe_client(client, OBSERVED_RECORDED);
}

int client_verify_bus_name(struct client *client,
			   void (*done)(int r, struct refusal *refusal, void *userdata), void *userdata)
{
	struct name_authority *names = client->broker->names;

	return names ? names->verify(names, client, done, userdata) : -ENOTCONN;
}

void client_inherit(struct client *client, struct process *heir)
{
	struct log_fields fields = client_fields(client);

	if (!client->dead || sd_event_source_set_io_fd(client->death, heir->pidfd) < 0 ||
	    sd_event_source_set_enabled(client->death, SD_EVENT_ON) < 0)
		return;
	log_event(LOG_NOTICE, NULL, &fields,
		  "Holder %s (pid %d) is dead; %s (pid %d), which has its context, goes on in its place.",
		  client->process.comm, client->process.pid, heir->comm, heir->pid);
	process_clear(&client->process);
	client->process = *heir;
	*heir = (struct process){ .pidfd = -1 };
	client->dead = false;
	client->inherited = true;
	observe_client(client, OBSERVED_CHANGED);
	observe_client(client, OBSERVED_RECORDED);
	revocation_inherited(client);
}

bool client_can_answer(const struct client *client)
{
	const struct context *context;
	bool lives = !client->dead;

	if (lives && !client->inherited)
		return true;
	/* one that has become another user meanwhile is no heir, but has the context and the connection */
	LIST_FOREACH(context, &client->contexts, of_client)
		lives |= context->n_pins > 0 && context->other_holder > 0;
	return lives && client_is_connected(client);
}

static void client_end(struct client *client)
{
	struct slice slice = slice_begin();

	client->ended = true;
	if (!clear_some(client, &slice) || !work_later(client))
		client_free(client);
}

static int on_work(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct client *client = userdata;

	if (client->ended)
		client_end(client);
	else
		reap_contexts(client);
	return 0;
}

void client_collect(struct client *client)
{
	bool awaited = client->restored && client->broker->resume_usec != 0;

	/* A job that is under way comes back to its context. */
	if (client->n_pins > 0 || client->n_reaping > 0 || client->working || client->ended ||
	    (!client->dead && (awaited || client_is_connected(client))))
		return;
	while (client_is_connected(client))
		LIST_FIRST(&client->sessions)->forget(LIST_FIRST(&client->sessions));
	client_end(client);
}

void session_begin(struct session *session, struct client *client)
{
	session->client = client;
	LIST_INSERT_HEAD(&client->sessions, session, of_client);
	observe_client(client, OBSERVED_CHANGED);
}

void session_end(struct session *session)
{
	LIST_REMOVE(session, of_client);
	observe_client(session->client, OBSERVED_CHANGED);
	session->client = NULL;
}

void client_disconnect(struct client *client)
{
	struct session *session;
	unsigned n = 0;

	LIST_FOREACH(session, &client->sessions, of_client)
		n++;
	while (n-- > 0) {
		session = LIST_FIRST(&client->sessions);
		session->close(session);
	}
}

void client_disconnected(struct client *client)
{
	if (client->n_pins > 0 && !client->dead) {
		struct log_fields fields = client_fields(client);
		struct slice slice = slice_begin();
		struct context *context;

		/* It may have executed another program, which is still closing the rest: audits go on with it. */
		LIST_FOREACH(context, &client->contexts, of_client) {
			if (slice_is_over(&slice))
				break;
			context_look_for_holder(context);
		}
		broker_audit_soon(client->broker);

		log_event(LOG_INFO, NULL, &fields,
			  "Holder %s (pid %d) closed its connection, and leaves %u pin%s.",
			  client->process.comm, client->process.pid, client->n_pins,
			  PLURAL(client->n_pins));
	}
	client_collect(client);
}

struct use *client_find_use(struct client *client, const struct file *file)
{
	struct use *use = uses_RB_FIND(&client->uses, &(struct use){ .file_id = file->id });

	return use && use->file ? use : NULL;
}

struct use *client_find_use_of(struct client *client, int64_t file_id, struct refusal *ret_refusal)
{
	struct use *use = uses_RB_FIND(&client->uses, &(struct use){ .file_id = (uint64_t)file_id });

	if (use)
		return use;
	refuse_no_such(ret_refusal, "file", (uint64_t)file_id);
	return NULL;
}

/* The same file, opened anew: what was kept to tell of its end is of no use any more. */
static void forget_withdrawn(struct client *client, const struct file *file)
{
	struct use *use = uses_RB_FIND(&client->uses, &(struct use){ .file_id = file->id });

	if (use && !use->file)
		use_free(use);
}

void use_set_lost(struct use *use, uint64_t lost)
{
	if (lost == 0)
		return;
	use->lost = lost;
	lost_uses_RB_INSERT(&use->client->lost, use);
}

struct use *client_next_lost(struct client *client, uint64_t after)
{
	return lost_uses_RB_NFIND(&client->lost, &(struct use){ .lost = after + 1 });
}

struct use *client_next_use(struct client *client, uint64_t after)
{
	return uses_RB_NFIND(&client->uses, &(struct use){ .file_id = after + 1 });
}

int client_add_use(struct client *client, struct file *file, enum access access, bool writable,
		   struct use **ret, struct refusal *ret_refusal)
{
	struct use *use;

	if (user_charge(client->user, LIMIT_FILES, 1) < 0)
		return refuse_limit(ret_refusal, client->user, LIMIT_FILES);
	use = calloc(1, sizeof(*use));
	if (!use) {
		user_discharge(client->user, LIMIT_FILES, 1);
		return -ENOMEM;
	}
	forget_withdrawn(client, file);
	use->client = client;
	use->file = file;
	use->file_id = file->id;
	use->access = access;
	use->writable = writable;
	uses_RB_INSERT(&client->uses, use);
	client->n_files++;
	LIST_INSERT_HEAD(&file->uses, use, of_file);
	file->n_uses++;
	observe_client(client, OBSERVED_CHANGED);
	observe_file(file, OBSERVED_CHANGED);
	observe_use(use, OBSERVED_RECORDED);
	*ret = use;
	return 0;
}

int client_add_lost_use(struct client *client, uint64_t file_id, uint64_t lost, const char *path)
{
	struct use *use = calloc(1, sizeof(*use));

	if (use && path)
		use->path = strdup(path);
	if (!use || (path && !use->path)) {
		free(use);
		return -ENOMEM;
	}
	user_charge_force(client->user, LIMIT_FILES, 1);
	use->client = client;
	use->file_id = file_id;
	use->revocation = lost;
	uses_RB_INSERT(&client->uses, use);
	use_set_lost(use, lost);
	return 0;
}

/* Takes it out of its file. */
static void leave_file(struct use *use)
{
	struct file *file = use->file;

	assert(use->n_pins == 0);
	observe_use(use, OBSERVED_REMOVED);
	use->client->n_files--;
	LIST_REMOVE(use, of_file);
	file->n_uses--;
	observe_client(use->client, OBSERVED_CHANGED);
	observe_file(file, OBSERVED_CHANGED);
	use->file = NULL;
}

struct use *use_free(struct use *use)
{
	struct file *file;

	if (!use)
		return NULL;
	file = use->file;
	if (file)
		leave_file(use);
	else if (use->lost != 0)
		observe_use(use, OBSERVED_REMOVED);
	uses_RB_REMOVE(&use->client->uses, use);
	if (use->lost != 0)
		lost_uses_RB_REMOVE(&use->client->lost, use);
	user_discharge(use->client->user, LIMIT_FILES, 1);
	free(use->path);
	free(use);
	if (file)
		file_collect(file);
	return NULL;
}

void use_withdraw(struct use *use, uint64_t revocation)
{
	use->revocation = revocation;
	use_collect(use);
}

void use_collect(struct use *use)
{
	if (use->revocation != 0 && use->file && use->n_pins == 0)
		leave_file(use);
}

struct context *client_find_context(struct client *client, int64_t id, struct refusal *ret_refusal)
{
	struct context *context = broker_find_context(client->broker, (uint64_t)id);

	if (context && context->client == client)
		return context;
	refuse_no_such(ret_refusal, "context", (uint64_t)id);
	return NULL;
}

struct pin *client_find_pin(struct client *client, int64_t id, struct refusal *ret_refusal)
{
	struct pin *pin = broker_find_pin(client->broker, (uint64_t)id);

	if (pin && pin->context->client == client)
		return pin;
	refuse_no_such(ret_refusal, "pin", (uint64_t)id);
	return NULL;
}

/* May these be pinned? The pins of a running revocation must become fewer, not more. */
static int check_ranges(struct file *file, const struct msg_range *ranges, size_t n_ranges,
			uint64_t *ret_bytes, struct refusal *ret_refusal)
{
	int64_t size = file_size(file);
	uint64_t bytes = 0;

	if (size < 0)
		return (int)size;
	for (size_t i = 0; i < n_ranges; i++) {
		int64_t offset = ranges[i].offset, length = ranges[i].length;
		struct pin *pin;

		if (offset < 0 || length <= 0 || offset > INT64_MAX - length)
			return refuse_parameter(ret_refusal, "ranges");
		if (offset + length > size) {
			*ret_refusal = (struct refusal){
				.kind = REFUSAL_BEYOND_END_OF_FILE,
				.offset = offset,
				.length = length,
				.size = size,
			};
			return REFUSED;
		}
		if (__builtin_add_overflow(bytes, (uint64_t)length, &bytes))
			return refuse_parameter(ret_refusal, "ranges");
		pin = pin_ranges_find_wanted(&file->pins, (uint64_t)offset,
					     (uint64_t)(offset + length));
		if (pin) {
			*ret_refusal = (struct refusal){
				.kind = REFUSAL_RANGE_CONFLICT,
				.id = (int64_t)pin_revocation(pin)->id,
				.offset = offset,
				.length = length,
			};
			return REFUSED;
		}
	}
	*ret_bytes = bytes;
	return 0;
}

static int check_file(struct file *file, struct use *use, enum access access, bool on_demand,
		      struct refusal *ret_refusal)
{
	const char *reason;

	if (access == ACCESS_WRITE && !use->writable)
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "readOnly",
			      "%s was opened for reading.", file->path);
	if (sharing_check_pin(file, use->client->process.uid, ret_refusal) != 0)
		return REFUSED;
	if (!on_demand && backing_pinnable(&file->backing, access, &reason) == PINNABLE_NO)
		return refuse(ret_refusal, REFUSAL_NOT_SUPPORTED, "fsdax", "%s", reason);
	if (file->broker->stopping)
		return refuse(ret_refusal, REFUSAL_BUSY, "shutdown", "The broker is shutting down.");
	if (file->revocation) {
		*ret_refusal = (struct refusal){
			.kind = REFUSAL_RANGE_CONFLICT,
			.id = (int64_t)file->revocation->id,
			.offset = (int64_t)file->revocation->conflict.offset,
			.length = (int64_t)file->revocation->conflict.length,
		};
		return REFUSED;
	}
	if (!file_ensure_lease(file))
		return refuse(ret_refusal, REFUSAL_BUSY, "openElsewhere",
			      "%s is open elsewhere, so that its lease cannot be held.",
			      file->path);
	return 0;
}

static void drop_reserved(struct broker *broker, const int64_t *ids, size_t n)
{
	while (n-- > 0)
		pin_free(broker_find_pin(broker, (uint64_t)ids[n]));
}

static int charge_pins(struct user *user, size_t n, uint64_t bytes, struct refusal *ret_refusal)
{
	if (user_charge(user, LIMIT_PINS, n) < 0)
		return refuse_limit(ret_refusal, user, LIMIT_PINS);
	if (user_charge(user, LIMIT_PINNED_BYTES, bytes) < 0) {
		user_discharge(user, LIMIT_PINS, n);
		return refuse_limit(ret_refusal, user, LIMIT_PINNED_BYTES);
	}
	return 0;
}

int client_pin(struct client *client, const struct msg_pin_in *in, int64_t *ret_ids,
	       struct refusal *ret_refusal)
{
	struct use *use = client_find_use_of(client, in->file, ret_refusal);
	size_t n_ranges = in->ranges.n_items;
	struct label *label = NULL;
	struct context *context;
	uint64_t bytes = 0;
	int r;

	if (!use)
		return REFUSED;
	context = client_find_context(client, in->context, ret_refusal);
	if (!context)
		return REFUSED;
	if (use->revocation != 0 || use->file->withdrawn != 0)
		return refuse_revoked(ret_refusal,
				      use->revocation != 0 ? use->revocation : use->file->withdrawn, 0);
	if (context->withdrawn != 0)
		return refuse_revoked(ret_refusal, context->withdrawn, 0);
	if (context->fd < 0)
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "closed",
			      "The context was closed when its pins were let go, or lost with the "
			      "broker's last run: add it anew.");
	if (n_ranges == 0 || n_ranges > PIN_RANGES_MAX)
		return refuse_parameter(ret_refusal, "ranges");
	r = check_file(use->file, use, (enum access)in->access, in->onDemand, ret_refusal);
	if (r == 0)
		r = check_ranges(use->file, in->ranges.items, n_ranges, &bytes, ret_refusal);
	if (r != 0)
		return r;

	if (in->label && !(label = label_new(in->label)))
		return -ENOMEM;
	r = charge_pins(client->user, n_ranges, in->onDemand ? 0 : bytes, ret_refusal);
	for (size_t i = 0; r == 0 && i < n_ranges; i++) {
		struct pin *pin;

		r = pin_new(context, use, &in->ranges.items[i], (enum access)in->access,
			    in->onDemand, label, &pin);
		if (r < 0) {
			/* What these have been charged goes with them, … */
			drop_reserved(client->broker, ret_ids, i);
			/* … and what the others would have been. */
			for (size_t k = i; k < n_ranges && !in->onDemand; k++)
				user_discharge(client->user, LIMIT_PINNED_BYTES,
					       (uint64_t)in->ranges.items[k].length);
			user_discharge(client->user, LIMIT_PINS, n_ranges - i);
			break;
		}
		ret_ids[i] = (int64_t)pin->id;
	}
	label_unref(label);
	return r;
}

bool client_unpin(struct pin *pin)
{
	bool ended = pin->destroyed || (pin->over && !pin->lost);

	if (pin->over)
		pin_free(pin);
	else
		pin_leave(pin);
	return ended;
}

void client_info(const struct client *client, struct msg_client_info *ret)
{
	*ret = (struct msg_client_info){
		.client = (int64_t)client->id,
		.pid = client->process.pid,
		.uid = client->process.uid,
		.comm = client->process.comm,
		.unit = client->process.unit,
		.name = client->name,
		.busName = client->bus_name,
		.alive = !client->dead,
		.connected = client_is_connected(client),
		.files = client->n_files,
		.contexts = client->n_contexts,
		.pins = client->n_pins,
		.pinnedBytes = (int64_t)client->pinned_bytes,
	};
}
