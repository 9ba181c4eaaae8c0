/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;
struct refusal;

/* Answers a Revoke method: r is what admin_revoke_…() returned. */
int bus_reply_revocation(sd_bus_message *m, int r, uint64_t id, const struct refusal *refusal);
/* The object /org/pinbroker1 with org.pinbroker1.Manager. */
int bus_manager_add(sd_bus *bus, struct broker *broker);
