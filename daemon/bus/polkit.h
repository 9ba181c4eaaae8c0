/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

/* Whether the sender of a call may do it, as polkit decides; asked without waiting. */

/*
 * Asks about a call. done() is called once, with the answer or with an error, unless *ret_slot is
 * unreferenced before. -E2BIG: the call is too long to be kept meanwhile.
 */
int bus_polkit_ask(sd_bus_message *call, sd_bus_message_handler_t done, void *userdata,
		   sd_bus_slot **ret_slot);

/* 0: it may. Otherwise negative errno, and what to tell the sender in ret_error. */
int bus_polkit_read(sd_bus_message *answer, sd_bus_error *ret_error);
