/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-mount.h"
#include "ctl.h"

#include <sys/stat.h>

/*
 * What kind of memory stands behind a file, and which long-term pins this kernel makes of it. The
 * file itself is not opened: that could break a lease. What has to be tried is tried on a nameless
 * file beside it.
 */

enum backing {
	BACKING_PAGE_CACHE,
	BACKING_SHMEM,
	BACKING_HUGE_PAGES,
	BACKING_FSDAX,
	BACKING_DEVICE_DAX,
	BACKING_OTHER, /* neither a regular file nor device-DAX */
};

struct verdict {
	bool possible;
	const char *reason; /* why (not); NULL: there is nothing to say */
};

struct probe {
	enum backing backing;
	/* A long-term pin of a shared mapping, through which the hardware reads, or writes. */
	struct verdict read, write;
};

const char *backing_name(enum backing backing);
void probe_file(
	const char *path, const struct statx *stx, const struct mount *mount, struct probe *ret);
