/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* What the kernel tells of a region by its handle: DEVICE. */

#include "client/examples/rdma-pair.h"
#include "client/verbs.h"

static char memory[2][4096];

static struct ibv_mr *new_region(struct ibv_pd *pd, void *addr)
{
	struct ibv_mr *mr = ibv_reg_mr(pd, addr, sizeof(memory[0]), IBV_ACCESS_LOCAL_WRITE);

	if (!mr)
		fail("Cannot register memory");
	return mr;
}

static int check(const char *what, const struct ibv_mr *mr, int expected)
{
	int r = handle_is_of(mr);

	printf("%s, handle %u: %d\n", what, mr->handle, r);
	return r != expected;
}

int main(int argc, char *argv[])
{
	struct ibv_context *context = device_open(argv[argc - 1]);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_mr *mr, *other, gone;
	int failed = 0;

	if (!pd)
		fail(argv[1]);
	mr = new_region(pd, memory[0]);
	failed |= check("registered", mr, 1);
	gone = *mr;
	failed |= ibv_dereg_mr(mr) != 0;
	failed |= check("deregistered", &gone, 0);
	other = new_region(pd, memory[1]);
	failed |= other->handle != gone.handle;
	failed |= check("reused", &gone, 0);
	failed |= check("another", other, 1);
	gone.handle = pd->handle;
	failed |= check("protection domain", &gone, 0);
	gone.handle = UINT32_MAX;
	failed |= check("nobody's", &gone, 0);
	failed |= ibv_dereg_mr(other) != 0;
	ibv_dealloc_pd(pd);
	ibv_close_device(context);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
