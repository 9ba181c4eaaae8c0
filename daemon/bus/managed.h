/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;

/* ObjectManager's GetManagedObjects, answered some objects each turn of the loop: sd-bus would do it in one. */
int bus_managed_add(sd_bus *bus, struct broker *broker);
