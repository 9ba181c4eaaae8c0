/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/util/refusal.h"
#include "protocol/connection.h"
#include "protocol/interface.h"

struct peer;

#define CALL_PENDING 2 /* the reply comes later */

/* One call: its descriptors, of which a handler takes what it wants (and leaves -1), and what to say
 * if it is refused. */
struct call {
	struct peer *peer;
	struct fds *fds;
	struct refusal refusal;
};

#define CALL_IN(tag, name, kind, IN, OUT) struct msg_##tag##_in tag;
union call_in {
	INTERFACE_METHODS(CALL_IN)
};
#undef CALL_IN

/*
 * For each method, by METHOD_ index. Returns 0 when it has replied, CALL_PENDING, REFUSED with the
 * call's refusal filled in, or negative errno.
 */
extern int (*const call_handlers[METHOD_COUNT])(struct call *call, const union call_in *in);

#define CALL_HANDLER(tag, name, kind, IN, OUT) int call_##tag(struct call *call, const union call_in *in);
INTERFACE_METHODS(CALL_HANDLER)
#undef CALL_HANDLER

/* For handlers: the client that the connection speaks for, or NULL with the refusal. */
struct client *call_client(struct call *call);
/* May it be a name or label? NULL may. */
bool call_is_name(const char *name);
/* The descriptor that a parameter names by index becomes the caller's, … */
int call_take_fd(struct call *call, const char *parameter, int64_t index, int *ret);
/* … and the message's again. */
void call_give_fd_back(struct call *call, int64_t index, int fd);
