/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/inotify.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

RB_HEAD(all_watched, watched);

static int compare_number(const struct watched *a, const struct watched *b)
{
	return a->number < b->number ? -1 : a->number > b->number;
}

TREE_GENERATE(all_watched, watched, of_watch, compare_number)

#define RETRY_USEC USEC_PER_SEC

struct watch {
	sd_event *event; /* reference */
	const struct watch_ops *ops;
	void *userdata;
	int fd;              /* -1: no instance of inotify was to be had */
	uint64_t retry_usec; /* not before this */
	bool failed;         /* which has been said */
	bool incomplete;     /* a file could not be watched, since that was last asked */
	struct all_watched files;
	sd_event_source *source;
	sd_event_source *pause; /* its end */
	uint64_t paid_usec;     /* until then its turns so far would have taken */
};

/* A burst of so many turns is followed at once, after that one in so much time: whoever writes on and on keeps
 * the loop from nothing. */
#define BURST_TURNS 64
#define TURN_USEC   (2 * USEC_PER_MSEC)

static int on_pause_end(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct watch *watch = userdata;

	return watch->source ? sd_event_source_set_enabled(watch->source, SD_EVENT_ON) : 0;
}

static void count_turn(struct watch *watch)
{
	uint64_t now = now_usec(), paid = watch->paid_usec;

	/* How far ahead of its time it is: by a burst at most. */
	watch->paid_usec = (paid > now ? paid : now) + TURN_USEC;
	if (watch->paid_usec - now < BURST_TURNS * TURN_USEC)
		return;
	if (sd_event_source_set_time(watch->pause, now + TURN_USEC) >= 0 &&
	    sd_event_source_set_enabled(watch->pause, SD_EVENT_ONESHOT) >= 0)
		(void)sd_event_source_set_enabled(watch->source, SD_EVENT_OFF);
}

static int on_event(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct watch *watch = userdata;
	_Alignas(struct inotify_event) char buffer[1024]; /* for some 64 files */
	ssize_t n;

	n = read(fd, buffer, sizeof(buffer));
	if (n < 0)
		return 0;
	count_turn(watch);
	for (char *p = buffer; p < buffer + n;) {
		struct inotify_event *event = (struct inotify_event *)p;
		struct watched *watched;

		p += sizeof(*event) + event->len;
		if (event->mask & IN_Q_OVERFLOW) {
			watch->ops->missed(watch->userdata);
			continue;
		}
		watched = all_watched_RB_FIND(&watch->files, &(struct watched){ .number = event->wd });
		if (watched)
			watch->ops->touched(watched, event->mask);
	}
	return 0;
}

static void watch_close(struct watch *watch)
{
	watch->source = sd_event_source_disable_unref(watch->source);
	watch->fd = safe_close(watch->fd);
}

/* Once, until there is one again. */
static void tell_no_instance(struct watch *watch, int error)
{
	if (!watch->failed)
		log_errno_limit(LOG_WARNING, error, LOG_RESOURCE_INOTIFY,
			"Cannot watch files that are pinned, looking at each every second "
			"instead");
	watch->failed = true;
}

static int watch_open(struct watch *watch)
{
	int r;

	if (watch->fd >= 0)
		return 0;
	if (now_usec() < watch->retry_usec)
		return -EAGAIN;
	watch->retry_usec = now_usec() + RETRY_USEC;
	watch->fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
	r = watch->fd < 0 ? -errno
			  : sd_event_add_io(watch->event, &watch->source, watch->fd,
				    EPOLLIN, on_event, watch);
	/* Whoever asks is told of what is seen here. */
	if (r >= 0)
		r = sd_event_source_set_priority(watch->source, SD_EVENT_PRIORITY_IMPORTANT);
	if (r < 0) {
		watch_close(watch);
		tell_no_instance(watch, r);
		return r;
	}
	if (watch->failed)
		log_info("Files can be watched again.");
	watch->failed = false;
	return 0;
}

int watch_new(sd_event *event, const struct watch_ops *ops, void *userdata, struct watch **ret)
{
	struct watch *watch;
	int r;

	watch = calloc(1, sizeof(*watch));
	if (!watch)
		return -ENOMEM;
	watch->event = sd_event_ref(event);
	watch->ops = ops;
	watch->userdata = userdata;
	watch->fd = -1;
	r = sd_event_add_time(event, &watch->pause, CLOCK_MONOTONIC, 0, 1, on_pause_end,
			      watch);
	if (r >= 0)
		r = sd_event_source_set_enabled(watch->pause, SD_EVENT_OFF);
	if (r < 0) {
		watch_free(watch);
		return r;
	}
	(void)watch_open(watch);
	*ret = watch;
	return 0;
}

struct watch *watch_free(struct watch *watch)
{
	if (!watch)
		return NULL;
	watch_close(watch);
	sd_event_source_disable_unref(watch->pause);
	sd_event_unref(watch->event);
	free(watch);
	return NULL;
}

static void tell_incomplete(struct watch *watch)
{
	if (!watch->incomplete)
		watch->ops->incomplete(watch->userdata);
	watch->incomplete = true;
}

bool watch_was_incomplete(struct watch *watch)
{
	bool incomplete = watch->incomplete;

	watch->incomplete = false;
	return incomplete;
}

void watch_add(struct watch *watch, struct watched *watched, int fd, const char *path, uint32_t mask)
{
	char link[64];
	int r;

	if (watched->number >= 0 && watched->mask == mask)
		return;
	if (watch_open(watch) < 0) {
		tell_incomplete(watch);
		return;
	}
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	r = inotify_add_watch(watch->fd, link, mask);
	if (r >= 0) {
		watched->mask = mask;
		if (watched->number >= 0)
			return; /* the same one */
		watched->number = r;
		all_watched_RB_INSERT(&watch->files, watched);
		return;
	}
	tell_incomplete(watch);
	if (watched->number >= 0)
		return;
	if (watched->number != WATCHED_FAILED)
		log_errno_limit(LOG_WARNING, errno, LOG_RESOURCE_INOTIFY,
			"Cannot watch %s, looking at it every second instead", path);
	watched->number = WATCHED_FAILED;
}

void watch_remove(struct watch *watch, struct watched *watched)
{
	if (watched->number >= 0) {
		all_watched_RB_REMOVE(&watch->files, watched);
		(void)inotify_rm_watch(watch->fd, watched->number);
	}
	watched->number = WATCHED_NOT;
}
