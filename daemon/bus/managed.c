/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/managed.h"

#include <errno.h>
#include <stdlib.h>

#include "daemon/bus/bus.h"
#include "daemon/bus/object.h"
#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

#define OBJECTS_MAX 4096U

struct answer {
	struct broker *broker;
	sd_bus_message *reply; /* reference */
	enum bus_object kind;  /* what comes next, after this identifier */
	uint64_t after;
	unsigned n;
};

static void answer_free(void *userdata)
{
	struct answer *a = userdata;

	sd_bus_message_unref(a->reply);
	free(a);
}

/* 1: there are more; 0: those were all. */
static int add_next(struct answer *a)
{
	int r;

	if (a->kind == BUS_PIN || a->n == OBJECTS_MAX)
		return 0;
	r = bus_object_append_next(a->reply, a->broker, a->kind, &a->after);
	if (r == 0) {
		a->kind++;
		a->after = 0;
	}
	a->n += r > 0;
	return r < 0 ? r : 1;
}

static int on_answer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct answer *a = userdata;
	int r;

	do
		r = add_next(a);
	while (r > 0 && !slice_is_over(&slice));
	if (r > 0)
		return 0;
	if (r >= 0)
		r = sd_bus_message_close_container(a->reply);
	if (r >= 0)
		r = sd_bus_message_send(a->reply);
	if (r < 0 && r != -ENOTCONN)
		log_errno(LOG_WARNING, r, "Cannot tell the bus of all objects");
	(void)sd_event_source_set_floating(source, false); /* nobody's any more: it goes, and the answer with it */
	return 0;
}

static int on_call(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct broker *broker = userdata;
	sd_event_source *source;
	struct answer *a;
	int r;

	if (!sd_bus_message_is_method_call(m, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"))
		return 0;
	a = calloc(1, sizeof(*a));
	if (!a)
		return -ENOMEM;
	a->broker = broker;
	r = sd_bus_message_new_method_return(m, &a->reply);
	if (r >= 0)
		r = sd_bus_message_open_container(a->reply, 'a', "{oa{sa{sv}}}");
	if (r >= 0)
		r = turn_add_source(broker->event, &source, on_answer, a);
	if (r < 0) {
		answer_free(a);
		return r;
	}
	(void)sd_event_source_set_destroy_callback(source, answer_free);
	(void)sd_event_source_set_enabled(source, SD_EVENT_ON);
	/* the loop's, should it end first */
	(void)sd_event_source_set_floating(source, true);
	sd_event_source_unref(source);
	return 1;
}

int bus_managed_add(sd_bus *bus, struct broker *broker)
{
	return sd_bus_add_object(bus, NULL, BUS_PATH, on_call, broker);
}
