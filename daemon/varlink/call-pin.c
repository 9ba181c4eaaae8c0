/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include <string.h>

#include "daemon/core/broker.h"
#include "daemon/core/notice.h"
#include "daemon/util/turn.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

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

/* Of many pins some are let go of each turn of the loop. */
struct unpinning {
	struct job job; /* writes a long answer */
	struct context_waiter waiter;
	sd_event_source *source; /* goes on */
	struct peer *peer;       /* reference */
	struct broker *broker;
	uint64_t client;
	bool pending; /* the call is */
	bool checked; /* all are the client's */
	size_t n_pins, i;
	size_t n_ended; /* the first so many of pins, of those that have been passed */
	struct text *text; /* owned; the long answer */
	int result;
	int64_t pins[];
};

static void unpinning_free(struct unpinning *u)
{
	sd_event_source_disable_unref(u->source);
	text_unref(u->text);
	peer_unref(u->peer);
	free(u);
}

static struct msg_unpin_out unpin_out(struct unpinning *u)
{
	return (struct msg_unpin_out){ .ended = { u->pins, u->n_ended } };
}

static void answer_run(struct job *job)
{
	struct unpinning *u = container_of(job, struct unpinning, job);
	struct msg_unpin_out out = unpin_out(u);

	u->result = peer_format(&schema_msg_unpin_out, &out, false, &u->text);
}

static void answer_done(struct job *job)
{
	struct unpinning *u = container_of(job, struct unpinning, job);

	if (u->peer->connection) {
		peer_send_text(u->peer, u->result, u->text, true);
		peer_done(u->peer);
	}
	unpinning_free(u);
}

/* Returns what the call does. */
static int unpin_answer(struct unpinning *u, int r, const struct refusal *refusal)
{
	struct peer *peer = u->peer;
	struct msg_unpin_out out = unpin_out(u);

	if (r == 0 && u->n_ended > NOTICE_PINS_MAX && peer->connection) {
		u->job.run = answer_run;
		u->job.done = answer_done;
		offload_submit_step(u->broker->offload, peer->user, &u->job);
		return CALL_PENDING;
	}
	if (r == 0 && peer->connection)
		peer_reply(peer, &schema_msg_unpin_out, &out, NULL, 0);
	if (u->pending && peer->connection) {
		if (r != 0)
			peer_refuse(peer, r, refusal);
		peer_done(peer);
	}
	unpinning_free(u);
	return r;
}

/* All or none. */
static int unpin_check(struct unpinning *u, struct client *client, struct refusal *ret_refusal)
{
	if (!client_find_pin(client, u->pins[u->i], ret_refusal))
		return REFUSED;
	if (++u->i == u->n_pins) {
		u->checked = true;
		u->i = 0;
	}
	return 0;
}

/* CALL_PENDING: it waits until it is known which handles are destroyed. */
static int unpin_next(struct unpinning *u)
{
	/* one that is named twice is there only once */
	struct pin *pin = broker_find_pin(u->broker, (uint64_t)u->pins[u->i]);

	if (pin && context_wait_detached(pin->context, &u->waiter))
		return CALL_PENDING;
	if (pin && client_unpin(pin))
		u->pins[u->n_ended++] = u->pins[u->i];
	u->i++;
	return 0;
}

static int unpin_go_on(struct unpinning *u, struct refusal *ret_refusal)
{
	struct client *client = broker_find_client(u->broker, u->client);
	struct slice slice = slice_begin();
	int r = client ? 0 : -ECONNRESET;

	/* Said is said, also by who has closed the connection meanwhile. */
	while (r == 0 && u->i < u->n_pins) {
		r = u->checked ? unpin_next(u) : unpin_check(u, client, ret_refusal);
		/* The last pin is answered for at once: the daemon may end with it. */
		if (r == 0 && u->i < u->n_pins && slice_is_over(&slice))
			r = sd_event_source_set_enabled(u->source, SD_EVENT_ONESHOT) ?: CALL_PENDING;
	}
	return r == CALL_PENDING ? r : unpin_answer(u, r, ret_refusal);
}

static int on_unpin(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct unpinning *u = userdata;
	struct refusal refusal;

	(void)unpin_go_on(u, &refusal);
	return 0;
}

static void unpin_detached(struct context_waiter *waiter)
{
	struct refusal refusal;

	(void)unpin_go_on(container_of(waiter, struct unpinning, waiter), &refusal);
}

int call_unpin(struct call *call, const union call_in *in)
{
	const struct ints *pins = &in->unpin.pins;
	struct client *client = call_client(call);
	struct unpinning *u;
	int r;

	if (!client)
		return REFUSED;
	u = calloc(1, sizeof(*u) + pins->n_items * sizeof(u->pins[0]));
	if (!u)
		return -ENOMEM;
	u->waiter.looked = unpin_detached;
	u->peer = peer_ref(call->peer);
	u->broker = client->broker;
	u->client = client->id;
	u->n_pins = pins->n_items;
	if (pins->n_items > 0)
		memcpy(u->pins, pins->items, pins->n_items * sizeof(u->pins[0]));
	r = turn_add_source(u->broker->event, &u->source, on_unpin, u);
	if (r < 0) {
		unpinning_free(u);
		return r;
	}
	r = unpin_go_on(u, &call->refusal);
	if (r == CALL_PENDING)
		u->pending = true;
	return r;
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
