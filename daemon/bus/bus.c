/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/bus.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>

#include "daemon/bus/authorization.h"
#include "daemon/bus/credentials.h"
#include "daemon/bus/managed.h"
#include "daemon/bus/manager.h"
#include "daemon/bus/news.h"
#include "daemon/bus/notice.h"
#include "daemon/bus/object.h"
#include "daemon/core/broker.h"
#include "daemon/core/notice.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

#define SYSTEM_BUS "unix:path=/run/dbus/system_bus_socket"

#define RECONNECT_FIRST_USEC (100 * USEC_PER_MSEC)
#define RECONNECT_LAST_USEC  (5 * USEC_PER_SEC)

struct bus {
	struct broker *broker;
	char *address; /* owned; NULL: the system bus */
	sd_bus *bus;   /* NULL: to be connected anew */
	struct bus_authorization *authorization; /* owned; of this connection */
	bool connected;
	uint64_t reconnect_usec; /* the present back-off */
	sd_event_source *reconnect;
	struct bus_news *news;       /* owned */
	struct bus_notices *notices; /* owned */
	struct name_authority names;
};

static int bus_connect(struct bus *bus);

static int on_reconnect(sd_event_source *source, uint64_t usec, void *userdata)
{
	(void)bus_connect(userdata);
	return 0;
}

static void reconnect_later(struct bus *bus)
{
	int r;

	bus->connected = false;
	bus->reconnect_usec = bus->reconnect_usec == 0 ? RECONNECT_FIRST_USEC
						       : bus->reconnect_usec * 2;
	if (bus->reconnect_usec > RECONNECT_LAST_USEC)
		bus->reconnect_usec = RECONNECT_LAST_USEC;
	r = sd_event_source_set_time(bus->reconnect, now_usec() + bus->reconnect_usec);
	if (r >= 0)
		r = sd_event_source_set_enabled(bus->reconnect, SD_EVENT_ONESHOT);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot arm the timer for the bus");
}

/* Until Linux 6.10 whoever closes an AF_UNIX socket collects the garbage, too: sockets that hold nothing but each
 * other, and what strangers have put into them. */
static void close_elsewhere(struct bus *bus)
{
	int fd = sd_bus_get_fd(bus->bus);

	if (fd >= 0)
		fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	bus->bus = sd_bus_close_unref(bus->bus);
	if (fd >= 0)
		offload_close_connection(bus->broker->offload, NULL, fd);
}

static void drop(struct bus *bus)
{
	if (bus->news)
		bus_news_end(bus->news);
	if (bus->notices)
		bus_notices_end(bus->notices);
	if (!bus->bus)
		return;
	bus->authorization = bus_authorization_free(bus->authorization);
	sd_bus_detach_event(bus->bus);
	close_elsewhere(bus);
}

/* Names of the old connection mean nothing on the new one. */
static void forget_names(struct broker *broker)
{
	struct client *client;

	for (client = broker_next_client(broker, 0); client;
	     client = broker_next_client(broker, client->id))
		client->bus_name_verified = false;
}

static int on_disconnected(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct bus *bus = userdata;

	log_notice("The message bus went away; notices go out on the socket alone.");
	forget_names(bus->broker);
	/* Closing it in its own callback is not possible: the timer does. */
	reconnect_later(bus);
	return 0;
}

struct verification {
	struct bus *bus;
	uint64_t client;
	char *name;
	void (*done)(int r, struct refusal *refusal, void *userdata);
	void *userdata;
};

static void verification_free(void *userdata)
{
	struct verification *v = userdata;

	/* The connection died with the question unanswered. */
	if (v->done)
		v->done(-ENOTCONN, NULL, v->userdata);
	free(v->name);
	free(v);
}

static int on_credentials(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct verification *v = userdata;
	struct client *client = broker_find_client(v->bus->broker, v->client);
	void (*done)(int r, struct refusal *refusal, void *userdata) = TAKE_PTR(v->done);
	struct bus_credentials credentials;
	struct refusal refusal;
	int r = 0;

	/* It may have gone, or be called otherwise by now. */
	if (client && client->bus_name && strcmp(client->bus_name, v->name) == 0) {
		if (bus_credentials_read(m, &credentials) < 0 ||
		    credentials.pid != client->process.pid ||
		    credentials.uid != client->process.uid) {
			r = refuse(&refusal, REFUSAL_NOT_ALLOWED, "busName",
				   "%s is not a name of your process on the bus.", v->name);
			free(client->bus_name);
			client->bus_name = NULL;
			observe_client(client, OBSERVED_CHANGED);
		} else {
			client->bus_name_verified = true;
		}
	}
	if (done)
		done(r, &refusal, v->userdata);
	client = broker_find_client(v->bus->broker, v->client);
	if (client && client->bus_name_verified)
		bus_notices_catch_up(v->bus->notices, client);
	return 0;
}

