/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Holds a file through a VFIO container: GROUP FILE. */

#include "holder.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define SIZE  1048576
#define IOVA  0x10000000
#define OTHER 0x20000000 /* where nothing is */

static pinbroker_file *file;
static pinbroker_context *context;
static int container, group;
static void *map;
static uint64_t pins[2];

static void fail(const char *what)
{
	perror(what);
	exit(EXIT_FAILURE);
}

static void container_open(const char *path)
{
	container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
	group = open(path, O_RDWR | O_CLOEXEC);
	if (container < 0 || group < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
		ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
		fail(path);
}

static int do_map(void)
{
	struct vfio_iommu_type1_dma_map m = {
		.argsz = sizeof(m),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)map,
		.iova = IOVA,
		.size = SIZE,
	};

	return ioctl(container, VFIO_IOMMU_MAP_DMA, &m) < 0 ? -errno : 0;
}

static int do_unmap(void)
{
	struct vfio_iommu_type1_dma_unmap u = {
		.argsz = sizeof(u),
		.iova = IOVA,
		.size = SIZE,
	};

	if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &u) < 0)
		return -errno;
	return u.size == SIZE ? 0 : -ENOENT;
}

static int pin(const struct pinbroker_range *ranges, size_t n)
{
	int r = pinbroker_pin(pb, file, context, ranges, n, PINBROKER_WRITE, NULL, pins);

	return r < 0 ? r : do_map();
}

/* One pin, and its mapping. */
static int do_hold(void)
{
	int r = pin((struct pinbroker_range[]){{0, SIZE}}, 1);

	return r < 0 ? r : pinbroker_bind(pb, pins[0], IOVA);
}

/* … in the place of which it names another. */
static int do_lie(void)
{
	int r = pin((struct pinbroker_range[]){{0, SIZE}}, 1);

	return r < 0 ? r : pinbroker_bind(pb, pins[0], OTHER);
}

/* Two pins, and one mapping of both. */
static int do_hold_two(void)
{
	int r = pin((struct pinbroker_range[]){{0, SIZE / 2}, {SIZE / 2, SIZE / 2}}, 2);

	r = r < 0 ? r : pinbroker_bind(pb, pins[0], IOVA);
	return r < 0 ? r : pinbroker_bind(pb, pins[1], IOVA + SIZE / 2);
}

static int do_unpin(void)
{
	return pinbroker_unpin(pb, pins, 1, NULL, NULL);
}

/* By force, as Unpin tells. */
static int do_ended(void)
{
	size_t n = 0;
	int r = pinbroker_unpin(pb, pins, 1, NULL, &n);

	return r < 0 ? r : n == 1 ? 0 : -EINVAL;
}

static int keep(int fd, uid_t uid)
{
	if (fork() == 0) {
		if (setresuid(uid, uid, uid) < 0)
			_exit(EXIT_FAILURE);
		/* not what the test reads */
		if (dup2(open("/dev/null", O_RDWR), STDOUT_FILENO) < 0)
			_exit(EXIT_FAILURE);
		munmap(map, SIZE);
		close(pinbroker_file_get_fd(file));
		if (fd >= 0)
			close(fd);
		pause();
	}
	return 0;
}

static int do_keep_both(void)
{
	return keep(-1, 0);
}

static int do_keep_both_as_another(void)
{
	return keep(-1, 65534);
}

static int do_keep_container(void)
{
	return keep(group, 0);
}

static int do_keep_group(void)
{
	return keep(container, 0);
}

static int do_remove(void)
{
	return pinbroker_remove_context(context);
}

int main(int argc, char *argv[])
{
	static const struct command commands[] = {
		{"hold", do_hold},
		{"hold-two", do_hold_two},
		{"lie", do_lie},
		{"map", do_map},
		{"unmap", do_unmap},
		{"unpin", do_unpin},
		{"ended", do_ended},
		{"keep-both", do_keep_both},
		{"keep-both-as-another", do_keep_both_as_another},
		{"keep-container", do_keep_container},
		{"keep-group", do_keep_group},
		{"remove", do_remove},
		{NULL, NULL},
	};

	container_open(argv[1]);
	holder_connect();
	check(pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file));
	check(pinbroker_add_context(pb, container, NULL, &context));
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	if (map == MAP_FAILED)
		fail(argv[2]);
	holder_run(commands);
	return 0;
}
