/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bus.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>

#include "broker.h"
#include "bus-authorization.h"
#include "bus-credentials.h"
#include "bus-managed.h"
#include "bus-manager.h"
#include "bus-object.h"
#include "log.h"
#include "macro.h"
#include "notice.h"
#include "turn.h"

#define SYSTEM_BUS "unix:path=/run/dbus/system_bus_socket"

#define RECONNECT_FIRST_USEC (100 * USEC_PER_MSEC)
#define RECONNECT_LAST_USEC  (5 * USEC_PER_SEC)

/* Administrators are told a moment later than the holder, who lets go meanwhile. */
#define NEWS_USEC (2 * USEC_PER_MSEC)
#define NEWS_MAX  64U

/* Changes are told ten times a second at most. */
#define CHANGES_USEC (100 * USEC_PER_MSEC)

/* With more messages than that waiting for a bus that does not read, the news are left out. */
#define BACKLOG_MAX 64U

struct news {
	enum {
		NEWS_ADDED,
		NEWS_REMOVED,
		NEWS_STARTED, /* a revocation */
		NEWS_ENDED,
	} what;
	enum bus_object kind;
	uint64_t id;
	enum revocation_state outcome;
};

struct bus {
	struct broker *broker;
	char *address; /* owned; NULL: the system bus */
	sd_bus *bus;   /* NULL: to be connected anew */
	struct bus_authorization *authorization; /* owned; of this connection */
	bool connected;
	unsigned connection; /* the number of the present one */
	bool behind; /* does not read */
	uint64_t reconnect_usec; /* the present back-off */
	sd_event_source *reconnect;
	struct news news[NEWS_MAX]; /* in the order of what happened */
	unsigned n_news;
	sd_event_source *news_timer; /* enabled while there are any */
	TAILQ_HEAD(, bus_view) changed; /* longest ago first */
	unsigned n_changed, n_due;      /* the first n_due are being told */
	sd_event_source *changes_timer; /* enabled while there are any */
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

static int send_one(struct bus *bus, const struct news *n)
{
	switch (n->what) {
	case NEWS_ADDED:
		return bus_object_added(bus->bus, bus->broker, n->kind, n->id, bus->connection);
	case NEWS_REMOVED:
		return bus_object_removed(bus->bus, n->kind, n->id);
	case NEWS_STARTED:
		return sd_bus_emit_signal(bus->bus, BUS_PATH, BUS_INTERFACE, "RevocationStarted",
					  "t", n->id);
	default:
		return sd_bus_emit_signal(bus->bus, BUS_PATH, BUS_INTERFACE, "RevocationEnded",
					  "ts", n->id,
					  enumeration_name(&enumeration_revocation_state,
							   (int)n->outcome));
	}
}

static bool is_behind(struct bus *bus)
{
	uint64_t n = 0;
	bool behind = sd_bus_get_n_queued_write(bus->bus, &n) >= 0 && n > BACKLOG_MAX;

	if (behind && !bus->behind)
		log_warning("The message bus does not keep up: it is not told what comes and goes.");
	bus->behind = behind;
	return behind;
}

/* At least the first, and others until the slice is over. */
static void send_news(struct bus *bus, const struct slice *slice)
{
	unsigned i = 0;

	do {
		int r = bus->connected && !is_behind(bus) ? send_one(bus, &bus->news[i]) : 0;

		if (r < 0 && r != -ENOTCONN)
			log_errno(LOG_WARNING, r, "Cannot tell the bus of %" PRIu64, bus->news[i].id);
	} while (++i < bus->n_news && !slice_is_over(slice));
	bus->n_news -= i;
	memmove(bus->news, bus->news + i, bus->n_news * sizeof(bus->news[0]));
}

static int on_news(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct bus *bus = userdata;
	int r;

	if (bus->n_news > 0)
		send_news(bus, &slice);
	if (bus->n_news == 0)
		return 0;
	r = sd_event_source_set_time_relative(source, 0);
	return r < 0 ? r : sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
}

static void forget_change(struct bus *bus, struct bus_view *view)
{
	TAILQ_REMOVE(&bus->changed, view, of_bus);
	view->changed = false;
	bus->n_changed--;
}

static void set_changes_timer(struct bus *bus, uint64_t usec)
{
	int r = sd_event_source_set_time_relative(bus->changes_timer, usec);

	if (r >= 0)
		r = sd_event_source_set_enabled(bus->changes_timer, SD_EVENT_ONESHOT);
	if (r < 0 && r != -ESTALE) /* the loop is over: nothing of it is told any more */
		log_errno(LOG_ERR, r, "Cannot arm the timer of what changes");
}

/* What has changed again meanwhile is told the next time. */
static int on_changes(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct bus *bus = userdata;

	if (bus->n_news > 0) {
		send_news(bus, &slice); /* they may be of the same objects */
		set_changes_timer(bus, 0);
		return 0;
	}
	if (bus->n_due == 0)
		bus->n_due = bus->n_changed;
	while (bus->n_due > 0 && !TAILQ_EMPTY(&bus->changed) && bus->connected && !is_behind(bus) &&
	       !slice_is_over(&slice)) {
		struct bus_view *view = TAILQ_FIRST(&bus->changed);
		int r;

		forget_change(bus, view);
		bus->n_due--;
		r = bus_object_changed(bus->bus, bus->broker, view, bus->connection);
		if (r < 0 && r != -ENOTCONN)
			log_errno(LOG_WARNING, r, "Cannot tell the bus of %" PRIu64, view->id);
	}
	if (TAILQ_EMPTY(&bus->changed))
		bus->n_due = 0;
	else if (bus->connected)
		set_changes_timer(bus, bus->n_due > 0 && !bus->behind ? 0 : CHANGES_USEC);
	return 0;
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
	struct slice slice = slice_begin();

	while (bus->n_news > 0)
		send_news(bus, &slice);
	while (!TAILQ_EMPTY(&bus->changed))
		forget_change(bus, TAILQ_FIRST(&bus->changed));
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

static void verify_waiting(struct bus *bus)
{
	struct client *client;

	for (client = broker_next_client(bus->broker, 0); client;
	     client = broker_next_client(bus->broker, client->id))
		if (client->bus_name)
			(void)bus_verify_client(bus, client, NULL, NULL);
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
	bus->connection++;
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
	TAILQ_INIT(&bus->changed);
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
		r = sd_event_add_time(broker->event, &bus->news_timer, CLOCK_MONOTONIC, 0,
				      USEC_PER_MSEC, on_news, bus);
	if (r >= 0)
		r = sd_event_source_set_enabled(bus->news_timer, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &bus->changes_timer, CLOCK_MONOTONIC, 0,
				      USEC_PER_MSEC, on_changes, bus);
	if (r >= 0)
		r = sd_event_source_set_enabled(bus->changes_timer, SD_EVENT_OFF);
	if (r < 0) {
		bus_free(bus);
		return r;
	}
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
	sd_event_source_disable_unref(bus->news_timer);
	sd_event_source_disable_unref(bus->changes_timer);
	free(bus->address);
	free(bus);
	return NULL;
}

const struct bus_credentials *bus_caller(const struct bus *bus)
{
	return bus_authorization_caller(bus->authorization);
}

bool bus_name_is_unique(const char *name)
{
	if (name[0] != ':' || strlen(name) > 255)
		return false;
	for (const char *p = name + 1; *p; p++)
		if (!strchr("0123456789.", *p))
			return false;
	return name[1] != 0;
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
			bus_changed(v->bus, &client->view);
		} else {
			client->bus_name_verified = true;
		}
	}
	if (done)
		done(r, &refusal, v->userdata);
	client = broker_find_client(v->bus->broker, v->client);
	if (client && client->bus_name_verified)
		notice_send_bus(client);
	return 0;
}

