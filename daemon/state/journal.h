/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/*
 * What there is, as a file of lines (state-record.h) beside the socket, which the next run begins with:
 * clients, files, who uses which, contexts, pins. A change is a line that says how the object is now, or that
 * it is gone; a file with too many of them is written anew, some each turn of the loop.
 *
 *     pinbroker-state 1
 *     ids reserved=…
 *     client id=… pid=… start=… uid=… token=… …
 *     file id=… device=… inode=… lease=… path=… …
 *     use client=… file=… access=… …          unuse client=… file=…
 *     context id=… client=… kind=… …
 *     pin id=… context=… file=… offset=… length=… state=… …
 *     gone id=…
 *
 * A reader passes over kinds and keys that he does not know; whoever changes what one means changes the
 * version in the first line.
 */
#define STATE_HEADER "pinbroker-state 1"

struct broker;
struct state;

/* Writes everything down, in place of what was there, and from then on each change. -errno: there is none. */
int state_new(struct broker *broker, const char *path, struct state **ret);
/* remove: nothing of it is of use to the next run. */
struct state *state_free(struct state *state, bool remove);
