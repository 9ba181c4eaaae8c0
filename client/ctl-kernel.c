/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-kernel.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/loop.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

static void add_holder(struct kernel_use *use, const char *name)
{
	size_t n = strlen(use->holders);

	snprintf(use->holders + n, sizeof(use->holders) - n, "%s%s", n > 0 ? ", " : "", name);
}

static bool is_loop_of(const char *name, const struct statx *stx)
{
	_cleanup_(close_fdp) int fd = -1;
	struct loop_info64 info;
	char path[280];

	snprintf(path, sizeof(path), "/dev/%s", name);
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	return fd >= 0 && ioctl(fd, LOOP_GET_STATUS64, &info) == 0 &&
	       info.lo_device == makedev(stx->stx_dev_major, stx->stx_dev_minor) &&
	       info.lo_inode == stx->stx_ino;
}

/* Only those that have a file are opened. */
static void find_loops(const struct statx *stx, struct kernel_use *use)
{
	DIR *d = opendir("/sys/block");
	struct dirent *entry;

	while (d && (entry = readdir(d))) {
		char path[300];

		snprintf(path, sizeof(path), "/sys/block/%s/loop", entry->d_name);
		if (access(path, F_OK) == 0 && is_loop_of(entry->d_name, stx))
			add_holder(use, entry->d_name);
	}
	if (d)
		closedir(d);
}

/* "/swap\040file file 1048572 0 -2" */
static void find_swap(const struct statx *stx, struct kernel_use *use)
{
	_cleanup_(close_filep) FILE *f = fopen("/proc/swaps", "re");
	_cleanup_(freep) char *line = NULL;
	size_t size = 0;

	while (f && getline(&line, &size, f) > 0) {
		char *end = strchr(line, ' ');
		struct statx found;

		if (line[0] != '/' || !end)
			continue;
		*end = 0;
		unescape_word(line);
		if (statx(AT_FDCWD, line, AT_STATX_DONT_SYNC, STATX_INO, &found) == 0 &&
			found.stx_ino == stx->stx_ino &&
			found.stx_dev_major == stx->stx_dev_major &&
			found.stx_dev_minor == stx->stx_dev_minor)
			add_holder(use, "swap");
	}
}

/* "17: LEASE  ACTIVE    WRITE 17350 00:81:2 0 EOF" */
static bool is_leased(const struct statx *stx, const struct mount *mount)
{
	_cleanup_(close_filep) FILE *f = fopen("/proc/locks", "re");
	_cleanup_(freep) char *line = NULL;
	size_t size = 0;

	if (!f)
		return true;
	while (getline(&line, &size, f) > 0) {
		unsigned major_number, minor_number;
		uint64_t inode;

		if (sscanf(line, "%*d: LEASE %*s %*s %*d %x:%x:%" SCNu64, &major_number,
			    &minor_number, &inode) == 3 &&
			makedev(major_number, minor_number) == mount->file_system &&
			inode == stx->stx_ino)
			return true;
	}
	return false;
}

static int try_lease(int fd, int type)
{
	if (fcntl(fd, F_SETLEASE, type) < 0)
		return errno == EAGAIN ? 0 : -errno;
	(void)fcntl(fd, F_SETLEASE, F_UNLCK);
	return 1;
}

/* For an instant: whoever opens the file then waits for that long. */
static void try_leases(const char *path, struct kernel_use *use)
{
	_cleanup_(close_fdp) int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);

	if (fd < 0)
		return;
	(void)signal(SIGIO, SIG_IGN); /* which would tell of such an open, and end us */
	use->granted[PINBROKER_READ] = try_lease(fd, F_RDLCK);
	use->granted[PINBROKER_WRITE] = try_lease(fd, F_WRLCK);
}

void kernel_use_find(const char *path, const struct statx *stx, const struct mount *mount,
	bool leased, struct kernel_use *ret)
{
	*ret = (struct kernel_use){.granted = {-ENODATA, -ENODATA}};
	if (!S_ISREG(stx->stx_mode))
		return;
	find_loops(stx, ret);
	find_swap(stx, ret);
	if (!leased && !is_leased(stx, mount))
		try_leases(path, ret);
}
