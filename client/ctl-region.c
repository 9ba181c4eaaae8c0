/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-region.h"
#include "ctl-ring.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

void region_unmap(struct region *region)
{
	if (region->map)
		munmap(region->map, region->map_size);
	region->map = NULL;
}

/* 0: it is none that has an alignment */
static size_t device_alignment(int fd)
{
	_cleanup_(close_fdp) int attribute = -1;
	char text[64] = "";
	struct stat st;

	if (fstat(fd, &st) < 0 || !S_ISCHR(st.st_mode))
		return 0;
	snprintf(text, sizeof(text), "/sys/dev/char/%u:%u/align", major(st.st_rdev),
		minor(st.st_rdev));
	attribute = open(text, O_RDONLY | O_CLOEXEC);
	if (attribute < 0 || read(attribute, text, sizeof(text) - 1) <= 0)
		return 0;
	return strtoul(text, NULL, 10);
}

size_t map_unit(int fd)
{
	size_t alignment = device_alignment(fd);
	struct statfs sfs;

	if (alignment > 0)
		return alignment;
	if (fstatfs(fd, &sfs) == 0 && sfs.f_type == HUGETLBFS_MAGIC)
		return (size_t)sfs.f_bsize;
	return (size_t)sysconf(_SC_PAGESIZE);
}

static int region_map(
	struct region *region, int fd, enum pinbroker_access access, struct iovec *ret)
{
	int protection = access == PINBROKER_WRITE ? PROT_READ | PROT_WRITE : PROT_READ;
	size_t page = map_unit(fd), skip = (size_t)(region->range.offset % page);
	size_t size = (skip + (size_t)region->range.length + page - 1) / page * page;
	void *p;

	p = mmap(NULL, size, protection, MAP_SHARED, fd, (off_t)(region->range.offset - skip));
	if (p == MAP_FAILED)
		return -errno;
	region->map = p;
	region->map_size = size;
	ret->iov_base = (char *)p + skip;
	ret->iov_len = (size_t)region->range.length;
	return 0;
}

static int region_map_placeholder(struct region *region, struct iovec *ret)
{
	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	void *p;

	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return -errno;
	region->map = p;
	region->map_size = size;
	/* No more than is pinned. */
	*ret = (struct iovec){p, region->range.length < size ? (size_t)region->range.length : size};
	return 0;
}

static int regions_hand_over(
	struct region *regions, size_t n_regions, int ring_fd, const struct iovec *buffers, int r)
{
	if (r >= 0)
		r = ring_register(ring_fd, buffers, (unsigned)n_regions);
	if (r < 0)
		for (size_t i = 0; i < n_regions; i++)
			region_unmap(&regions[i]);
	return r;
}

int regions_register(struct region *regions, size_t n_regions, int ring_fd, int file_fd,
	enum pinbroker_access access)
{
	_cleanup_(freep) struct iovec *buffers = must(calloc(n_regions, sizeof(*buffers)));
	int r = 0;

	for (size_t i = 0; i < n_regions && r >= 0; i++)
		r = region_map(&regions[i], file_fd, access, &buffers[i]);
	return regions_hand_over(regions, n_regions, ring_fd, buffers, r);
}

int regions_register_placeholders(struct region *regions, size_t n_regions, int ring_fd)
{
	_cleanup_(freep) struct iovec *buffers = must(calloc(n_regions, sizeof(*buffers)));
	int r = 0;

	for (size_t i = 0; i < n_regions && r >= 0; i++)
		r = region_map_placeholder(&regions[i], &buffers[i]);
	return regions_hand_over(regions, n_regions, ring_fd, buffers, r);
}
