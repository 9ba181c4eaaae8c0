/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include <string.h>

#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* The methods of org.pinbroker: from a message to the broker and back. Nothing is decided here. */

#define NAME_MAX_BYTES 256 /* names and labels that clients give */

struct client *call_client(struct call *call)
{
	struct peer *peer = call->peer;

	if (peer->session.client && !peer->watching)
		return peer->session.client;
	refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "hello", "Call Hello or Resume first.");
	return NULL;
}

bool call_is_name(const char *name)
{
	return !name || strlen(name) < NAME_MAX_BYTES;
}

/* Takes the descriptor that a parameter names, each only once. */
int call_take_fd(struct call *call, const char *parameter, int64_t index, int *ret)
{
	if (index < 0 || (uint64_t)index >= call->fds->n_fds || call->fds->fds[index] < 0)
		return refuse_parameter(&call->refusal, parameter);
	*ret = TAKE_FD(call->fds->fds[index]);
	return 0;
}

void call_give_fd_back(struct call *call, int64_t index, int fd)
{
	call->fds->fds[index] = fd;
}

#define HANDLER(tag, name, kind, IN, OUT) [METHOD_##name] = call_##tag,
int (*const call_handlers[METHOD_COUNT])(struct call *call, const union call_in *in) = {
	INTERFACE_METHODS(HANDLER)
};
