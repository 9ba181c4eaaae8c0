/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-mount.h"
#include "ctl.h"

/* Which pins a revocation is to end: one of these. */
struct target {
	const char *path;   /* of a file, or of a mount, as it was given */
	uint64_t device, inode;        /* of the file, or of the mount's root */
	const struct mount *mount;     /* NULL: a file is meant */
	uint64_t *others;              /* owned; mounts of the same file system, which are not meant */
	size_t n_others;
	const char *device_name; /* as contexts and files have it */
	uint64_t client;
	uint64_t *pins; /* owned */
	size_t n_pins;
};

/* Its pins that are there, and their holders: an array of objects. NULL where it cannot be told,
 * with the message said. */
json_object *remaining_list(const struct ctl *ctl, const struct target *target);
/* On stderr, a line each. */
void remaining_say(json_object *array);
