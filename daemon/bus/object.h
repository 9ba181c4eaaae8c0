/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>
#include <systemd/sd-bus.h>

#include "daemon/bus/view.h"
#include "protocol/schema.h"

struct broker;

/*
 * What there is, as objects: /org/pinbroker1/client/N, /file/N, /file/N/pin/M and /revocation/N. They have
 * the fields of the socket's ClientInfo, FileInfo, PinInfo and RevocationInfo for properties, each with a
 * capital letter; where the socket has null, a number is UINT64_MAX and a text empty.
 */

int bus_objects_add(sd_bus *bus, struct broker *broker);

/* InterfacesAdded and InterfacesRemoved, and PropertiesChanged with what is no longer as it was told on this
 * connection, if anything. */
int bus_object_added(sd_bus *bus, struct broker *broker, struct bus_view *view, unsigned connection);
int bus_object_changed(sd_bus *bus, struct broker *broker, struct bus_view *view,
		       unsigned connection);
int bus_object_removed(sd_bus *bus, enum bus_object kind, uint64_t id);

/* Adds the next object of a kind to an answer of GetManagedObjects. 1; 0: there is none. */
int bus_object_append_next(sd_bus_message *m, struct broker *broker, enum bus_object kind, uint64_t *after);

/* The D-Bus type of a field, and the value at `value` in a message; for OBJECT fields -EOPNOTSUPP. */
const char *bus_field_type(const struct field *field);
int bus_append_value(sd_bus_message *m, const struct field *field, const void *value);
