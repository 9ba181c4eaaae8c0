/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <sys/types.h>
#include <systemd/sd-bus.h>

/* Who owns a name on the bus, asked without waiting: sd-bus's own look-ups would. */

#define BUS_GROUP "pinbroker" /* its members may administer */

struct bus_credentials {
	pid_t pid;
	uid_t uid;
	bool administrator; /* in BUS_GROUP */
};

/* Calls done() with the bus's answer, unless *ret_slot is unreferenced before. */
int bus_credentials_ask(sd_bus *bus, const char *name, sd_bus_message_handler_t done,
			void *userdata, sd_bus_slot **ret_slot);
int bus_credentials_read(sd_bus_message *answer, struct bus_credentials *ret);

/* Looks the group up, once, before the loop runs: that may wait. */
void bus_credentials_init(void);
