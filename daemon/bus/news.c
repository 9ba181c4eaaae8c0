/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/news.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/bus/bus.h"
#include "daemon/bus/object.h"
#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* Administrators are told a moment later than the holder, who lets go meanwhile. */
#define NEWS_USEC (2 * USEC_PER_MSEC)
#define NEWS_MAX  64U

/* Changes are told ten times a second at most. */
#define CHANGES_USEC (100 * USEC_PER_MSEC)

/* With more messages than that waiting for a bus that does not read, the news are left out. */
#define BACKLOG_MAX 64U

struct item {
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

RB_HEAD(views, bus_view);

struct bus_news {
	struct observer observer;
	struct broker *broker;
	sd_bus *bus;                /* NULL: not connected */
	unsigned connection;        /* the number of the present one */
	bool behind;                /* it does not read */
	struct item items[NEWS_MAX]; /* in the order of what happened */
	unsigned n_items;
	sd_event_source *items_timer;   /* enabled while there are any */
	struct views views;             /* owned */
	TAILQ_HEAD(, bus_view) changed; /* longest ago first */
	unsigned n_changed, n_due;      /* the first n_due are being told */
	sd_event_source *changes_timer; /* enabled while there are any */
};

static int compare_view(const struct bus_view *a, const struct bus_view *b)
{
	return a->id < b->id ? -1 : a->id > b->id;
}

TREE_GENERATE(views, bus_view, by_id, compare_view)

/* NULL: there is no memory for it, or it is not there any more. */
static struct bus_view *get_view(struct bus_news *news, enum bus_object kind, uint64_t id)
{
	struct bus_view *view = views_RB_FIND(&news->views, &(struct bus_view){ .id = id });

