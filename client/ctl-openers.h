/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-mount.h"
#include "ctl.h"

#include <sys/stat.h>

/*
 * Which processes have a file, or something of a mount, open or mapped: what /proc tells of those
 * that the caller may look into. Nobody's file system is asked.
 */

enum opener_use {
	OPENER_READS = 1 << 0,
	OPENER_WRITES = 1 << 1,
	OPENER_NAMES = 1 << 2, /* an O_PATH descriptor: in the way of an umount, not of a lease */
	OPENER_MAPS = 1 << 3,
	OPENER_MAPS_WRITABLE = 1 << 4, /* shared, and writable */
	OPENER_RUNS = 1 << 5,          /* its program, root or working directory is there */
};

struct opener {
	pid_t pid;
	uid_t uid;
	char comm[32];
	unsigned uses;
};

struct openers {
	struct opener *list; /* owned */
	size_t n;
	size_t n_hidden; /* processes that could not be looked into */
};

/* name: the last component of its path */
void openers_of_file(const struct mount *mount, dev_t device, ino_t inode, const char *name,
	struct openers *ret);
/* directory: the mount point, absolute, without a slash at its end */
void openers_of_mount(const struct mount *mount, const char *directory, struct openers *ret);
void openers_clear(struct openers *openers);

json_object *openers_to_json(const struct openers *openers);
/* As lines of "  comm (pid 17, uid 0) reads, maps". */
void openers_print(const struct openers *openers, FILE *f);
