/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <linux/if_xdp.h>
#include <sys/socket.h>

#include "daemon/context/ops.h"
#include "protocol/macro.h"

/* An AF_XDP socket: its umem stays pinned until the last close, whatever is done to the socket. */

static bool xdp_identify(int fd, const char *link)
{
	int domain;
	socklen_t size = sizeof(domain);

	return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_XDP;
}

/* What a holder has bound is believed to be the umem, and is if it is honest. Whether there is one can be asked:
 * of nothing a second one is made as little as a first. */
static void xdp_count(int fd, uint64_t n_bound, struct page_count *ret)
{
	struct xdp_umem_reg nothing = {};

	*ret = (struct page_count){};
	if (setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &nothing,
		       offsetof(struct xdp_umem_reg, flags)) == 0 || errno != EBUSY)
		return;
	/* Of one that was not bound, no more is known than that it has pages. */
	ret->most = n_bound > 0 ? n_bound : 1;
	/* Some bind more than the umem has. */
	ret->least = (ret->most + 3) / 4;
}

const struct context_ops context_af_xdp = {
	.kind = "af_xdp",
	.identify = xdp_identify,
	.count = xdp_count,
	.until_close = true,
	/* by RCU and a work queue: more than 25 ms were seen on a busy machine */
	.frees_usec = 250 * USEC_PER_MSEC,
};
