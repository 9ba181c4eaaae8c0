/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/credentials.h"

#include <errno.h>
#include <grp.h>
#include <stdint.h>
#include <string.h>

#include "protocol/macro.h"

static gid_t administrators = (gid_t)-1;

void bus_credentials_init(void)
{
	struct group *group = getgrnam(BUS_GROUP);

	if (group)
		administrators = group->gr_gid;
}

int bus_credentials_ask(sd_bus *bus, const char *name, sd_bus_message_handler_t done,
			void *userdata, sd_bus_slot **ret_slot)
{
	return sd_bus_call_method_async(bus, ret_slot, "org.freedesktop.DBus",
					"/org/freedesktop/DBus", "org.freedesktop.DBus",
					"GetConnectionCredentials", done, userdata, "s", name);
}

static int read_groups(sd_bus_message *m, struct bus_credentials *c)
{
	const uint32_t *groups;
	size_t size;
	int r;

	r = sd_bus_message_enter_container(m, 'v', "au");
	if (r >= 0)
		r = sd_bus_message_read_array(m, 'u', (const void **)&groups, &size);
	for (size_t i = 0; r >= 0 && i < size / sizeof(*groups); i++)
		c->administrator |= administrators != (gid_t)-1 && groups[i] == administrators;
	return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int read_entry(sd_bus_message *m, struct bus_credentials *c)
{
	const char *key;
	uint32_t value;
	int r;

	r = sd_bus_message_read(m, "s", &key);
	if (r < 0)
		return r;
	if (strcmp(key, "UnixGroupIDs") == 0)
		return read_groups(m, c);
	if (strcmp(key, "ProcessID") != 0 && strcmp(key, "UnixUserID") != 0)
		return sd_bus_message_skip(m, "v");
	r = sd_bus_message_read(m, "v", "u", &value);
	if (r >= 0 && strcmp(key, "ProcessID") == 0)
		c->pid = (pid_t)value;
	else if (r >= 0)
		c->uid = value;
	return r;
}

int bus_credentials_read(sd_bus_message *m, struct bus_credentials *ret)
{
	struct bus_credentials c = { .uid = (uid_t)-1 };
	int r;

	if (sd_bus_message_is_method_error(m, NULL))
		return -EACCES;
	r = sd_bus_message_enter_container(m, 'a', "{sv}");
	while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
		r = read_entry(m, &c);
		if (r >= 0)
			r = sd_bus_message_exit_container(m);
	}
	if (r < 0)
		return r;
	*ret = c;
	return 0;
}
