/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <pthread.h>
#include <sys/queue.h>

#include "pinbroker-verbs.h"
#include "protocol/tree.h"

/* A device context that one pinbroker handle uses. */
struct device {
	pinbroker *pb; /* kept by context */
	struct ibv_context *verbs;
	unsigned n_users;           /* regions, and calls under way */
	pthread_mutex_t adding;     /* guards the making of … */
	pinbroker_context *context; /* … this; owned, NULL: not handed over yet */
	/* Held for reading while a region gets a handle, for writing while one may lose it: what
	 * has been found out about a handle must remain true until it is destroyed. */
	pthread_rwlock_t handles;
	LIST_ENTRY(device) link; /* in the table */
};

/* One region, in the table from its pin to its deregistration. */
struct region {
	struct device *device; /* one of its n_users */
	uint64_t pin;
	struct ibv_mr *mr; /* libibverbs's; NULL: it is being registered or deregistered */
	bool revoked;      /* somebody was told that it is to go */
	RB_ENTRY(region) by_pin;
	RB_ENTRY(region) by_mr; /* while there is mr */
};

/* verbs-table.c: what this process has registered. Thread-safe. */

/* The device's entry, made if need be. NULL: no memory. device_put() follows. */
struct device *device_get(pinbroker *pb, struct ibv_context *verbs);
void device_put(struct device *device);
/* Takes the entry out, for good or until device_restore(): 0 with *ret NULL if there is none,
 * -EBUSY if it is in use, or there is another handle's. */
int device_take(pinbroker *pb, struct ibv_context *verbs, struct device **ret);
void device_restore(struct device *device);
void device_free(struct device *device); /* one that was taken */

/* Makes a pin and its region, in one: whoever is told of the pin finds the region. */
int region_new(struct device *device, const pinbroker_file *file,
	const struct pinbroker_range *range, int access, struct region **ret);
/* Whether the region may be used now; false: it has to go. */
bool region_publish(struct region *region, struct ibv_mr *mr);
/* The device of a published region, to be put. NULL: it is not one of this handle's. */
struct device *region_find_device(pinbroker *pb, struct ibv_mr *mr);
/* Takes the region from everybody else, before libibverbs can give mr to another one. */
struct region *region_hide(pinbroker *pb, struct ibv_mr *mr);
void region_show(struct region *region, struct ibv_mr *mr); /* undoes it */
void region_free(struct region *region);                    /* one that is not published */
struct ibv_mr *region_find_mr(pinbroker *pb, uint64_t pin);

/* verbs-handle.c: whether the kernel knows the region by its handle: 1, or 0 if that is nobody's or
 * somebody else's. */
int handle_is_of(const struct ibv_mr *mr);
