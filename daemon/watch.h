/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

/* inotify on files that are pinned, or whose lease cannot be held: what is done to them, and who closes them.
 * The limits of inotify are the user's, so others can have used them up: it goes on without, and
 * keeps trying. */

struct broker;
struct file;
struct watch;

int watch_new(struct broker *broker, struct watch **ret);
struct watch *watch_free(struct watch *watch);

/* Calls file_touched() on what happens to the file from now on. Best effort: a timer backs it up. */
void watch_add(struct watch *watch, struct file *file, uint32_t mask);
void watch_remove(struct watch *watch, struct file *file);
/* Could any not be watched, since this was last asked? */
bool watch_was_incomplete(struct watch *watch);
