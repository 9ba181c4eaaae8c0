/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>

#include "daemon/bus/object.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

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

