/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* The mount that something is on, without asking its file system. */
struct mount {
	uint64_t id;
	dev_t device;
	dev_t file_system; /* as mounts are listed: another than that of a btrfs's subvolumes */
	bool is_root; /* what was asked about is the mount point itself */
	char point[PATH_MAX];
	char type[64];
	char source[PATH_MAX];
};

/* "\040" for a space, as in /proc/self/mountinfo. */
void unescape_word(char *s);

/* fd: may be O_PATH. 0 or negative errno. */
int mount_of(int fd, struct mount *ret);
/* The other mounts of its file system that can be seen from here: their identifiers, which the caller frees. */
int mount_find_others(const struct mount *m, uint64_t **ret, size_t *ret_n);
