/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-mount.h"
#include "ctl.h"

#include <sys/stat.h>

/*
 * What has a file open and is no process: loop devices, swap, descriptors on their way in a socket or
 * in an io_uring's table. Of the last ones nothing tells but that the kernel grants no lease.
 */

struct kernel_use {
	char holders[256]; /* "loop0, swap"; empty: none was found */
	/* Whether a lease is granted at the moment, by access: > 0 yes, 0 no, < 0 it could not be tried. */
	int granted[PINBROKER_WRITE + 1];
};

/* leased: it is known to be under a lease, which an open could break. */
void kernel_use_find(const char *path, const struct statx *stx, const struct mount *mount,
	bool leased, struct kernel_use *ret);
