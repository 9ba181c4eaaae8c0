/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "daemon/kernel/access.h"
#include "daemon/util/offload.h"
#include "daemon/util/refusal.h"

struct broker;
struct client;

/*
 * OpenFile, from a client's descriptor to a leased file. It goes back and forth between the loop, which
 * knows what is open, and the pool, where descriptors are looked at and files opened as the client.
 */

struct open_result {
	int r; /* 0, REFUSED, or negative errno */
	struct refusal refusal;
	uint64_t file;
	int fd; /* for the client; the callee's, with one LIMIT_DESCRIPTORS */
};

struct open_request;

/*
 * Starts opening; fd is taken over. Calls done() later, on the loop, with the client gone or not.
 * Returns 0, or REFUSED or a negative errno with fd left to the caller.
 */
int open_start(struct client *client, int fd, enum access access,
	       void (*done)(struct open_result *result, void *userdata), void *userdata,
	       struct refusal *ret_refusal);

/* The broker ends, and has no clients any more: requests that wait to try a lease again do so no more. */
void open_give_up(struct broker *broker);
