/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol/interface.h"

/*
 * What the pages of a data file live on: on a kind of memory, and, where the file's own pages are those of
 * a device, on an NVDIMM namespace. It stays what it is for as long as the file is open.
 */

struct backing {
	enum backing_kind kind;
	char device[32]; /* "pmem0", "dax0.0", "sda1"; empty: none */
	char nvdimm_namespace[32], region[32]; /* empty: none */
	int numa_node;                         /* -1: none */
};

/* Both ask sysfs, and are for the offload pool. What cannot be found out is left empty. */

/* Of a regular file on a file system of this type and st_dev. */
void backing_find(dev_t device, const char *file_system, bool dax, struct backing *ret);

/* Of a character device. Returns 0 and its size, or -ENODEV if it is not a device-DAX. */
int backing_find_device(dev_t device, struct backing *ret, uint64_t *ret_size);

/* Can the file's pages be pinned for long? *ret_reason: why not, or what that depends on, else NULL. */
enum pinnable backing_pinnable(const struct backing *backing, enum access access,
			       const char **ret_reason);

/* Whose lease would protect nothing: a device-DAX cannot be truncated, its pages stay where they are. */
static inline bool backing_needs_lease(const struct backing *backing)
{
	return backing->kind != BACKING_DEVICE_DAX;
}

/* Is it, or does it lie on, what is called so? */
bool backing_is_on(const struct backing *backing, const char *name);

/* *ret points into *backing. */
void backing_info(const struct backing *backing, struct msg_backing *ret);
