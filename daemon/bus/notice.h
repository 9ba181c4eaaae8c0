/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;
struct bus_notices;
struct client;

/* The signal Revoke, to the verified names of clients alone. */

int bus_notices_new(struct broker *broker, struct bus_notices **ret);
struct bus_notices *bus_notices_free(struct bus_notices *notices);

/* On a new connection. Not owned. */
void bus_notices_begin(struct bus_notices *notices, sd_bus *bus);
void bus_notices_end(struct bus_notices *notices);

/* The client's name is verified from now on: sends it what it has missed, some each turn. */
void bus_notices_catch_up(struct bus_notices *notices, struct client *client);
