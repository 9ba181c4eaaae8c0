/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* Holds a file through a device, with libpinbroker-verbs: DEVICE FILE. */

#include "holder.h"

#include "client/examples/rdma-pair.h"
#include "pinbroker-verbs.h"

#include <errno.h>
#include <sys/mman.h>

#define SIZE 65536

static pinbroker_file *file;
static struct ibv_context *device;
static struct ibv_pd *pd;
static struct ibv_mr *region;
static void *map;

static int do_register(void)
{
	struct ibv_mr *mr = pinbroker_reg_mr(pb, file, 0, pd, map, SIZE, IBV_ACCESS_LOCAL_WRITE);

	if (!mr)
		return -errno;
	region = mr;
	return 0;
}

static int do_deregister(void)
{
	return pinbroker_dereg_mr(pb, region);
}

static int do_close(void)
{
	ibv_dealloc_pd(pd);
	return pinbroker_close_device(pb, device);
}

/* … of this process's own, without a word to the broker. */
static int do_drop(void)
{
	ibv_dealloc_pd(pd);
	return ibv_close_device(device);
}

static int do_close_file(void)
{
	munmap(map, SIZE);
	return pinbroker_close_file(file);
}

int main(int argc, char *argv[])
{
	static const struct command commands[] = {
		{"register", do_register},
		{"deregister", do_deregister},
		{"close", do_close},
		{"drop", do_drop},
		{"close-file", do_close_file},
		{NULL, NULL},
	};

	device = device_open(argv[1]);
	pd = ibv_alloc_pd(device);
	if (!pd)
		fail(argv[1]);
	holder_connect();
	check(pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file));
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	if (map == MAP_FAILED)
		fail(argv[2]);
	holder_run(commands);
	return 0;
}
