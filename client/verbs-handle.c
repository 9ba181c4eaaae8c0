/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "verbs.h"

#include <errno.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_user_ioctl.h>
#include <rdma/rdma_user_ioctl_cmds.h>
#include <sys/ioctl.h>

/* libibverbs can query regions only for its providers. */

/* As in daemon/context-rdma.c: the kernel wants the driver's number, which cannot be asked for. */
#define DRIVERS_MAX 64U

struct query {
	struct ib_uverbs_ioctl_hdr header;
	struct ib_uverbs_attr attributes[5];
};

static struct ib_uverbs_attr attribute(uint16_t id, uint64_t data, uint16_t size)
{
	return (struct ib_uverbs_attr){
		.attr_id = id,
		.len = size,
		.flags = UVERBS_ATTR_F_MANDATORY,
		.data = data,
	};
}

static int query(const struct ibv_mr *mr, uint32_t driver, uint32_t *ret_rkey, uint64_t *ret_length)
{
	uint64_t iova;
	uint32_t lkey;
	struct query q = {
		.header =
			{
				.length = sizeof(q),
				.object_id = UVERBS_OBJECT_MR,
				.method_id = UVERBS_METHOD_QUERY_MR,
				.num_attrs = 5,
				.driver_id = driver,
			},
		.attributes =
			{
				attribute(UVERBS_ATTR_QUERY_MR_HANDLE, mr->handle, 0),
				attribute(UVERBS_ATTR_QUERY_MR_RESP_LKEY, (uintptr_t)&lkey,
					sizeof(lkey)),
				attribute(UVERBS_ATTR_QUERY_MR_RESP_RKEY, (uintptr_t)ret_rkey,
					sizeof(*ret_rkey)),
				attribute(UVERBS_ATTR_QUERY_MR_RESP_LENGTH, (uintptr_t)ret_length,
					sizeof(*ret_length)),
				attribute(UVERBS_ATTR_QUERY_MR_RESP_IOVA, (uintptr_t)&iova,
					sizeof(iova)),
			},
	};

	return ioctl(mr->context->cmd_fd, RDMA_VERBS_IOCTL, &q) < 0 ? -errno : 0;
}

int handle_is_of(const struct ibv_mr *mr)
{
	uint32_t rkey = 0;
	uint64_t length = 0;
	int r = -EINVAL;

	/* EINVAL: the wrong driver; in the end: the handle is of something that is no region */
	for (uint32_t driver = 0; r == -EINVAL && driver < DRIVERS_MAX; driver++)
		r = query(mr, driver, &rkey, &length);
	/* EIO: the device is gone, and all regions with it */
	if (r == -EINVAL || r == -ENOENT || r == -EIO)
		return 0;
	return r < 0 ? r : rkey == mr->rkey && length == mr->length;
}