	if (view)
		return view;
	view = calloc(1, sizeof(*view));
	if (!view)
		return NULL;
	view->kind = kind;
	view->id = id;
	views_RB_INSERT(&news->views, view);
	return view;
}

static void forget_change(struct bus_news *news, struct bus_view *view)
{
	TAILQ_REMOVE(&news->changed, view, of_news);
	view->changed = false;
	news->n_changed--;
}

static int send_item(struct bus_news *news, const struct item *item)
{
	struct bus_view *view;

	switch (item->what) {
	case NEWS_ADDED:
		view = get_view(news, item->kind, item->id);
		return view ? bus_object_added(news->bus, news->broker, view, news->connection) : -ENOMEM;
	case NEWS_REMOVED:
		return bus_object_removed(news->bus, item->kind, item->id);
	case NEWS_STARTED:
		return sd_bus_emit_signal(news->bus, BUS_PATH, BUS_INTERFACE, "RevocationStarted", "t",
					  item->id);
	default:
		return sd_bus_emit_signal(news->bus, BUS_PATH, BUS_INTERFACE, "RevocationEnded", "ts",
					  item->id,
					  enumeration_name(&enumeration_revocation_state,
							   (int)item->outcome));
	}
}

static bool is_behind(struct bus_news *news)
{
	uint64_t n = 0;
	bool behind = sd_bus_get_n_queued_write(news->bus, &n) >= 0 && n > BACKLOG_MAX;

	if (behind && !news->behind)
		log_warning("The message bus does not keep up: it is not told what comes and goes.");
	news->behind = behind;
	return behind;
}

/* At least the first, and others until the slice is over. */
static void send_items(struct bus_news *news, const struct slice *slice)
{
	unsigned i = 0;

	do {
		int r = news->bus && !is_behind(news) ? send_item(news, &news->items[i]) : 0;

		if (r < 0 && r != -ENOTCONN)
			log_errno(LOG_WARNING, r, "Cannot tell the bus of %" PRIu64, news->items[i].id);
	} while (++i < news->n_items && !slice_is_over(slice));
	news->n_items -= i;
	memmove(news->items, news->items + i, news->n_items * sizeof(news->items[0]));
}

static int on_items(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct bus_news *news = userdata;
	int r;

	if (news->n_items > 0)
		send_items(news, &slice);
	if (news->n_items == 0)
		return 0;
	r = sd_event_source_set_time_relative(source, 0);
	return r < 0 ? r : sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
}

static void set_changes_timer(struct bus_news *news, uint64_t usec)
{
	int r = sd_event_source_set_time_relative(news->changes_timer, usec);

	if (r >= 0)
		r = sd_event_source_set_enabled(news->changes_timer, SD_EVENT_ONESHOT);
	if (r < 0 && r != -ESTALE) /* the loop is over: nothing of it is told any more */
		log_errno(LOG_ERR, r, "Cannot arm the timer of what changes");
}

/* What has changed again meanwhile is told the next time. */
static int on_changes(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct slice slice = slice_begin();
	struct bus_news *news = userdata;

	if (news->n_items > 0) {
		send_items(news, &slice); /* they may be of the same objects */
		set_changes_timer(news, 0);
		return 0;
	}
	if (news->n_due == 0)
		news->n_due = news->n_changed;
	while (news->n_due > 0 && !TAILQ_EMPTY(&news->changed) && news->bus && !is_behind(news) &&
	       !slice_is_over(&slice)) {
		struct bus_view *view = TAILQ_FIRST(&news->changed);
		int r;

		forget_change(news, view);
		news->n_due--;
		r = bus_object_changed(news->bus, news->broker, view, news->connection);
		if (r < 0 && r != -ENOTCONN)
			log_errno(LOG_WARNING, r, "Cannot tell the bus of %" PRIu64, view->id);
	}
	if (TAILQ_EMPTY(&news->changed))
		news->n_due = 0;
	else if (news->bus)
		set_changes_timer(news, news->n_due > 0 && !news->behind ? 0 : CHANGES_USEC);
	return 0;
}

static void add_item(struct bus_news *news, struct item item)
{
	if (!news->bus)
		return;
	if (news->n_items == NEWS_MAX)
		send_items(news, &(struct slice){}); /* the first */
	news->items[news->n_items++] = item;
	if (sd_event_source_get_enabled(news->items_timer, NULL) == SD_EVENT_OFF &&
	    (sd_event_source_set_time_relative(news->items_timer, NEWS_USEC) < 0 ||
	     sd_event_source_set_enabled(news->items_timer, SD_EVENT_ONESHOT) < 0))
		send_items(news, &(struct slice){});
}

static void note_change(struct bus_news *news, enum bus_object kind, uint64_t id)
{
	struct bus_view *view = news->bus ? get_view(news, kind, id) : NULL;

	if (!view || view->changed)
		return;
	view->changed = true;
	TAILQ_INSERT_TAIL(&news->changed, view, of_news);
	if (news->n_changed++ == 0)
		set_changes_timer(news, CHANGES_USEC);
}

static void note_removed(struct bus_news *news, enum bus_object kind, uint64_t id)
{
	struct bus_view *view = views_RB_FIND(&news->views, &(struct bus_view){ .id = id });

	if (view && view->changed)
		forget_change(news, view);
	if (view)
		views_RB_REMOVE(&news->views, view);
	free(view);
	/* Nobody has heard of what came and went in a moment, nor needs to. */
	for (unsigned i = 0; i < news->n_items; i++) {
		struct item *item = &news->items[i];

		if (item->what == NEWS_ADDED && item->id == id) {
			memmove(item, item + 1, (news->n_items - i - 1) * sizeof(*item));
			news->n_items--;
			return;
		}
	}
	add_item(news, (struct item){ .what = NEWS_REMOVED, .kind = kind, .id = id });
}

static void observe(struct observer *observer, enum bus_object kind, uint64_t id, enum observed what)
{
	struct bus_news *news = container_of(observer, struct bus_news, observer);

	if (what == OBSERVED_ADDED)
		add_item(news, (struct item){ .what = NEWS_ADDED, .kind = kind, .id = id });
	else if (what == OBSERVED_CHANGED)
		note_change(news, kind, id);
	else if (what == OBSERVED_REMOVED)
		note_removed(news, kind, id);
}

static void on_client(struct observer *observer, struct client *client, enum observed what)
{
	observe(observer, BUS_CLIENT, client->id, what);
}

static void on_file(struct observer *observer, struct file *file, enum observed what)
{
	observe(observer, BUS_FILE, file->id, what);
}

static void on_revocation(struct observer *observer, struct revocation *rev, enum observed what)
{
	struct bus_news *news = container_of(observer, struct bus_news, observer);

	if (what == OBSERVED_STARTED)
		add_item(news, (struct item){ .what = NEWS_STARTED, .id = rev->id });
	else if (what == OBSERVED_ENDED)
		add_item(news, (struct item){ .what = NEWS_ENDED, .id = rev->id, .outcome = rev->state });
	else
		observe(observer, BUS_REVOCATION, rev->id, what);
}

static int add_timer(struct bus_news *news, sd_event_source **ret, sd_event_time_handler_t callback)
{
	int r = sd_event_add_time(news->broker->event, ret, CLOCK_MONOTONIC, 0, USEC_PER_MSEC, callback,
				  news);

	return r < 0 ? r : sd_event_source_set_enabled(*ret, SD_EVENT_OFF);
}

int bus_news_new(struct broker *broker, struct bus_news **ret)
{
	struct bus_news *news;
	int r;

	news = calloc(1, sizeof(*news));
	if (!news)
		return -ENOMEM;
	news->broker = broker;
	RB_INIT(&news->views);
	TAILQ_INIT(&news->changed);
	news->observer = (struct observer){
		.client = on_client,
		.file = on_file,
		.revocation = on_revocation,
	};
	observer_add(&broker->observers, &news->observer);
	r = add_timer(news, &news->items_timer, on_items);
	if (r >= 0)
		r = add_timer(news, &news->changes_timer, on_changes);
	if (r < 0) {
		bus_news_free(news);
		return r;
	}
	*ret = news;
	return 0;
}

struct bus_news *bus_news_free(struct bus_news *news)
{
	struct bus_view *view;

	if (!news)
		return NULL;
	observer_remove(&news->broker->observers, &news->observer);
	while ((view = RB_ROOT(&news->views))) {
		views_RB_REMOVE(&news->views, view);
		free(view);
	}
	sd_event_source_disable_unref(news->items_timer);
	sd_event_source_disable_unref(news->changes_timer);
	free(news);
	return NULL;
}

void bus_news_begin(struct bus_news *news, sd_bus *bus)
{
	news->bus = bus;
	news->connection++;
}

void bus_news_end(struct bus_news *news)
{
	struct slice slice = slice_begin();

	while (news->n_items > 0)
		send_items(news, &slice);
	while (!TAILQ_EMPTY(&news->changed))
		forget_change(news, TAILQ_FIRST(&news->changed));
	news->bus = NULL;
}
