/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/connection.h"
#include "protocol/interface.h"
#include "refusal.h"

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

/* call-list.c */
int call_list_pins(struct call *call, const union call_in *in);
int call_list_files(struct call *call, const union call_in *in);
int call_list_clients(struct call *call, const union call_in *in);
int call_list_contexts(struct call *call, const union call_in *in);
int call_list_revocations(struct call *call, const union call_in *in);
