/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "protocol/tree.h"

/* inotify on files that are pinned, or whose lease cannot be held: what is done to them, and who closes them.
 * The limits of inotify are the user's, so others can have used them up: it goes on without, and
 * keeps trying. */

struct watch;

/* watched::number */
#define WATCHED_NOT    (-1)
#define WATCHED_FAILED (-2) /* which has been said, and is tried again */

/* A file that can be watched has this in it, with the number WATCHED_NOT at first. */
struct watched {
	int number;    /* inotify's watch descriptor, or WATCHED_… */
	uint32_t mask; /* what for */
	RB_ENTRY(watched) of_watch;
};

struct watch_ops {
	/* Something has happened to the file. Best effort: a timer backs it up. */
	void (*touched)(struct watched *watched, uint32_t mask);
	/* What has happened to any file may have been missed. */
	void (*missed)(void *userdata);
	/* A file cannot be watched, the first since watch_was_incomplete() was last asked. */
	void (*incomplete)(void *userdata);
};

int watch_new(sd_event *event, const struct watch_ops *ops, void *userdata, struct watch **ret);
struct watch *watch_free(struct watch *watch);

/* Watches the file of this descriptor from now on; path is for people. */
void watch_add(struct watch *watch, struct watched *watched, int fd, const char *path, uint32_t mask);
void watch_remove(struct watch *watch, struct watched *watched);
/* Could any not be watched, since this was last asked? */
bool watch_was_incomplete(struct watch *watch);
