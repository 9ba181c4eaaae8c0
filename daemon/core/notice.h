/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/core/revocation.h"
#include "protocol/interface.h"

struct client;
struct slice;

/* One notice names so many pins at most: what a client that reads messages of
 * CONNECTION_MESSAGE_MAX can take, and a turn of the loop can write. More pins come in further
 * notices of the same revocation. */
#define NOTICE_PINS_MAX 4096
/* The same, where the pins of several files are told of at once. */
#define NOTICE_FILES_MAX 16

/* In the order in which they are told of. */
void notice_sort(struct untold *items, size_t n);

/* Tells the holders of these pins, as far as the revocation wants them still;
 * from item *i on, which is moved forward, until the slice is over. */
void notice_send(const struct revocation *revocation, const struct untold *items, size_t n,
	size_t *i, const struct slice *slice);

/* How far a client has been told of what it missed. All zero: of nothing. */
struct notice_place {
	enum {
		MISSED_RUNNING, /* what running revocations want */
		MISSED_TOLD,    /* what ended ones have told of pins on demand, which live on */
		MISSED_LOST,    /* pins that a restart has lost */
		MISSED_FILES,   /* files that it has lost, without pins */
		MISSED_NOTHING,
	} what;
	uint64_t revocation, context, pin;
};

/*
 * Calls f for the next notices of what concerns the client. What a notice points to lives as long as
 * the call. Returns 1 if there may be more to tell; 0 at the end; what f returned, if that is
 * negative.
 */
int notice_catch_up(struct client *client, struct notice_place *place,
	int (*f)(const struct msg_notice *notice, void *userdata), void *userdata);
