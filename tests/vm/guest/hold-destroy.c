/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * For LD_PRELOAD: stops who is about to destroy a memory region until the other end of a connection
 * to $PINBROKER_TEST_HOLD, if anybody listens there, is closed.
 */

#include <dlfcn.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_user_ioctl.h>
#include <rdma/rdma_user_ioctl_cmds.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void wait_for_leave(void)
{
	const char *path = getenv("PINBROKER_TEST_HOLD");
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = path ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
	char byte;

	if (fd < 0)
		return;
	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
		(void)!read(fd, &byte, 1);
	close(fd);
}

__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
	static int (*real)(int, unsigned long, void *);
	const struct ib_uverbs_ioctl_hdr *header;
	va_list ap;
	void *arg;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "ioctl");
	header = arg;
	if (request == RDMA_VERBS_IOCTL && header->object_id == UVERBS_OBJECT_MR &&
		header->method_id == UVERBS_METHOD_MR_DESTROY)
		wait_for_leave();
	return real(fd, request, arg);
}
