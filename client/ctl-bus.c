/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <string.h>

const char *bus_address(const struct ctl *ctl)
{
	return ctl->bus_address ?: environment("PINBROKER_BUS");
}

int fail_bus(const struct ctl *ctl, int r, const char *what)
{
	return fail(EX_UNAVAILABLE,
		"%s over D-Bus (%s): %s. Check that the bus is running and lets you in, or give its "
		"address with --bus.",
		what, bus_address(ctl) ?: "system bus", strerror(-r));
}

int fail_bus_call(const sd_bus_error *error, int r, const char *what)
{
	const char *message = error->message ?: strerror(-r), *advice = "";
	int code = EX_UNAVAILABLE;

	if (sd_bus_error_has_name(error, SD_BUS_ERROR_ACCESS_DENIED)) {
		advice = " This is for root and the group pinbroker.";
		code = EX_NOPERM;
	} else if (sd_bus_error_has_name(error, SD_BUS_ERROR_SERVICE_UNKNOWN) ||
		   sd_bus_error_has_name(error, SD_BUS_ERROR_NAME_HAS_NO_OWNER)) {
		message = "It is not on the bus";
		advice = " See whether the broker is running (systemctl status pinbrokerd), and on "
			 "this bus.";
	} else if (r == -ETIMEDOUT || sd_bus_error_has_name(error, SD_BUS_ERROR_NO_REPLY)) {
		message = "It does not answer";
		advice = " The broker is stopped, or hangs: see systemctl status pinbrokerd.";
	} else if (error->name && strstr(error->name, ".NoSuchObject")) {
		advice = " pinbrokerctl list shows what there is.";
		code = EX_NOINPUT;
	} else if (error->name && strstr(error->name, ".Invalid")) {
		code = EX_USAGE;
	}
	return fail(code, "%s: %s%s%s", what, message,
		*message && strchr(".!?", message[strlen(message) - 1]) ? "" : ".", advice);
}

static int open_bus(const char *address, sd_bus **ret)
{
	_cleanup_(sd_bus_flush_close_unrefp) sd_bus *bus = NULL;
	int r;

	if (!address)
		return sd_bus_open_system(ret);
	r = sd_bus_new(&bus);
	if (r >= 0)
		r = sd_bus_set_address(bus, address);
	if (r >= 0)
		r = sd_bus_set_bus_client(bus, true);
	if (r >= 0)
		r = sd_bus_start(bus);
	if (r >= 0)
		*ret = TAKE_PTR(bus);
	return r;
}

int ctl_bus_connect(const struct ctl *ctl, sd_bus **ret)
{
	const char *timeout = secure_getenv("PINBROKER_TIMEOUT");
	int r = open_bus(bus_address(ctl), ret);

	if (r >= 0 && timeout && strtod(timeout, NULL) > 0)
		(void)sd_bus_set_method_call_timeout(
			*ret, (uint64_t)(strtod(timeout, NULL) * USEC_PER_SEC));
	return r;
}

int ctl_bus_open(const struct ctl *ctl, sd_bus **ret)
{
	int r = ctl_bus_connect(ctl, ret);

	return r < 0 ? fail_bus(ctl, r, "Cannot reach the broker") : 0;
}
