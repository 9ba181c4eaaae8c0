/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include "daemon/core/broker.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* CloseFile and RemoveContext. Pins that were let go of, and can be proved to be gone, are in the way until it
 * has been looked: who deregisters, unpins and closes is not told that he is too early. */

struct closing {
	struct context_waiter waiter;
	struct peer *peer; /* reference */
	int64_t id;        /* of what is to be closed */
	uint64_t looked_at; /* contexts have been, up to this one */
	int (*close)(struct peer *peer, int64_t id, uint64_t *looked_at, struct context **ret_look,
		     struct refusal *ret_refusal);
};

static void closing_free(struct closing *c)
{
	peer_unref(c->peer);
	free(c);
}

/* Returns true if it goes on when a context has been looked at. */
static bool closing_look(struct closing *c, struct context *context)
{
	return context && context_look(context, &c->waiter);
}

static void closing_looked(struct context_waiter *waiter)
{
	struct closing *c = container_of(waiter, struct closing, waiter);
	struct context *look = NULL;
	struct refusal refusal;
	int r;

	if (!c->peer->connection || !c->peer->session.client) {
		closing_free(c);
		return;
	}
	r = c->close(c->peer, c->id, &c->looked_at, &look, &refusal);
	if (r == REFUSED && closing_look(c, look))
		return;
	if (r != 0)
		peer_refuse(c->peer, r, &refusal);
	peer_done(c->peer);
	closing_free(c);
}

static int closing_start(struct call *call, int64_t id, __typeof__(((struct closing *)0)->close) close)
{
	uint64_t looked_at = 0;
	struct context *look = NULL;
	struct closing *c;
	int r;

	if (!call_client(call))
		return REFUSED;
	r = close(call->peer, id, &looked_at, &look, &call->refusal);
	if (r != REFUSED || !look)
		return r;
	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	*c = (struct closing){
		.waiter.looked = closing_looked,
		.peer = peer_ref(call->peer),
		.id = id,
		.looked_at = looked_at,
		.close = close,
	};
	if (closing_look(c, look))
		return CALL_PENDING;
	closing_free(c);
	return REFUSED;
}

/* The first context from looked_at on with pins that are only to be seen to be gone, whichever file they are on. */
static struct context *find_leaving(struct client *client, uint64_t *looked_at)
{
	struct context *context, *first = NULL;

	LIST_FOREACH(context, &client->contexts, of_client)
		if (context->id > *looked_at && (!first || context->id < first->id) &&
		    context_n_awaited(context) > 0)
			first = context;
	if (first)
		*looked_at = first->id;
	return first;
}

static int close_file(struct peer *peer, int64_t id, uint64_t *looked_at, struct context **ret_look,
		      struct refusal *ret_refusal)
{
	struct client *client = peer->session.client;
	struct use *use = client_find_use_of(client, id, ret_refusal);

	if (!use)
		return REFUSED;
	if (use->n_pins > 0) {
		*ret_look = find_leaving(client, looked_at);
		return refuse(ret_refusal, REFUSAL_BUSY, "pinned",
			      "%u pin%s of yours still on %s: unpin first.", use->n_pins,
			      PLURAL(use->n_pins), use->file->path);
	}
	use_free(use);
	peer_reply(peer, &schema_msg_close_file_out, NULL, NULL, 0);
	return 0;
}

int call_close_file(struct call *call, const union call_in *in)
{
	return closing_start(call, in->close_file.file, close_file);
}

static int remove_context(struct peer *peer, int64_t id, uint64_t *looked_at, struct context **ret_look,
			  struct refusal *ret_refusal)
{
	struct context *context = client_find_context(peer->session.client, id, ret_refusal);

	if (!context)
		return REFUSED;
	if (context->n_pins > 0) {
		if (*looked_at == 0)
			*ret_look = context;
		*looked_at = context->id;
		return refuse(ret_refusal, REFUSAL_BUSY, "pinned",
			      "%u pin%s on it: unpin, and deregister what is pinned, first.",
			      context->n_pins, PLURAL(context->n_pins));
	}
	context_free(context);
	peer_reply(peer, &schema_msg_remove_context_out, NULL, NULL, 0);
	return 0;
}

int call_remove_context(struct call *call, const union call_in *in)
{
	return closing_start(call, in->remove_context.context, remove_context);
}
