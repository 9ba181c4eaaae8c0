/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Pins the beginning of a file as a holder does, and says what became of it: "ok", or the error's
 * name. io_uring|af_xdp|DEVICE read|write FILE; DEVICE is one for RDMA. */

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <liburing.h>
#include <linux/if_xdp.h>
#include <linux/vfio.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "client/examples/rdma-pair.h"

#define SIZE (2UL << 20) /* a huge page, and what device-DAX aligns to */

static int pin_by_io_uring(void *map)
{
	struct io_uring ring;
	int r;

	r = io_uring_queue_init(1, &ring, 0);
	if (r < 0)
		fail("io_uring");
	return io_uring_register_buffers(&ring, &(struct iovec){map, SIZE}, 1);
}

static int pin_by_af_xdp(void *map)
{
	struct xdp_umem_reg umem = {.addr = (uintptr_t)map, .len = SIZE, .chunk_size = 4096};
	int s = socket(AF_XDP, SOCK_RAW, 0);

	if (s < 0)
		fail("AF_XDP");
	return setsockopt(s, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)) < 0 ? -errno : 0;
}

static int pin_by_rdma(void *map, bool writable, int flags)
{
	struct ibv_pd *pd = ibv_alloc_pd(device_open("rxe0"));

	if (!pd)
		fail("rxe0");
	flags |= writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE
			  : IBV_ACCESS_REMOTE_READ;
	return ibv_reg_mr(pd, map, SIZE, flags) ? 0 : -errno;
}

static int pin_by_vfio(void *map, bool writable)
{
	int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), group;
	struct vfio_iommu_type1_dma_map dma = {
		.argsz = sizeof(dma),
		.flags = VFIO_DMA_MAP_FLAG_READ | (writable ? VFIO_DMA_MAP_FLAG_WRITE : 0),
		.vaddr = (uintptr_t)map,
		.size = SIZE,
	};
	glob_t groups;

	if (glob("/dev/vfio/[0-9]*", 0, NULL, &groups) != 0)
		fail("vfio");
	group = open(groups.gl_pathv[0], O_RDWR | O_CLOEXEC);
	if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
		ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
		fail("vfio");
	return ioctl(container, VFIO_IOMMU_MAP_DMA, &dma) < 0 ? -errno : 0;
}

static int pin(const char *mechanism, void *map, bool writable)
{
	if (strcmp(mechanism, "io_uring") == 0)
		return pin_by_io_uring(map);
	if (strcmp(mechanism, "af_xdp") == 0)
		return pin_by_af_xdp(map);
	if (strcmp(mechanism, "rdma") == 0)
		return pin_by_rdma(map, writable, 0);
	if (strcmp(mechanism, "rdma-odp") == 0)
		return pin_by_rdma(map, writable, IBV_ACCESS_ON_DEMAND);
	return pin_by_vfio(map, writable);
}

int main(int argc, char *argv[])
{
	bool writable = argc == 4 && strcmp(argv[2], "write") == 0;
	void *map;
	int fd, r;

	if (argc != 4)
		return EXIT_FAILURE;
	fd = open(argv[3], (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (fd < 0)
		fail(argv[3]);
	map = mmap(NULL, SIZE, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	r = pin(argv[1], map, writable);
	puts(r < 0 ? strerrorname_np(-r) : "ok");
	return EXIT_SUCCESS;
}
