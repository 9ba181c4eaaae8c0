/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-ring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <sys/syscall.h>
#include <unistd.h>

static int ring_call(int ring_fd, unsigned operation, const void *argument, unsigned n)
{
	int r = (int)syscall(SYS_io_uring_register, ring_fd, operation, argument, n);

	return r < 0 ? -errno : r;
}

int ring_open(void)
{
	struct io_uring_params params = {};
	int fd = (int)syscall(SYS_io_uring_setup, 1, &params);

	return fd < 0 ? -errno : fd;
}

int ring_register(int ring_fd, const struct iovec *buffers, unsigned n_buffers)
{
	return ring_call(ring_fd, IORING_REGISTER_BUFFERS, buffers, n_buffers);
}

int ring_drop(int ring_fd, unsigned index)
{
	const struct iovec none = {};
	struct io_uring_rsrc_update2 update = {
		.offset = index,
		.data = (uint64_t)(uintptr_t)&none,
		.nr = 1,
	};
	int r = ring_call(ring_fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));

	return r < 0 ? r : 0;
}

int ring_unregister(int ring_fd)
{
	return ring_call(ring_fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
}
