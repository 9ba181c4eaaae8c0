/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;

/* The object /org/pinbroker1 with org.pinbroker1.Manager. */
int bus_manager_add(sd_bus *bus, struct broker *broker);
