/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/mount.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "daemon/kernel/process.h"
#include "protocol/macro.h"

/* Not in linux/magic.h */
#define ZFS_MAGIC      0x2fc12fc1
#define BCACHEFS_MAGIC 0xca451a4e

/* "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"; no field has a
 * blank in it. */
static int read_line(const char *line, uint64_t id, char *ret, size_t size, dev_t *ret_device)
{
	unsigned major_number, minor_number;
	const char *type;
	uint64_t n;

	if (sscanf(line, "%" SCNu64 " %*u %u:%u", &n, &major_number, &minor_number) != 3 || n != id)
		return -ENOENT;
	type = strstr(line, " - ");
	if (!type)
		return -ENOENT;
	type += strlen(" - ");
	snprintf(ret, size, "%.*s", (int)strcspn(type, " \n"), type);
	*ret_device = makedev(major_number, minor_number);
	return 0;
}

/* Line by line: whoever may make mounts can have very many of them. */
int mount_find(
	const struct process *process, uint64_t id, char *ret, size_t size, dev_t *ret_device)
{
	char path[64], *line = NULL;
	int r = -ENOENT;
	size_t n = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/mountinfo", process->pid);
	f = fopen(path, "re");
	while (f && r < 0 && getline(&line, &n, f) > 0)
		r = read_line(line, id, ret, size, ret_device);
	if (f)
		fclose(f);
	free(line);
	/* the number may have become another process's */
	return process_is_alive(process) ? r : -ESRCH;
}

int mount_find_of_file(int fd, char *const *names, char *ret, size_t size)
{
	static const struct {
		const char *name;
		__typeof__(((struct statfs *)0)->f_type) magic;
	} types[] = {
		{"ext4", EXT4_SUPER_MAGIC},
		{"ext3", EXT3_SUPER_MAGIC},
		{"ext2", EXT2_SUPER_MAGIC},
		{"xfs", XFS_SUPER_MAGIC},
		{"btrfs", BTRFS_SUPER_MAGIC},
		{"tmpfs", TMPFS_MAGIC},
		{"hugetlbfs", HUGETLBFS_MAGIC},
		{"ramfs", RAMFS_MAGIC},
		{"f2fs", F2FS_SUPER_MAGIC},
		{"bcachefs", BCACHEFS_MAGIC},
		{"zfs", ZFS_MAGIC},
		{"overlay", OVERLAYFS_SUPER_MAGIC},
		{"fuse", FUSE_SUPER_MAGIC},
		{"nfs", NFS_SUPER_MAGIC},
	};
	struct statfs st;
	int r = -ENOENT;

	if (fstatfs(fd, &st) < 0)
		return -errno;
	for (size_t i = 0; i < ELEMENTS(types); i++) {
		if (types[i].magic != st.f_type)
			continue;
		if (r < 0)
			snprintf(ret, size, "%s", types[i].name);
		r = 0;
		for (char *const *name = names; *name; name++)
			if (strcmp(*name, types[i].name) == 0) {
				snprintf(ret, size, "%s", types[i].name);
				return 0;
			}
	}
	return r;
}
