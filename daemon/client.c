/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "client.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "broker.h"
#include "bus.h"
#include "label.h"
#include "log.h"
#include "macro.h"
#include "peer.h"
#include "state.h"

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

static struct log_fields client_fields(const struct client *client)
{
	return (struct log_fields){
		.client = client->id,
		.pid = client->process.pid,
		.uid = &client->process.uid,
		.unit = client->process.unit,
	};
}

static int on_death(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct client *client = userdata;
	struct log_fields fields = client_fields(client);
	struct context *context, *next;

	sd_event_source_set_enabled(source, SD_EVENT_OFF);
	client->dead = true;
	bus_changed(client->broker->bus, &client->view);
	if (client->n_pins > 0)
		log_event(LOG_NOTICE, NULL, &fields,
			  "Holder %s (pid %d) died with %u pin%s; looking what died with it.",
			  client->process.comm, client->process.pid, client->n_pins,
			  PLURAL(client->n_pins));
	for (context = LIST_FIRST(&client->contexts); context; context = next) {
		next = LIST_NEXT(context, of_client);
		if (context->n_pins > 0)
			context_reap(context);
	}
	client_collect(client);
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
	LIST_INIT(&client->uses);
	LIST_INIT(&client->contexts);
	LIST_INIT(&client->peers);
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

struct client *client_free(struct client *client)
{
	if (!client)
		return NULL;
	assert(LIST_EMPTY(&client->peers));
	while (!LIST_EMPTY(&client->contexts))
		context_free(LIST_FIRST(&client->contexts));
	while (!LIST_EMPTY(&client->uses))
		use_free(LIST_FIRST(&client->uses));
	assert(client->n_pins == 0);
	if (client->id != 0) {
		state_gone(client->broker, client->id);
		broker_remove_client(client->broker, client);
	}
	sd_event_source_disable_unref(client->death);
	user_discharge(client->user, LIMIT_CLIENTS, 1);
	user_unref(client->user);
	process_clear(&client->process);
	free(client->name);
	free(client->bus_name);
	free(client);
	return NULL;
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
	bus_changed(client->broker->bus, &client->view);
	state_client(client);
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
	return lives && !LIST_EMPTY(&client->peers);
}

void client_collect(struct client *client)
{
	bool awaited = client->restored && client->broker->resume_usec != 0;
	struct context *context;

	if (client->n_pins > 0 || (!client->dead && (awaited || !LIST_EMPTY(&client->peers))))
		return;
	/* A job that is under way comes back to its context. */
	LIST_FOREACH(context, &client->contexts, of_client)
		if (context->reaping)
			return;
	while (!LIST_EMPTY(&client->peers))
		peer_forget_client(LIST_FIRST(&client->peers));
	client_free(client);
}

void client_disconnected(struct client *client)
{
	if (client->n_pins > 0 && !client->dead) {
		struct log_fields fields = client_fields(client);

		log_event(LOG_INFO, NULL, &fields,
			  "Holder %s (pid %d) closed its connection, and leaves %u pin%s.",
			  client->process.comm, client->process.pid, client->n_pins,
			  PLURAL(client->n_pins));
	}
	client_collect(client);
}

struct use *client_find_use(struct client *client, const struct file *file)
{
	struct use *use;

	LIST_FOREACH(use, &client->uses, of_client)
		if (use->file == file)
			return use;
	return NULL;
}

struct use *client_find_use_of(struct client *client, int64_t file_id, struct refusal *ret_refusal)
{
	struct use *use;

	LIST_FOREACH(use, &client->uses, of_client)
		if (use->file_id == (uint64_t)file_id)
			return use;
	refuse_no_such(ret_refusal, "file", (uint64_t)file_id);
	return NULL;
}

/* The same file, opened anew: what was kept to tell of its end is of no use any more. */
static void forget_withdrawn(struct client *client, const struct file *file)
{
	struct use *use, *next;

	for (use = LIST_FIRST(&client->uses); use; use = next) {
		next = LIST_NEXT(use, of_client);
		if (!use->file && use->file_id == file->id)
			use_free(use);
	}
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
	LIST_INSERT_HEAD(&client->uses, use, of_client);
	client->n_files++;
	LIST_INSERT_HEAD(&file->uses, use, of_file);
	file->n_uses++;
	bus_changed(client->broker->bus, &client->view);
	bus_changed(file->broker->bus, &file->view);
	state_use(use);
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
	use->lost = use->revocation = lost;
	LIST_INSERT_HEAD(&client->uses, use, of_client);
	return 0;
}

/* Takes it out of its file. */
static void leave_file(struct use *use)
{
	struct file *file = use->file;

	assert(use->n_pins == 0);
	state_unuse(use);
	use->client->n_files--;
	LIST_REMOVE(use, of_file);
	file->n_uses--;
	bus_changed(file->broker->bus, &use->client->view);
	bus_changed(file->broker->bus, &file->view);
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
		state_unuse(use);
	LIST_REMOVE(use, of_client);
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
		struct pin *pin = NULL;

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
		if (file->broker->n_running == 0)
			continue;
		while ((pin = pin_ranges_find(&file->pins, (uint64_t)offset,
					      (uint64_t)(offset + length), pin)))
			if (!LIST_EMPTY(&pin->targets)) {
				*ret_refusal = (struct refusal){
					.kind = REFUSAL_RANGE_CONFLICT,
					.id = (int64_t)LIST_FIRST(&pin->targets)->revocation->id,
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

static void drop_reserved(struct context *context, size_t n)
{
	while (n-- > 0)
		pin_free(LIST_FIRST(&context->pins));
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
			drop_reserved(context, i);
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

int client_unpin(struct client *client, const int64_t *ids, size_t n_ids, int64_t *ret_ended,
		 size_t *ret_n_ended, struct refusal *ret_refusal)
{
	size_t n_ended = 0;

	for (size_t i = 0; i < n_ids; i++)
		if (!client_find_pin(client, ids[i], ret_refusal))
			return REFUSED;
	for (size_t i = 0; i < n_ids; i++) {
		/* one that is named twice is there only once */
		struct pin *pin = broker_find_pin(client->broker, (uint64_t)ids[i]);

		if (!pin)
			continue;
		if (pin->destroyed || (pin->over && !pin->lost))
			ret_ended[n_ended++] = ids[i];
		if (pin->over)
			pin_free(pin);
		else
			pin_leave(pin);
	}
	*ret_n_ended = n_ended;
	return 0;
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
		.connected = !LIST_EMPTY(&client->peers),
		.files = client->n_files,
		.contexts = client->n_contexts,
		.pins = client->n_pins,
		.pinnedBytes = (int64_t)client->pinned_bytes,
	};
}
