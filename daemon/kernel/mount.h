/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct process;

/* Both can wait (offload). */

/* The type of the file system of a mount, by its identifier, as the process sees it, and its device,
 * which is another than st_dev of a btrfs's subvolumes. -ENOENT: it sees no such mount: it is in a
 * chroot, or the mount is of another namespace, or of none any more. -ESRCH: the process is gone. */
int mount_find(
	const struct process *process, uint64_t id, char *ret, size_t size, dev_t *ret_device);

/* The same of an open file, whoever sees its mount; one of the names given if several would be
 * right. With a FUSE file it waits for its server. */
int mount_find_of_file(int fd, char *const *names, char *ret, size_t size);
