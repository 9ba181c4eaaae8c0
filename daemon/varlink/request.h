/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <json-c/json.h>
#include <stdbool.h>
#include <stddef.h>

#include "daemon/varlink/call.h"
#include "protocol/interface.h"

/* What a message asks for. Reading it touches nothing else, so that a long one can be read on the pool. */
struct request {
	json_object *message; /* owned; what is below points into it */
	const char *name;     /* of the method, with its interface */
	json_object *parameters;
	bool more, oneway;

	const struct method *method; /* one of interface_pinbroker's; NULL: of something else, or unknown */
	int result;                  /* of reading its parameters: 0, -EINVAL with field, -ENOMEM */
	const char *field;
	union call_in in;
};

/* Takes the message over. -EBADMSG: it is no call; it is to be cleared all the same. */
int request_read(struct request *request, json_object *message);
void request_clear(struct request *request);
