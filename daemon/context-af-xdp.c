/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <linux/if_xdp.h>
#include <sys/socket.h>

#include "context.h"
#include "macro.h"

/* An AF_XDP socket: its umem stays pinned until the last close, whatever is done to the socket. */

static bool xdp_identify(int fd, const char *link)
{
	int domain;
	socklen_t size = sizeof(domain);

	return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_XDP;
}

const struct context_ops context_af_xdp = {
	.kind = "af_xdp",
	.identify = xdp_identify,
	.until_close = true,
	/* by RCU and a work queue: more than 25 ms were seen on a busy machine */
	.frees_usec = 250 * USEC_PER_MSEC,
};