static int verify(struct name_authority *names, struct client *client,
		  void (*done)(int r, struct refusal *refusal, void *userdata), void *userdata)
{
	struct bus *bus = container_of(names, struct bus, names);
	struct verification *v;
	sd_bus_slot *slot;
	int r;

	if (!bus->connected)
		return -ENOTCONN;
	v = calloc(1, sizeof(*v));
	if (!v || !(v->name = strdup(client->bus_name))) {
		free(v);
		return -ENOMEM;
	}
	v->bus = bus;
	v->client = client->id;
	r = bus_credentials_ask(bus->bus, client->bus_name, on_credentials, v, &slot);
	if (r < 0) {
		verification_free(v);
		return r;
	}
	(void)sd_bus_slot_set_destroy_callback(slot, verification_free);
	(void)sd_bus_slot_set_floating(slot, true);
	sd_bus_slot_unref(slot);
	v->done = done;
	v->userdata = userdata;
	return 0;
}

static void verify_waiting(struct bus *bus)
{
	struct client *client;

	for (client = broker_next_client(bus->broker, 0); client;
	     client = broker_next_client(bus->broker, client->id))
		if (client->bus_name)
			(void)verify(&bus->names, client, NULL, NULL);
}

static int on_named(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct bus *bus = userdata;
	const sd_bus_error *e = sd_bus_message_get_error(m);

	if (e) {
		log_error("Cannot have the name " BUS_NAME " on the bus, notices only: %s",
			  e->message ? e->message : e->name);
		return 0;
	}
	bus->reconnect_usec = 0;
	log_info("On the bus as " BUS_NAME ".");
	return 0;
}

static int on_connected(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct bus *bus = userdata;
	int r;

	bus->connected = true;
	bus_news_begin(bus->news, bus->bus);
	bus_notices_begin(bus->notices, bus->bus);
	r = sd_bus_request_name_async(bus->bus, NULL, BUS_NAME, 0,
				      on_named, bus);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot ask for the name " BUS_NAME);
	verify_waiting(bus);
	return 0;
}

static int bus_start(struct bus *bus)
{
	int r;

	r = sd_bus_new(&bus->bus);
	if (r < 0)
		return r;
	r = sd_bus_set_address(bus->bus, bus->address ? bus->address : SYSTEM_BUS);
	if (r >= 0)
		r = sd_bus_set_bus_client(bus->bus, true);
	if (r >= 0)
		r = sd_bus_set_connected_signal(bus->bus, true);
	/* Closing what a stranger sends can wait. */
	if (r >= 0)
		r = sd_bus_negotiate_fds(bus->bus, false);
	if (r >= 0)
		r = bus_authorization_new(bus->bus, bus->broker, &bus->authorization);
	if (r >= 0)
		r = bus_manager_add(bus->bus, bus->broker);
	if (r >= 0)
		r = bus_objects_add(bus->bus, bus->broker);
	if (r >= 0)
		r = bus_managed_add(bus->bus, bus->broker);
	if (r >= 0)
		r = sd_bus_match_signal_async(bus->bus, NULL, "org.freedesktop.DBus.Local",
					      "/org/freedesktop/DBus/Local",
					      "org.freedesktop.DBus.Local", "Disconnected",
					      on_disconnected, NULL, bus);
	if (r >= 0)
		r = sd_bus_match_signal_async(bus->bus, NULL, "org.freedesktop.DBus.Local",
					      "/org/freedesktop/DBus/Local",
					      "org.freedesktop.DBus.Local", "Connected",
					      on_connected, NULL, bus);
	if (r >= 0)
		r = sd_bus_start(bus->bus);
	if (r >= 0)
		r = sd_bus_attach_event(bus->bus, bus->broker->event, SD_EVENT_PRIORITY_NORMAL);
	return r;
}

static int bus_connect(struct bus *bus)
{
	int r;

	drop(bus);
	r = bus_start(bus);
	if (r < 0) {
		if (bus->reconnect_usec == 0)
			log_errno(LOG_NOTICE, r, "The message bus is not there, going on without (%s)",
				  bus->address ? bus->address : SYSTEM_BUS);
		drop(bus);
		reconnect_later(bus);
	}
	return r;
}

int bus_new(struct broker *broker, const char *address, struct bus **ret)
{
	struct bus *bus;
	int r;

	bus = calloc(1, sizeof(*bus));
	if (!bus)
		return -ENOMEM;
	bus->broker = broker;
	bus_credentials_init();
	if (address) {
		bus->address = strdup(address);
		if (!bus->address) {
			free(bus);
			return -ENOMEM;
		}
	}
	r = sd_event_add_time(broker->event, &bus->reconnect, CLOCK_MONOTONIC, 0, 0, on_reconnect,
			      bus);
	if (r >= 0)
		r = sd_event_source_set_enabled(bus->reconnect, SD_EVENT_OFF);
	if (r >= 0)
		r = bus_notices_new(broker, &bus->notices);
	if (r >= 0)
		r = bus_news_new(broker, &bus->news);
	if (r < 0) {
		bus_free(bus);
		return r;
	}
	bus->names.verify = verify;
	broker->names = &bus->names;
	(void)bus_connect(bus);
	*ret = bus;
	return 0;
}

struct bus *bus_free(struct bus *bus)
{
	if (!bus)
		return NULL;
	drop(bus);
	sd_event_source_disable_unref(bus->reconnect);
	bus_news_free(bus->news);
	bus_notices_free(bus->notices);
	bus->broker->names = NULL;
	free(bus->address);
	free(bus);
	return NULL;
}

const struct bus_credentials *bus_caller(const struct bus *bus)
{
	return bus_authorization_caller(bus->authorization);
}
