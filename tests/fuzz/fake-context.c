/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>

#include "daemon/core/context.h"
#include "daemon/util/config.h"
#include "fake-kernel.h"
#include "protocol/macro.h"

/* ---- Contexts: a kind for each way in which pins end ---- */

static bool is_called(const char *link, const char *name)
{
	return strcmp(link, name) == 0;
}

static int read_handle(int fd, int64_t handle, struct handle_identity *ret)
{
	if (handle > 1000)
		return -ENOENT;
	for (size_t i = 0; i < kernel.n_destroyed; i++)
		if (kernel.destroyed[i].handle == handle)
			return -ENOENT;
	*ret = (struct handle_identity){(uint64_t)handle << 12, (uint64_t)(handle % 3) << 12, 0};
	return 0;
}

static int check(int fd, const struct process *holder, struct handle *handles, size_t n)
{
	for (size_t i = 0; i < n; i++)
		handles[i].gone = !kernel.handles_stay;
	return 0;
}

static int detach(int fd, const struct process *holder, struct handle *handles, size_t n)
{
	int r = 0;

	if (kernel.detach_fails)
		return -EBUSY;
	for (size_t i = 0; i < n; i++) {
		if (handles[i].keep)
			continue;
		/* the first one's memory is registered by another name */
		handles[i].gone = !kernel.detach_unproved || r < 0;
		r = kernel.detach_unproved ? -EBUSY : 0;
		handles[i].destroyed = true;
		if (kernel.n_destroyed < ELEMENTS(kernel.destroyed))
			kernel.destroyed[kernel.n_destroyed++] = handles[i];
	}
	return r;
}

static bool is_empty(int fd)
{
	return !kernel.handles_stay;
}

static int describe_provable(int fd, const struct config *config, struct context_description *ret)
{
	*ret = (struct context_description){.forcible = true, .proof = PROOF_PROVABLE};
	return 0;
}

static int describe_device(int fd, const struct config *config, struct context_description *ret)
{
	*ret = (struct context_description){
		.device = "mlx5_0", .number = makedev(231, 192), .proof = PROOF_CLAIMED};
	ret->forcible = config->force_unmap;
	return 0;
}

static bool identify_eventfd(int fd, const char *link)
{
	return is_called(link, "anon_inode:[eventfd]");
}

const struct context_ops context_io_uring = {
	.kind = "ioUring",
	.identify = identify_eventfd,
	.describe = describe_provable,
	.read_handle = read_handle,
	.detach = detach,
	.check = check,
	.detach_frees_usec = 1,
};

static bool identify_timerfd(int fd, const char *link)
{
	return is_called(link, "anon_inode:[timerfd]");
}

const struct context_ops context_af_xdp = {
	.kind = "afXdp",
	.identify = identify_timerfd,
	.until_close = true,
	.frees_usec = 1,
};

static bool identify_signalfd(int fd, const char *link)
{
	return is_called(link, "anon_inode:[signalfd]");
}

const struct context_ops context_rdma = {
	.kind = "rdma",
	.identify = identify_signalfd,
	.describe = describe_device,
	.read_handle = read_handle,
	.detach = detach,
	.check = check,
};

static bool identify_epoll(int fd, const char *link)
{
	return is_called(link, "anon_inode:[eventpoll]");
}

const struct context_ops context_vfio = {
	.kind = "vfio",
	.identify = identify_epoll,
	.describe = describe_device,
	.detach = detach,
	.is_empty = is_empty,
};

/* ---- Descriptors ---- */

static int get_path(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", kernel.files[0].fd);
	return open(path, O_PATH | O_CLOEXEC);
}

static int get_pipe(void)
{
	int fds[2];

	if (pipe2(fds, O_CLOEXEC) < 0)
		return -1;
	close(fds[1]);
	return fds[0];
}

int kernel_descriptor(char kind)
{
	sigset_t none;

	switch (kind) {
	case '0' ... '0' + N_FILES - 1:
		return fcntl(kernel.files[kind - '0'].fd, F_DUPFD_CLOEXEC, 3);
	case 'e':
		return eventfd(0, EFD_CLOEXEC);
	case 't':
		return timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	case 'p':
		return epoll_create1(EPOLL_CLOEXEC);
	case 'g':
		sigemptyset(&none);
		return signalfd(-1, &none, SFD_CLOEXEC);
	case 'i':
		return inotify_init1(IN_CLOEXEC);
	case 'o':
		return get_path();
	case 'w':
		return get_pipe();
	case 's':
		return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	case 'u':
		return socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	default:
		return -1;
	}
}
