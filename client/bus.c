/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <string.h>
#include <sys/epoll.h>

/*
 * Notices as D-Bus signals, sent to our unique name alone. Such a signal passes no match rule on
 * the bus, and anybody may send one: what counts is that it comes from the owner of the broker's
 * name, which is therefore followed.
 */

#define BROKER_NAME      "org.pinbroker1"
#define BROKER_PATH      "/org/pinbroker1"
#define BROKER_INTERFACE "org.pinbroker1.Manager"

#define DRIVER_NAME      "org.freedesktop.DBus"
#define DRIVER_PATH      "/org/freedesktop/DBus"
#define DRIVER_INTERFACE "org.freedesktop.DBus"

#define SYSTEM_BUS_ADDRESS "unix:path=/run/dbus/system_bus_socket"

/* Messages in one pinbroker_dispatch(). */
#define BUS_TURN_MAX 256

static int read_pins(sd_bus_message *m, uint64_t **ret, size_t *ret_n)
{
	const void *items;
	uint64_t *pins;
	size_t size;
	int r;

	r = sd_bus_message_read_array(m, 't', &items, &size);
	if (r < 0)
		return r;
	pins = malloc(size + sizeof(*pins));
	if (!pins)
		return -ENOMEM;
	if (size > 0)
		memcpy(pins, items, size);
	*ret = pins;
	*ret_n = size / sizeof(*pins);
	return 0;
}

static int on_revoke(pinbroker *pb, sd_bus_message *m)
{
	struct pinbroker_notice notice = {.size = PINBROKER_UNKNOWN, .uid = PINBROKER_NO_UID};
	_cleanup_(freep) uint64_t *pins = NULL;
	const char *cause;
	uint32_t pid;
	int r;

	r = sd_bus_message_read(
		m, "ttts", &notice.revocation, &notice.client, &notice.file, &notice.path);
	if (r >= 0)
		r = read_pins(m, &pins, &notice.n_pins);
	if (r >= 0)
		r = sd_bus_message_read(m, "ttsust", &notice.offset, &notice.length, &cause, &pid,
			&notice.comm, &notice.deadline_usec);
	if (r < 0)
		return r;
	if (notice.client != pb->client)
		return 0;
	notice.deadline_usec = clock_convert(pb, notice.deadline_usec);
	notice.pins = pins;
	notice.pid = (pid_t)pid;
	if (pid == 0 || !*notice.comm)
		notice.comm = NULL;
	r = enumeration_value(&enumeration_cause, cause);
	notice.cause = r < 0 ? PINBROKER_CAUSE_MODIFY : (enum pinbroker_cause)r;
	/* The signal has no size: what a truncate wants is all from there on. */
	if (notice.cause == PINBROKER_CAUSE_TRUNCATE)
		notice.size = notice.offset;
	return notice_offer(pb, &notice);
}

static int set_owner(pinbroker *pb, const char *owner)
{
	char *copy;

	copy = strdup(owner);
	if (!copy)
		return -ENOMEM;
	free(pb->bus_owner);
	pb->bus_owner = copy;
	pb->bus_owner_known = true;
	return 0;
}

static int on_owner_changed(pinbroker *pb, sd_bus_message *m)
{
	const char *name, *old, *new;
	int r;

	r = sd_bus_message_read(m, "sss", &name, &old, &new);
	if (r < 0 || strcmp(name, BROKER_NAME) != 0)
		return r;
	r = set_owner(pb, new);
	if (r >= 0 && *new) {
		/* A broker that has just come to the bus may not have been able to check our name.
		 */
		free(pb->bus_name_said);
		pb->bus_name_said = NULL;
	}
	return r;
}

static int on_message(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *sender = sd_bus_message_get_sender(m);
	pinbroker *pb = userdata;
	int r = 0;

	if (!sender)
		return 0;
	if (sd_bus_message_is_signal(m, BROKER_INTERFACE, "Revoke") > 0) {
		if (pb->bus_owner && strcmp(sender, pb->bus_owner) == 0)
			r = on_revoke(pb, m);
	} else if (sd_bus_message_is_signal(m, DRIVER_INTERFACE, "NameOwnerChanged") > 0) {
		if (strcmp(sender, DRIVER_NAME) == 0)
			r = on_owner_changed(pb, m);
	} else {
		return 0;
	}
	/* Out of memory: a notice is lost on this channel, so begin it anew. */
	if (r == -ENOMEM)
		pb->bus_error = r;
	return 1;
}

static int on_owner(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *owner = "";
	pinbroker *pb = userdata;
	int r = 0;

	if (!sd_bus_message_is_method_error(m, NULL))
		r = sd_bus_message_read(m, "s", &owner);
	if (r >= 0 && !pb->bus_owner_known)
		r = set_owner(pb, owner);
	if (r < 0)
		pb->bus_error = r;
	return 1;
}