int bus_verify_client(struct bus *bus, struct client *client,
		      void (*done)(int r, struct refusal *refusal, void *userdata),
		      void *userdata)
{
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

static int append_notice(sd_bus_message *m, const struct msg_notice *n)
{
	const struct msg_conflict *c = &n->conflict;
	int r;

	r = sd_bus_message_append(m, "ttts", (uint64_t)n->revocation, (uint64_t)n->client,
				  (uint64_t)n->file, n->path);
	if (r >= 0)
		r = sd_bus_message_append_array(m, 't', n->pins.items,
						n->pins.n_items * sizeof(uint64_t));
	if (r >= 0)
		r = sd_bus_message_append(m, "ttsust", (uint64_t)c->offset, (uint64_t)c->length,
					  enumeration_name(&enumeration_cause, c->cause),
					  c->pid == INT_NULL ? 0 : (uint32_t)c->pid,
					  c->comm ? c->comm : "", (uint64_t)n->deadlineUSec);
	return r;
}

void bus_send_notice(struct bus *bus, const struct client *client,
		     const struct msg_notice *notice)
{
	sd_bus_message *m = NULL;
	int r;

	if (!bus->connected || !client->bus_name || !client->bus_name_verified)
		return;
	r = sd_bus_message_new_signal(bus->bus, &m, BUS_PATH, BUS_INTERFACE, "Revoke");
	if (r >= 0)
		r = sd_bus_message_set_destination(m, client->bus_name);
	if (r >= 0)
		r = append_notice(m, notice);
	if (r >= 0)
		r = sd_bus_send(bus->bus, m, NULL);
	sd_bus_message_unref(m);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot send revocation %" PRIi64 " to %s on the bus",
			  notice->revocation, client->bus_name);
}

