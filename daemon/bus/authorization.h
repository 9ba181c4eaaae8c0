/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;
struct bus_authorization;
struct bus_credentials;

/*
 * Who may call on the bus: root, who runs the daemon, and the group of administrators; others as
 * polkit decides, whose uid a check is charged to. Every call is held back until that is known, and
 * then goes the way of all messages, so that it holds for methods, properties and introspection
 * alike.
 */
int bus_authorization_new(sd_bus *bus, struct broker *broker, struct bus_authorization **ret);
/* Who sent the call that is being dispatched. */
const struct bus_credentials *bus_authorization_caller(const struct bus_authorization *authorization);
/* What is held back is dropped; before the bus is closed. Accepts NULL, returns NULL. */
struct bus_authorization *bus_authorization_free(struct bus_authorization *authorization);
