/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>

#include "bus-object.h"
#include "protocol/interface.h"
#include "refusal.h"

/*
 * The D-Bus face: org.pinbroker1 at /org/pinbroker1, for administrators and for notices. A bus that is
 * away costs just that; the broker goes on, and comes back when the bus does.
 */

#define BUS_NAME      "org.pinbroker1"
#define BUS_PATH      "/org/pinbroker1"
#define BUS_INTERFACE "org.pinbroker1.Manager"

struct broker;
struct bus;
struct bus_credentials;
struct client;
struct revocation;

/* address: NULL for the system bus. Connects now or later. */
int bus_new(struct broker *broker, const char *address, struct bus **ret);
struct bus *bus_free(struct bus *bus);

/* Who sent the call that is being dispatched. */
const struct bus_credentials *bus_caller(const struct bus *bus);

bool bus_name_is_unique(const char *name);

/*
 * Asks the bus whether the client's bus_name is its process's, and calls done() then: with 0, with
 * REFUSED if it is another's, or with a negative errno if it could not be asked. Returns negative errno
 * if it cannot be asked at present; the name is then asked for when the bus is there.
 */
int bus_verify_client(struct bus *bus, struct client *client,
		      void (*done)(int r, struct refusal *refusal, void *userdata),
		      void *userdata);

/* The signal Revoke, to the client's verified name alone. */
void bus_send_notice(struct bus *bus, const struct client *client,
		     const struct msg_notice *notice);

/* What administrators are told; it goes out a moment later. bus may be NULL. */
void bus_revocation_started(struct bus *bus, const struct revocation *revocation);
void bus_revocation_ended(struct bus *bus, const struct revocation *revocation);
void bus_added(struct bus *bus, struct bus_view *view);
void bus_removed(struct bus *bus, struct bus_view *view);
/* Something of it may have: it is looked at ten times a second at most. */
void bus_changed(struct bus *bus, struct bus_view *view);
