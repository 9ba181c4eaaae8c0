/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/notice.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "daemon/bus/bus.h"
#include "daemon/core/broker.h"
#include "daemon/core/notice.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* A client that is being told of what it has missed. */
struct catch_up {
	struct bus_notices *notices;
	uint64_t client;
	struct notice_place place; /* it has come to this */
	sd_event_source *source;
	RB_ENTRY(catch_up) by_client;
};

RB_HEAD(catch_ups, catch_up);

struct bus_notices {
	struct observer observer;
	struct broker *broker;
	sd_bus *bus; /* NULL: not connected */
	struct catch_ups catch_ups;
};

static int compare_client(const struct catch_up *a, const struct catch_up *b)
{
	return a->client < b->client ? -1 : a->client > b->client;
}

TREE_GENERATE(catch_ups, catch_up, by_client, compare_client)

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

static void send_notice(struct bus_notices *notices, const struct client *client,
			const struct msg_notice *notice)
{
	sd_bus_message *m = NULL;
	int r;

	if (!notices->bus || !client->bus_name || !client->bus_name_verified)
		return;
	r = sd_bus_message_new_signal(notices->bus, &m, BUS_PATH, BUS_INTERFACE, "Revoke");
	if (r >= 0)
		r = sd_bus_message_set_destination(m, client->bus_name);
	if (r >= 0)
		r = append_notice(m, notice);
	if (r >= 0)
		r = sd_bus_send(notices->bus, m, NULL);
	sd_bus_message_unref(m);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot send revocation %" PRIi64 " to %s on the bus",
			  notice->revocation, client->bus_name);
}

static void on_notice(struct observer *observer, struct client *client, const struct msg_notice *notice)
{
	send_notice(container_of(observer, struct bus_notices, observer), client, notice);
}

static void catch_up_free(struct catch_up *c)
{
	catch_ups_RB_REMOVE(&c->notices->catch_ups, c);
	sd_event_source_disable_unref(c->source);
	free(c);
}

struct telling {
	struct bus_notices *notices;
	struct client *client;
};

static int tell(const struct msg_notice *notice, void *userdata)
{
	struct telling *t = userdata;

	send_notice(t->notices, t->client, notice);
	return 0;
}

static int on_catch_up(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct catch_up *c = userdata;
	struct telling t = { c->notices, broker_find_client(c->notices->broker, c->client) };

	if (!t.client || notice_catch_up(t.client, &c->place, tell, &t) <= 0)
		catch_up_free(c);
	return 0;
}

void bus_notices_catch_up(struct bus_notices *notices, struct client *client)
{
	struct catch_up *c = catch_ups_RB_FIND(&notices->catch_ups, &(struct catch_up){ .client = client->id });
	int r = 0;

	if (!c && (c = calloc(1, sizeof(*c)))) {
		c->notices = notices;
		c->client = client->id;
		catch_ups_RB_INSERT(&notices->catch_ups, c);
		r = turn_add_source(notices->broker->event, &c->source, on_catch_up, c);
	}
	if (c && r >= 0) {
		c->place = (struct notice_place){};
		r = sd_event_source_set_enabled(c->source, SD_EVENT_ON);
	}
	if (!c || r < 0)
		log_errno(LOG_ERR, c ? r : -ENOMEM, "Cannot send client %" PRIu64 " its notices on the bus",
			  client->id);
	if (c && r < 0)
		catch_up_free(c);
}

int bus_notices_new(struct broker *broker, struct bus_notices **ret)
{
	struct bus_notices *notices = calloc(1, sizeof(*notices));

	if (!notices)
		return -ENOMEM;
	notices->broker = broker;
	RB_INIT(&notices->catch_ups);
	notices->observer = (struct observer){ .notice = on_notice };
	observer_add(&broker->observers, &notices->observer);
	*ret = notices;
	return 0;
}

struct bus_notices *bus_notices_free(struct bus_notices *notices)
{
	if (!notices)
		return NULL;
	bus_notices_end(notices);
	observer_remove(&notices->broker->observers, &notices->observer);
	free(notices);
	return NULL;
}

void bus_notices_begin(struct bus_notices *notices, sd_bus *bus)
{
	notices->bus = bus;
}

void bus_notices_end(struct bus_notices *notices)
{
	struct catch_up *c;

	while ((c = RB_ROOT(&notices->catch_ups)))
		catch_up_free(c);
	notices->bus = NULL;
}
