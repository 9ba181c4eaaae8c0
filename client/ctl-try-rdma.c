/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-try.h"

#if HAVE_LIBIBVERBS
#include <infiniband/verbs.h>

static struct ibv_context *open_first_device(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = NULL;

	for (struct ibv_device **d = list; d && *d && !context; d++)
		context = ibv_open_device(*d);
	if (list)
		ibv_free_device_list(list);
	return context;
}

int try_rdma(void *map, size_t size, enum pinbroker_access access, bool on_demand)
{
	int flags = access == PINBROKER_WRITE ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE
					      : IBV_ACCESS_REMOTE_READ;
	struct ibv_context *context = open_first_device();
	struct ibv_mr *mr = NULL;
	struct ibv_pd *pd;
	int r;

	if (!context)
		return -ENODEV;
	pd = ibv_alloc_pd(context);
	if (pd)
		mr = ibv_reg_mr(pd, map, size, flags | (on_demand ? IBV_ACCESS_ON_DEMAND : 0));
	r = mr ? 0 : -errno;
	if (mr)
		ibv_dereg_mr(mr);
	if (pd)
		ibv_dealloc_pd(pd);
	ibv_close_device(context);
	return r;
}

#else

int try_rdma(void *map, size_t size, enum pinbroker_access access, bool on_demand)
{
	return -ENODEV;
}
#endif
