/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

#include "protocol/tree.h"

struct notifier;

/*
 * A descriptor of ours of which the manager has a copy. Of two that are alike it keeps one, under the name
 * that it was told first: those that refer to one description share it.
 */
struct store_copy {
	struct kept *kept; /* kept::copies; NULL: the manager has none */
	int fd;            /* not owned: open as long as this is kept */
	LIST_ENTRY(store_copy) of_kept;
};

RB_HEAD(kept_tree, kept);

/*
 * What is to outlive the process, in the service manager's file descriptor store: the descriptions of data
 * files, with the leases on them, and contexts. What they are stands in the state (state.h).
 */
struct store {
	struct notifier *notifier; /* NULL: nothing is kept */
	struct kept_tree kept;     /* by description */
	size_t n_descriptors, n_bytes; /* of names */
	bool full;                     /* it has been said */
	bool refused;                  /* something has found no room since it was last looked for that */
	uint64_t dropped_usec;         /* when something was last dropped */
};

/* The first letter of a descriptor's name; the object's identifier follows. */
#define STORE_FILE    'f'
#define STORE_CONTEXT 'c'

static inline bool store_has(const struct store_copy *copy)
{
	return copy->kept;
}

/* Has a copy kept, by this name if the manager has none of the description yet. Where that fails it is logged. */
void store_keep(struct store *store, struct store_copy *copy, char kind, uint64_t id, int fd);
/* One that was passed by the manager, by this name, is in the store. */
void store_kept(struct store *store, struct store_copy *copy, char kind, uint64_t id, int fd);
/* There is room now for what has found none, and may try again. */
bool store_has_room_again(struct store *store);
/* The identifier in the name. */
uint64_t store_name(const struct store_copy *copy);
/* Is not of use any more. With the last of a description the manager closes its own, a moment later. */
void store_drop(struct store *store, struct store_copy *copy);
/* Was something dropped so recently that the manager may still have it? */
bool store_is_busy(const struct store *store);
/* Something of a name that means nothing to us. */
void store_drop_name(struct store *store, const char *name);
/* Returns a descriptor that hangs up when the manager has done all that it was told so far; -1: there is
 * none to wait for. */
int store_barrier(struct store *store);

/* Reads a name; false if it is none of ours. */
bool store_parse_name(const char *name, char *ret_kind, uint64_t *ret_id);