/* Once the bus has let us in: our own name, and the broker's. */
static int bus_introduce(pinbroker *pb)
{
	const char *name;
	char *copy;
	int r;

	r = sd_bus_get_unique_name(pb->bus, &name);
	if (r < 0)
		return r;
	copy = strdup(name);
	if (!copy)
		return -ENOMEM;
	free(pb->bus_name);
	pb->bus_name = copy;
	pb->bus_ready = true;

	r = sd_bus_call_method_async(pb->bus, NULL, DRIVER_NAME, DRIVER_PATH, DRIVER_INTERFACE,
		"AddMatch", NULL, NULL, "s",
		"type='signal',sender='" DRIVER_NAME "',path='" DRIVER_PATH
		"',interface='" DRIVER_INTERFACE "',member='NameOwnerChanged',"
		"arg0='" BROKER_NAME "'");
	if (r < 0)
		return r;
	return sd_bus_call_method_async(pb->bus, NULL, DRIVER_NAME, DRIVER_PATH, DRIVER_INTERFACE,
		"GetNameOwner", on_owner, pb, "s", BROKER_NAME);
}

static const char *bus_address(const pinbroker *pb)
{
	const char *address = pb->bus_address;

	address = address ?: environment("PINBROKER_BUS");
	address = address ?: environment("DBUS_SYSTEM_BUS_ADDRESS");
	return address ?: SYSTEM_BUS_ADDRESS;
}

static int bus_open(pinbroker *pb)
{
	int r;

	r = sd_bus_new(&pb->bus);
	if (r < 0)
		return r;
	r = sd_bus_set_address(pb->bus, bus_address(pb));
	if (r < 0)
		return r;
	r = sd_bus_set_bus_client(pb->bus, true);
	if (r < 0)
		return r;
	r = sd_bus_add_filter(pb->bus, NULL, on_message, pb);
	if (r < 0)
		return r;
	return sd_bus_start(pb->bus);
}

void bus_close(pinbroker *pb)
{
	if (pb->bus_fd >= 0)
		poll_remove(pb, pb->bus_fd);
	pb->bus_fd = -1;
	if (pb->bus)
		sd_bus_close(pb->bus);
	pb->bus = sd_bus_unref(pb->bus);
	pb->bus_wake_at = USEC_INFINITY;
	pb->bus_error = 0;
	pb->bus_ready = pb->bus_owner_known = false;
	free(pb->bus_owner);
	pb->bus_owner = NULL;
	/* The next bus may give the same name anew, and the broker has to look whose it is. */
	free(pb->bus_name_said);
	pb->bus_name_said = NULL;
}

static void bus_break(pinbroker *pb)
{
	bus_close(pb);
	backoff_down(&pb->bus_retry);
}

/* The descriptor may be another one after every step, while addresses are being tried. */
static int bus_arm(pinbroker *pb)
{
	uint64_t timeout;
	int fd, events, r;

	fd = sd_bus_get_fd(pb->bus);
	if (fd < 0)
		return fd;
	events = sd_bus_get_events(pb->bus);
	if (events < 0)
		return events;
	r = sd_bus_get_timeout(pb->bus, &timeout);
	if (r < 0)
		return r;
	pb->bus_wake_at = timeout;
	if (fd == pb->bus_fd) {
		poll_change(pb, fd, (uint32_t)events, SOURCE_BUS);
		return 0;
	}
	if (pb->bus_fd >= 0)
		poll_remove(pb, pb->bus_fd);
	pb->bus_fd = -1;
	r = poll_add(pb, fd, (uint32_t)events, SOURCE_BUS);
	if (r >= 0)
		pb->bus_fd = fd;
	return r;
}

static int bus_turn(pinbroker *pb)
{
	int r;

	for (unsigned i = 0; i < BUS_TURN_MAX; i++) {
		r = sd_bus_process(pb->bus, NULL);
		if (r >= 0)
			r = pb->bus_error ?: r;
		if (r < 0)
			return r;
		if (!pb->bus_ready && sd_bus_is_ready(pb->bus) > 0) {
			r = bus_introduce(pb);
			if (r < 0)
				return r;
			continue;
		}
		if (r == 0)
			break;
	}
	return bus_arm(pb);
}

void bus_dispatch(pinbroker *pb)
{
	if (pb->bus && bus_turn(pb) < 0)
		bus_break(pb);
}

void bus_start(pinbroker *pb)
{
	if (bus_open(pb) < 0) {
		bus_break(pb);
		return;
	}
	backoff_up(&pb->bus_retry);
	bus_dispatch(pb);
}

void bus_await(pinbroker *pb, uint64_t until_usec)
{
	while (pb->bus && !pb->bus_owner_known) {
		uint64_t now = now_usec();

		if (now >= until_usec)
			return;
		if (sd_bus_wait(pb->bus, until_usec - now) < 0) {
			bus_break(pb);
			return;
		}
		bus_dispatch(pb);
	}
}

void bus_stop(pinbroker *pb)
{
	bus_close(pb);
	pb->bus_retry.at = USEC_INFINITY;
	free(pb->bus_name);
	pb->bus_name = NULL;
}