static void add_news(struct bus *bus, struct news news)
{
	if (!bus || !bus->connected)
		return;
	if (bus->n_news == NEWS_MAX)
		send_news(bus, &(struct slice){}); /* the first */
	bus->news[bus->n_news++] = news;
	if (sd_event_source_get_enabled(bus->news_timer, NULL) == SD_EVENT_OFF &&
	    (sd_event_source_set_time_relative(bus->news_timer, NEWS_USEC) < 0 ||
	     sd_event_source_set_enabled(bus->news_timer, SD_EVENT_ONESHOT) < 0))
		send_news(bus, &(struct slice){});
}

void bus_revocation_started(struct bus *bus, const struct revocation *rev)
{
	add_news(bus, (struct news){ .what = NEWS_STARTED, .id = rev->id });
}

void bus_revocation_ended(struct bus *bus, const struct revocation *rev)
{
	add_news(bus, (struct news){ .what = NEWS_ENDED, .id = rev->id, .outcome = rev->state });
}

void bus_added(struct bus *bus, struct bus_view *view)
{
	add_news(bus, (struct news){ .what = NEWS_ADDED, .kind = view->kind, .id = view->id });
}

void bus_removed(struct bus *bus, struct bus_view *view)
{
	if (view->changed)
		forget_change(bus, view);
	/* Nobody has heard of what came and went in a moment, nor needs to. */
	for (unsigned i = 0; bus && i < bus->n_news; i++) {
		struct news *n = &bus->news[i];

		if (n->what == NEWS_ADDED && n->kind == view->kind && n->id == view->id) {
			memmove(n, n + 1, (bus->n_news - i - 1) * sizeof(*n));
			bus->n_news--;
			return;
		}
	}
	add_news(bus, (struct news){ .what = NEWS_REMOVED, .kind = view->kind, .id = view->id });
}

void bus_changed(struct bus *bus, struct bus_view *view)
{
	if (!bus || !bus->connected || view->changed)
		return;
	view->changed = true;
	TAILQ_INSERT_TAIL(&bus->changed, view, of_bus);
	if (bus->n_changed++ == 0)
		set_changes_timer(bus, CHANGES_USEC);
}
