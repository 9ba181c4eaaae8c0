/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/interface.h"

struct client;
struct revocation;

/* Tells every holder with pins left in the revocation, on both channels. */
void notice_send(const struct revocation *revocation);

/*
 * Calls f for each notice of the running revocations that concern the client: one for each revocation
 * and file. What the notice points to lives as long as the call.
 */
int notice_for_each(struct client *client,
		    int (*f)(const struct msg_notice *notice, void *userdata), void *userdata);

/* Sends these to the client's name on the bus, once it is known to be its. */
void notice_send_bus(struct client *client);
