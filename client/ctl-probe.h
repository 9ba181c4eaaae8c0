/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-mount.h"
#include "ctl.h"

#include <sys/stat.h>

/*
 * What kind of memory stands behind a file, and who can pin its pages on this kernel. The file
 * itself is not opened: that could break a lease. Pins are tried on a nameless file of the same
 * kind, beside it if possible; of device-DAX, which has no leases, on itself. What cannot be tried
 * follows from what can, or is not known.
 */

enum backing {
	BACKING_PAGE_CACHE,
	BACKING_SHMEM,
	BACKING_HUGE_PAGES,
	BACKING_FSDAX,
	BACKING_DEVICE_DAX,
	BACKING_OTHER, /* neither a regular file nor device-DAX */
};

/* What pins pages. */
enum mechanism {
	MECHANISM_IO_URING,
	MECHANISM_AF_XDP,
	MECHANISM_RDMA,
	MECHANISM_RDMA_ODP, /* on-demand paging, which pins nothing */
	MECHANISM_VFIO,
	MECHANISMS,
};

struct verdict {
	enum { VERDICT_UNKNOWN, VERDICT_NO, VERDICT_YES } possible;
	bool tried;
	int error;          /* negative errno that the kernel refuses it with, or 0 */
	const char *reason; /* NULL: there is nothing to say */
};

struct probe {
	enum backing backing;
	/* Through a shared mapping as who has the file open for reading, or for writing, makes it.
	 */
	struct verdict verdicts[MECHANISMS][PINBROKER_WRITE + 1];
};

const char *backing_name(enum backing backing);
void probe_file(
	const char *path, const struct statx *stx, const struct mount *mount, struct probe *ret);
