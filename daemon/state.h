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
struct client;
struct context;
struct file;
struct pin;
struct state;
struct use;

/* Writes everything down, in place of what was there. -errno: there is none. */
int state_new(struct broker *broker, const char *path, struct state **ret);
/* remove: nothing of it is of use to the next run. */
struct state *state_free(struct state *state, bool remove);

/* How these are now. Nothing is recorded while broker::state is NULL. */
void state_client(const struct client *client);
void state_file(const struct file *file);
void state_use(const struct use *use);
void state_context(const struct context *context);
void state_pin(const struct pin *pin);
/* Up to where identifiers may have been given out, should the file of those be lost. */
void state_ids(struct broker *broker);
/* They are no more. */
void state_unuse(const struct use *use);
void state_gone(struct broker *broker, uint64_t id);

/* Before anybody is told of a change, it has to be in the file. */
void state_flush(struct broker *broker);
/* Somebody was awake at this time: says so by the file's time, and tries again what could not be written. */
void state_touch(struct broker *broker);
