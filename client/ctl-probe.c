/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-probe.h"
#include "ctl-region.h"
#include "ctl-ring.h"

#include <fcntl.h>
#include <libgen.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/vfs.h>

const char *backing_name(enum backing backing)
{
	static const char *const names[] = {
		[BACKING_PAGE_CACHE] = "page cache",
		[BACKING_SHMEM] = "tmpfs",
		[BACKING_HUGE_PAGES] = "hugetlbfs",
		[BACKING_FSDAX] = "fsdax",
		[BACKING_DEVICE_DAX] = "device-dax",
		[BACKING_OTHER] = "none",
	};

	return names[backing];
}

static bool is_device_dax(const struct statx *stx)
{
	char path[64], link[PATH_MAX];
	ssize_t n;

	snprintf(path, sizeof(path), "/sys/dev/char/%u:%u/subsystem", stx->stx_rdev_major,
		stx->stx_rdev_minor);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 4)
		return false;
	link[n] = 0;
	return strcmp(link + n - 4, "/dax") == 0;
}

static enum backing backing_of(const struct statx *stx, const struct mount *mount)
{
	if (S_ISCHR(stx->stx_mode) && is_device_dax(stx))
		return BACKING_DEVICE_DAX;
	if (!S_ISREG(stx->stx_mode))
		return BACKING_OTHER;
	if (stx->stx_attributes & STATX_ATTR_DAX)
		return BACKING_FSDAX;
	if (strcmp(mount->type, "tmpfs") == 0)
		return BACKING_SHMEM;
	if (strcmp(mount->type, "hugetlbfs") == 0)
		return BACKING_HUGE_PAGES;
	return BACKING_PAGE_CACHE;
}

/* A nameless file beside this one, of one page; -1 where the caller may not make one. */
static int make_sibling(const char *path)
{
	_cleanup_(freep) char *copy = must(strdup(path));
	_cleanup_(close_fdp) int fd = -1;
	struct statfs sfs;

	fd = open(dirname(copy), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0 || fstatfs(fd, &sfs) < 0 || ftruncate(fd, sfs.f_bsize) < 0)
		return -1;
	return TAKE_FD(fd);
}

/* 0, or the negative errno that the kernel answers a fixed buffer over such a file with; -ENOSYS:
 * it could not be tried. */
static int try_pin(const char *path)
{
	_cleanup_(close_fdp) int ring_fd = ring_open();
	_cleanup_(close_fdp) int fd = make_sibling(path);
	struct region region = {.range = {0, (uint64_t)sysconf(_SC_PAGESIZE)}};
	int r;

	if (ring_fd < 0 || fd < 0)
		return -ENOSYS;
	r = regions_register(&region, 1, ring_fd, fd, PINBROKER_WRITE);
	region_unmap(&region);
	return r == -EFAULT || r == -EOPNOTSUPP || r >= 0 ? r : -ENOSYS;
}

static bool kernel_is_at_least(unsigned major_wanted, unsigned minor_wanted)
{
	unsigned major_version = 0, minor_version = 0;
	struct utsname uts;

	if (uname(&uts) < 0 || sscanf(uts.release, "%u.%u", &major_version, &minor_version) != 2)
		return false;
	return major_version > major_wanted ||
	       (major_version == major_wanted && minor_version >= minor_wanted);
}

static struct verdict judge_page_cache(const char *path)
{
	int r = try_pin(path);

	if (r >= 0)
		return (struct verdict){true, "tried on a file beside it"};
	if (r != -ENOSYS)
		return (struct verdict){false,
			"the kernel refuses it where the file system must be told of every write "
			"(tried on a file beside it)"};
	if (kernel_is_at_least(6, 5))
		return (struct verdict){false,
			"the kernel, from Linux 6.5 on, refuses it where the file system must be "
			"told of every write"};
	return (struct verdict){true, "the kernel, up to Linux 6.4, lets it happen"};
}

void probe_file(
	const char *path, const struct statx *stx, const struct mount *mount, struct probe *ret)
{
	ret->backing = backing_of(stx, mount);
	switch (ret->backing) {
	case BACKING_FSDAX:
		ret->read.possible = ret->write.possible = false;
		ret->read.reason = ret->write.reason =
			"the kernel makes no long-term pins of fsdax pages: on-demand paging is "
			"the way";
		break;
	case BACKING_OTHER:
		ret->read.possible = ret->write.possible = false;
		ret->read.reason = ret->write.reason = "it is no data file";
		break;
	case BACKING_PAGE_CACHE:
		ret->read = (struct verdict){true, NULL};
		ret->write = judge_page_cache(path);
		break;
	default:
		ret->read = ret->write = (struct verdict){true, NULL};
	}
}
