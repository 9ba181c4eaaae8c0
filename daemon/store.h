/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct notifier;

/*
 * What is to outlive the process, in the service manager's file descriptor store: the descriptions of data
 * files, with the leases on them, and contexts. What they are stands in the state (state.h).
 */
struct store {
	struct notifier *notifier; /* NULL: nothing is kept */
	size_t n_descriptors, n_bytes; /* of names */
	bool full;                     /* it has been said */
	uint64_t dropped_usec;         /* when something was last dropped */
};

/* The first letter of a descriptor's name; the object's identifier follows. */
#define STORE_FILE    'f'
#define STORE_CONTEXT 'c'

/* Has a copy kept. False: it is not. */
bool store_keep(struct store *store, char kind, uint64_t id, int fd);
/* One that was passed by the manager is in the store. */
void store_kept(struct store *store, char kind, uint64_t id);
/* The copy is to be closed. The manager does so a moment later. */
void store_drop(struct store *store, char kind, uint64_t id);
/* Was something dropped so recently that the manager may still have it? */
bool store_is_busy(const struct store *store);
/* Something of a name that means nothing to us. */
void store_drop_name(struct store *store, const char *name);
/* Returns a descriptor that hangs up when the manager has done all that it was told so far; -1: there is
 * none to wait for. */
int store_barrier(struct store *store);

/* Reads a name; false if it is none of ours. */
bool store_parse_name(const char *name, char *ret_kind, uint64_t *ret_id);
