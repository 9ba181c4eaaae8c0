/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdlib.h>

#include "daemon/core/broker.h"
#include "daemon/util/turn.h"
#include "daemon/varlink/call.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* The List streams: some objects each turn of the loop, in the order of their ids. */

static bool sees_uid(const struct peer *peer, uid_t uid)
{
	return peer->process.uid == 0 || peer->process.uid == uid;
}

static bool sees_client(const struct peer *peer, const struct client *client)
{
	return sees_uid(peer, client->process.uid);
}

static bool matches(uint64_t wanted, uint64_t id)
{
	return wanted == 0 || wanted == id;
}

static bool sees_pin(const struct peer *peer, const struct pin *pin)
{
	return !pin->over && sees_client(peer, pin->context->client) &&
	       matches(peer->list_file, pin->use->file->id) &&
	       matches(peer->list_client, pin->context->client->id);
}

static bool sees_file(const struct peer *peer, const struct file *file)
{
	struct use *use;

	LIST_FOREACH(use, &file->uses, of_file)
		if (sees_client(peer, use->client))
			return true;
	return false;
}

static bool sees_context(const struct peer *peer, const struct context *context)
{
	return sees_client(peer, context->client) &&
	       matches(peer->list_client, context->client->id);
}

static bool sees_revocation(const struct peer *peer, const struct revocation *rev)
{
	for (size_t i = 0; i < rev->n_uids; i++)
		if (sees_uid(peer, rev->uids[i]))
			return true;
	return peer->process.uid == 0;
}

/*
 * The list functions differ in the type alone. Whether one more follows is not known when one is sent,
 * so the stream ends with a reply of its own, that of null; without any object it is the only one.
 */
#define LIST(type)                                                                   \
	static int list_##type(struct peer *peer)                                                  \
	{                                                                                          \
		struct slice slice = slice_begin();                                                \
                                                                                                   \
		while (!slice_is_over(&slice)) {                                                   \
			struct type *p = broker_next_##type(peer->broker, peer->list_after);       \
			struct msg_##type##_info item;                                                 \
                                                                                                   \
			if (!p) {                                                                  \
				peer_reply(peer, &schema_msg_list_##type##s_out,                   \
					   &(struct msg_list_##type##s_out){ NULL }, NULL, 0);     \
				return 0;                                                          \
			}                                                                          \
			peer->list_after = p->id;                                                  \
			if (!sees_##type(peer, p))                                                 \
				continue;                                                          \
			type##_info(p, &item);                                                    \
			peer_reply_more(peer, &schema_msg_list_##type##s_out,                      \
					&(struct msg_list_##type##s_out){ &item });                \
		}                                                                                  \
		return 1;                                                                          \
	}

LIST(pin)
LIST(file)
LIST(client)
LIST(context)
LIST(revocation)

static int start(struct call *call, int (*list)(struct peer *peer), int64_t file, int64_t client)
{
	struct peer *peer = call->peer;

	if (file != INT_NULL && file <= 0)
		return refuse_parameter(&call->refusal, "file");
	if (client != INT_NULL && client <= 0)
		return refuse_parameter(&call->refusal, "client");
	peer->list = list;
	peer->list_after = 0;
	peer->list_file = file == INT_NULL ? 0 : (uint64_t)file;
	peer->list_client = client == INT_NULL ? 0 : (uint64_t)client;
	return CALL_PENDING;
}

int call_list_pins(struct call *call, const union call_in *in)
{
	return start(call, list_pin, in->list_pins.file, in->list_pins.client);
}

int call_list_files(struct call *call, const union call_in *in)
{
	return start(call, list_file, INT_NULL, INT_NULL);
}

int call_list_clients(struct call *call, const union call_in *in)
{
	return start(call, list_client, INT_NULL, INT_NULL);
}

int call_list_contexts(struct call *call, const union call_in *in)
{
	return start(call, list_context, INT_NULL, in->list_contexts.client);
}

int call_list_revocations(struct call *call, const union call_in *in)
{
	return start(call, list_revocation, INT_NULL, INT_NULL);
}
