/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "call.h"

#include <string.h>

#include "broker.h"
#include "macro.h"
#include "peer.h"

/* Pin, Bind, Unpin and Extend. */

int call_pin(struct call *call, const union call_in *in)
{
	const struct msg_pin_in *pin = &in->pin;
	struct client *client = call_client(call);
	int64_t ids[PIN_RANGES_MAX];
	int r;

	if (!client)
		return REFUSED;
	if (!call_is_name(pin->label))
		return refuse_parameter(&call->refusal, "label");
	r = client_pin(client, pin, ids, &call->refusal);
	if (r == 0)
		peer_reply(call->peer, &schema_msg_pin_out,
			   &(struct msg_pin_out){ .pins = { ids, pin->ranges.n_items } }, NULL, 0);
	return r;
}

struct bind_job {
	struct job job;
	struct peer *peer;       /* reference */
	struct context *context; /* held */
	struct broker *broker;
	int fd;
	uint64_t pin;
	int64_t handle;
	struct handle_identity identity;
	int result;
};

static void bind_run(struct job *job)
{
	struct bind_job *j = container_of(job, struct bind_job, job);

	j->result = j->context->ops->read_handle(j->fd, j->handle, &j->identity);
}

static void bind_done(struct job *job)
{
	struct bind_job *j = container_of(job, struct bind_job, job);
	struct peer *peer = j->peer;
	struct refusal refusal;
	struct pin *pin;
	int r = j->result == -ENOENT ? refuse_parameter(&refusal, "handle") : j->result;

	(void)context_release(j->context, j->broker);
	pin = broker_find_pin(j->broker, j->pin);
	if (r == 0)
		r = pin ? pin_bind(pin, j->handle, &j->identity, &refusal)
			: refuse_no_such(&refusal, "pin", j->pin);
	if (peer->connection) {
		if (r == 0)
			peer_reply(peer, &schema_msg_bind_out, NULL, NULL, 0);
		else
			peer_refuse(peer, r, &refusal);
		peer_done(peer);
	}
	peer_unref(peer);
	free(j);
}

int call_bind(struct call *call, const union call_in *in)
{
	struct client *client = call_client(call);
	struct context *context;
	struct bind_job *j;
	struct pin *pin;
	int r;

	if (!client)
		return REFUSED;
	pin = client_find_pin(client, in->bind.pin, &call->refusal);
	if (!pin)
		return REFUSED;
	if (in->bind.handle < 0)
		return refuse_parameter(&call->refusal, "handle");
	context = pin->context;
	if (!context->ops->read_handle || context->fd < 0 || pin->over) {
		r = pin_bind(pin, in->bind.handle, &(struct handle_identity){}, &call->refusal);
		if (r == 0)
			peer_reply(call->peer, &schema_msg_bind_out, NULL, NULL, 0);
		return r;
	}
	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	j->broker = client->broker;
	j->fd = context->fd;
	j->pin = pin->id;
	j->handle = in->bind.handle;
	j->job.run = bind_run;
	j->job.done = bind_done;
	j->context = context_hold(context);
	if (offload_submit(client->broker->offload, client->user, &j->job) < 0) {
		(void)context_release(context, j->broker);
		free(j);
		return refuse_limit(&call->refusal, client->user, LIMIT_UNFINISHED);
	}
	j->peer = peer_ref(call->peer);
	return CALL_PENDING;
}

struct unpinning {
	struct context_waiter waiter;
	struct peer *peer; /* reference */
	struct broker *broker;
	uint64_t client;
	size_t n_pins;
	int64_t pins[];
};

/* A context of theirs in which handles are being destroyed: which, is known only afterwards. */
static struct context *find_detaching(const struct client *client, const int64_t *pins, size_t n_pins)
{
	for (size_t i = 0; i < n_pins; i++) {
		struct pin *pin = broker_find_pin(client->broker, (uint64_t)pins[i]);

		if (pin && pin->context->client == client && pin->context->n_detaching > 0)
			return pin->context;
	}
	return NULL;
}

static int unpin(struct client *client, struct peer *peer, const int64_t *pins, size_t n_pins,
		 struct refusal *ret_refusal)
{
	_cleanup_(freep) int64_t *ended = calloc(n_pins + 1, sizeof(*ended));
	size_t n_ended;
	int r;

	if (!ended)
		return -ENOMEM;
	r = client_unpin(client, pins, n_pins, ended, &n_ended, ret_refusal);
	if (r == 0 && peer->connection)
		peer_reply(peer, &schema_msg_unpin_out,
			   &(struct msg_unpin_out){ .ended = { ended, n_ended } }, NULL, 0);
	return r;
}

static void unpin_detached(struct context_waiter *waiter)
{
	struct unpinning *u = container_of(waiter, struct unpinning, waiter);
	struct client *client = broker_find_client(u->broker, u->client);
	struct context *context = client ? find_detaching(client, u->pins, u->n_pins) : NULL;
	struct peer *peer = u->peer;
	struct refusal refusal;
	int r;

	if (context && context_wait_detached(context, &u->waiter))
		return;
	/* Said is said, also by who has closed the connection meanwhile. */
	r = client ? unpin(client, peer, u->pins, u->n_pins, &refusal) : -ECONNRESET;
	if (peer->connection) {
		if (r != 0)
			peer_refuse(peer, r, &refusal);
		peer_done(peer);
	}
	peer_unref(peer);
	free(u);
}

int call_unpin(struct call *call, const union call_in *in)
{
	const struct ints *pins = &in->unpin.pins;
	struct client *client = call_client(call);
	struct context *context;
	struct unpinning *u;

	if (!client)
		return REFUSED;
	context = find_detaching(client, pins->items, pins->n_items);
	if (!context)
		return unpin(client, call->peer, pins->items, pins->n_items, &call->refusal);
	u = calloc(1, sizeof(*u) + pins->n_items * sizeof(u->pins[0]));
	if (!u)
		return -ENOMEM;
	u->waiter.looked = unpin_detached;
	u->peer = peer_ref(call->peer);
	u->broker = client->broker;
	u->client = client->id;
	u->n_pins = pins->n_items;
	memcpy(u->pins, pins->items, pins->n_items * sizeof(u->pins[0]));
	(void)context_wait_detached(context, &u->waiter);
	return CALL_PENDING;
}

int call_extend(struct call *call, const union call_in *in)
{
	struct client *client = call_client(call);
	struct revocation *rev;
	uint64_t deadline;
	int r;

	if (!client)
		return REFUSED;
	if (in->extend.byUSec < 0)
		return refuse_parameter(&call->refusal, "byUSec");
	rev = broker_find_revocation(client->broker, (uint64_t)in->extend.revocation);
	if (!rev || !revocation_is_running(rev))
		return refuse_no_such(&call->refusal, "revocation",
				      (uint64_t)in->extend.revocation);
	r = revocation_extend(rev, client, (uint64_t)in->extend.byUSec, &deadline, &call->refusal);
	if (r == 0)
		peer_reply(call->peer, &schema_msg_extend_out,
			   &(struct msg_extend_out){ (int64_t)deadline }, NULL, 0);
	return r;
}
