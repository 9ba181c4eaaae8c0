/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "watch.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "broker.h"
#include "log.h"
#include "macro.h"

RB_HEAD(watched, file);

static int compare_watch(const struct file *a, const struct file *b)
{
	return a->watch < b->watch ? -1 : a->watch > b->watch;
}

TREE_GENERATE(watched, file, by_watch, compare_watch)

#define RETRY_USEC USEC_PER_SEC

struct watch {
	struct broker *broker;
	int fd;              /* -1: no instance of inotify was to be had */
	uint64_t retry_usec; /* not before this */
	bool failed;         /* which has been said */
	struct watched files;
	sd_event_source *source;
};

static int on_event(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct watch *watch = userdata;
	_Alignas(struct inotify_event) char buffer[4096];
	ssize_t n;

	n = read(fd, buffer, sizeof(buffer));
	if (n < 0)
		return 0;
	for (char *p = buffer; p < buffer + n;) {
		struct inotify_event *event = (struct inotify_event *)p;
		struct file *file, *next;

		p += sizeof(*event) + event->len;
		if (event->mask & IN_Q_OVERFLOW) {
			for (file = RB_MIN(watched, &watch->files); file; file = next) {
				next = RB_NEXT(watched, &watch->files, file);
				file_touched(file);
			}
			continue;
		}
		file = watched_RB_FIND(&watch->files, &(struct file){ .watch = event->wd });
		if (file)
			file_touched(file);
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
			"Cannot watch files that have no lease, looking at each every second "
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
			  : sd_event_add_io(watch->broker->event, &watch->source, watch->fd,
				    EPOLLIN, on_event, watch);
	if (r < 0) {
		watch_close(watch);
		tell_no_instance(watch, r);
		return r;
	}
	if (watch->failed)
		log_info("Files that have no lease can be watched again.");
	watch->failed = false;
	return 0;
}

int watch_new(struct broker *broker, struct watch **ret)
{
	struct watch *watch;

	watch = calloc(1, sizeof(*watch));
	if (!watch)
		return -ENOMEM;
	watch->broker = broker;
	watch->fd = -1;
	(void)watch_open(watch);
	*ret = watch;
	return 0;
}

struct watch *watch_free(struct watch *watch)
{
	if (!watch)
		return NULL;
	watch_close(watch);
	free(watch);
	return NULL;
}

void watch_add(struct watch *watch, struct file *file)
{
	char path[64];
	int r;

	if (file->watch >= 0 || watch_open(watch) < 0)
		return;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file->lease.fd);
	r = inotify_add_watch(watch->fd, path, IN_CLOSE | IN_MODIFY | IN_ATTRIB);
	if (r >= 0) {
		file->watch = r;
		watched_RB_INSERT(&watch->files, file);
		return;
	}
	if (file->watch != FILE_WATCH_FAILED)
		log_errno_limit(LOG_WARNING, errno, LOG_RESOURCE_INOTIFY,
			"Cannot watch %s, looking at it every second instead", file->path);
	file->watch = FILE_WATCH_FAILED;
}

void watch_remove(struct watch *watch, struct file *file)
{
	if (file->watch >= 0) {
		watched_RB_REMOVE(&watch->files, file);
		(void)inotify_rm_watch(watch->fd, file->watch);
	}
	file->watch = FILE_NOT_WATCHED;
}
