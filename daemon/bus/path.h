/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

/* RevokePath: a path is what it is for its caller, at that time; so it is looked up on the pool. */
int bus_revoke_path(sd_bus_message *m, void *userdata, sd_bus_error *error);
