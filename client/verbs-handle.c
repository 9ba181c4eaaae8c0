/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "verbs.h"

#include <errno.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_user_ioctl.h>
#include <rdma/rdma_user_ioctl_cmds.h>
#include <sys/ioctl.h>

/* libibverbs can query regions only for its providers. */

/* As in daemon/context/rdma.c: the kernel wants the driver's number, which cannot be asked for. */
#define DRIVERS_MAX 64U

#define ATTRIBUTES 5

static void add(struct ib_uverbs_ioctl_hdr *query, uint16_t id, uint64_t data, uint16_t size)
{
	query->attrs[query->num_attrs++] = (struct ib_uverbs_attr){
		.attr_id = id,
		.len = size,
		.flags = UVERBS_ATTR_F_MANDATORY,
		.data = data,
	};
}

static void add_out(struct ib_uverbs_ioctl_hdr *query, uint16_t id, void *out, uint16_t size)
{
	add(query, id, (uintptr_t)out, size);
}

struct answer {
	uint32_t lkey, rkey;
	uint64_t length, iova;
};

static int query_region(const struct ibv_mr *mr, uint32_t driver, struct answer *ret)
{
	_Alignas(struct ib_uverbs_ioctl_hdr) char
		buffer[sizeof(struct ib_uverbs_ioctl_hdr) +
			ATTRIBUTES * sizeof(struct ib_uverbs_attr)] = {0};
	struct ib_uverbs_ioctl_hdr *query = (void *)buffer;

	query->length = sizeof(buffer);
	query->object_id = UVERBS_OBJECT_MR;
	query->method_id = UVERBS_METHOD_QUERY_MR;
	query->driver_id = driver;
	add(query, UVERBS_ATTR_QUERY_MR_HANDLE, mr->handle, 0);
	add_out(query, UVERBS_ATTR_QUERY_MR_RESP_LKEY, &ret->lkey, sizeof(ret->lkey));
	add_out(query, UVERBS_ATTR_QUERY_MR_RESP_RKEY, &ret->rkey, sizeof(ret->rkey));
	add_out(query, UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &ret->length, sizeof(ret->length));
	add_out(query, UVERBS_ATTR_QUERY_MR_RESP_IOVA, &ret->iova, sizeof(ret->iova));
	return ioctl(mr->context->cmd_fd, RDMA_VERBS_IOCTL, query) < 0 ? -errno : 0;
}

int handle_is_of(const struct ibv_mr *mr)
{
	struct answer answer = {0};
	int r = -EINVAL;

	/* EINVAL: the wrong driver; in the end: the handle is of something that is no region */
	for (uint32_t driver = 0; r == -EINVAL && driver < DRIVERS_MAX; driver++)
		r = query_region(mr, driver, &answer);
	/* EIO: the device is gone, and all regions with it */
	if (r == -EINVAL || r == -ENOENT || r == -EIO)
		return 0;
	if (r < 0)
		return r;
	/* rkey is 0 where nobody else has access; no two regions that live have one lkey */
	return answer.lkey == mr->lkey && answer.rkey == mr->rkey && answer.length == mr->length;
}
