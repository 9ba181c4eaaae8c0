/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-ring.h"
#include "ctl-try.h"

#include <linux/if_xdp.h>
#include <sys/socket.h>

static int try_io_uring(void *map, size_t size)
{
	_cleanup_(close_fdp) int ring_fd = ring_open();

	if (ring_fd < 0)
		return ring_fd;
	return ring_register(ring_fd, &(struct iovec){map, size}, 1);
}

static int try_af_xdp(void *map, size_t size)
{
	_cleanup_(close_fdp) int fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	struct xdp_umem_reg umem = {
		.addr = (uintptr_t)map,
		.len = size,
		.chunk_size = (uint32_t)sysconf(_SC_PAGESIZE),
	};

	if (fd < 0)
		return -errno;
	return setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)) < 0 ? -errno : 0;
}

int try_pin(enum mechanism mechanism, void *map, size_t size, enum pinbroker_access access)
{
	switch (mechanism) {
	case MECHANISM_IO_URING:
		return try_io_uring(map, size);
	case MECHANISM_AF_XDP:
		return try_af_xdp(map, size);
	case MECHANISM_RDMA:
	case MECHANISM_RDMA_ODP:
		return try_rdma(map, size, access, mechanism == MECHANISM_RDMA_ODP);
	default:
		return -ENOTTY;
	}
}
