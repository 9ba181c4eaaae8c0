/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <fcntl.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/rdma_user_ioctl.h>
#include <rdma/rdma_user_ioctl_cmds.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "daemon/context/ops.h"
#include "protocol/macro.h"

/*
 * The handle is the kernel's of a memory region (ibv_mr::handle). Whoever holds the context's descriptor can
 * list, query and destroy its regions with the ioctls of /dev/infiniband/uverbsN; libibverbs has no call
 * for it, as it takes over contexts of mlx5 alone (ibv_import_device).
 */

/* Drivers are numbered by enum rdma_driver_id; new ones are added at its end. */
#define DRIVERS_MAX 64U

#define ATTRIBUTES_MAX 5U

/* Room for so many regions' handles, at first, and at most: their size in bytes has 16 bits, and the kernel
 * does not list them in parts. */
#define REGIONS_FIRST 1024U
#define REGIONS_MAX   (UINT16_MAX / sizeof(uint32_t))

/* The header, and the attributes behind it: as an array, since a structure that ends in one of no size may
 * not be part of another (clang). */
struct command {
	_Alignas(struct ib_uverbs_ioctl_hdr) char buffer[sizeof(struct ib_uverbs_ioctl_hdr) +
							 ATTRIBUTES_MAX *
								 sizeof(struct ib_uverbs_attr)];
};

static struct ib_uverbs_ioctl_hdr *command_header(struct command *c)
{
	return (void *)c->buffer;
}

static struct command command_new(uint16_t object, uint16_t method, uint32_t driver)
{
	struct command c = {};

	command_header(&c)->object_id = object;
	command_header(&c)->method_id = method;
	command_header(&c)->driver_id = driver;
	return c;
}

static void command_add(struct command *c, uint16_t id, uint64_t data, uint16_t size)
{
	struct ib_uverbs_ioctl_hdr *header = command_header(c);

	header->attrs[header->num_attrs++] = (struct ib_uverbs_attr){
		.attr_id = id,
		.len = size,
		.flags = UVERBS_ATTR_F_MANDATORY,
		.data = data,
	};
}

static void command_add_out(struct command *c, uint16_t id, void *out, uint16_t size)
{
	command_add(c, id, (uintptr_t)out, size);
}

static int command_run(int fd, struct command *c)
{
	struct ib_uverbs_ioctl_hdr *header = command_header(c);

	header->length = (uint16_t)(sizeof(*header) + header->num_attrs * sizeof(header->attrs[0]));
	return ioctl(fd, RDMA_VERBS_IOCTL, header) < 0 ? -errno : 0;
}

/* ret_handles: room for n_max of the regions' handles; ret_n: how many it got. */
static int list_regions(int fd, uint32_t driver, uint32_t *ret_handles, uint32_t n_max,
			uint32_t *ret_n)
{
	struct command c = command_new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INFO_HANDLES, driver);

	command_add(&c, UVERBS_ATTR_INFO_OBJECT_ID, UVERBS_OBJECT_MR, sizeof(uint64_t));
	command_add_out(&c, UVERBS_ATTR_INFO_TOTAL_HANDLES, ret_n, sizeof(*ret_n));
	command_add_out(&c, UVERBS_ATTR_INFO_HANDLES_LIST, ret_handles,
			(uint16_t)(n_max * sizeof(*ret_handles)));
	return command_run(fd, &c);
}

/* The commands are refused with EINVAL unless they name the driver, which cannot be asked for. */
static int find_driver(int fd, uint32_t *ret)
{
	for (uint32_t driver = 0; driver < DRIVERS_MAX; driver++) {
		uint32_t handle, n;
		int r = list_regions(fd, driver, &handle, 1, &n);

		if (r == -EINVAL)
			continue;
		*ret = driver;
		return r;
	}
	return -EOPNOTSUPP;
}

static int query_region(int fd, uint32_t driver, uint32_t handle, struct handle_identity *ret)
{
	struct command c = command_new(UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR, driver);
	uint32_t lkey, rkey;
	uint64_t length, iova;
	int r;

	command_add(&c, UVERBS_ATTR_QUERY_MR_HANDLE, handle, 0);
	command_add_out(&c, UVERBS_ATTR_QUERY_MR_RESP_LKEY, &lkey, sizeof(lkey));
	command_add_out(&c, UVERBS_ATTR_QUERY_MR_RESP_RKEY, &rkey, sizeof(rkey));
	command_add_out(&c, UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &length, sizeof(length));
	command_add_out(&c, UVERBS_ATTR_QUERY_MR_RESP_IOVA, &iova, sizeof(iova));
	r = command_run(fd, &c);
	if (r == 0)
		*ret = (struct handle_identity){
			.address = iova,
			.length = length,
			.key = (uint64_t)lkey << 32 | rkey,
		};
	return r;
}

static int destroy_region(int fd, uint32_t driver, uint32_t handle)
{
	struct command c = command_new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY, driver);

	command_add(&c, UVERBS_ATTR_DESTROY_MR_HANDLE, handle, 0);
	return command_run(fd, &c);
}

/* The name of the RDMA device that a /dev/infiniband/uverbsN is for, wherever that node stands. */
static int read_device_name(int fd, char ret[static 64])
{
	_cleanup_(freep) char *name = NULL;
	struct statx stx;
	int r;

	/* see access.c: whatever else could wait for a FUSE server */
	if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &stx) < 0)
		return -errno;
	if (!S_ISCHR(stx.stx_mode))
		return -ENOTTY;
	r = proc_read(&name, "/sys/dev/char/%u:%u/ibdev", stx.stx_rdev_major, stx.stx_rdev_minor);
	if (r < 0)
		return r;
	name[strcspn(name, "\n")] = 0;
	snprintf(ret, 64, "%s", name);
	return 0;
}

static bool rdma_identify(int fd, const char *link)
{
	char name[64];

	return *link == '/' && read_device_name(fd, name) == 0;
}

static int rdma_describe(int fd, const struct config *config, struct context_description *ret)
{
	uint32_t driver;

	*ret = (struct context_description){ .proof = PROOF_CLAIMED };
	(void)read_device_name(fd, ret->device);
	ret->forcible = find_driver(fd, &driver) == 0;
	if (ret->forcible)
		ret->proof = PROOF_PROVABLE;
	return 0;
}

static int rdma_read_handle(int fd, int64_t handle, struct handle_identity *ret)
{
	uint32_t driver;
	int r;

	if (handle > UINT32_MAX)
		return -ENOENT;
	r = find_driver(fd, &driver);
	return r < 0 ? r : query_region(fd, driver, (uint32_t)handle, ret);
}

/* A device that was removed has taken its regions with it. */
static bool is_gone(int fd, uint32_t driver, const struct handle *h)
{
	struct handle_identity now;
	int r = query_region(fd, driver, (uint32_t)h->handle, &now);

	return r == -ENOENT || r == -EIO ||
	       (r == 0 && !handle_identity_equal(&now, &h->identity));
}

/* As list_regions(), with room for all; the caller frees them. */
static int list_all_regions(int fd, uint32_t driver, uint32_t **ret_handles, uint32_t *ret_n)
{
	for (uint32_t n_max = REGIONS_FIRST;; n_max *= 2) {
		_cleanup_(freep) uint32_t *handles = calloc(n_max, sizeof(*handles));
		int r;

		if (n_max > REGIONS_MAX)
			n_max = REGIONS_MAX;
		if (!handles)
			return -ENOMEM;
		r = list_regions(fd, driver, handles, n_max, ret_n);
		if (r < 0)
			return r;
		/* If there are more than fit the kernel leaves them out, and does not say so. */
		if (*ret_n < n_max) {
			*ret_handles = TAKE_PTR(handles);
			return 0;
		}
		if (n_max == REGIONS_MAX)
			return -E2BIG;
	}
}

static int compare_handle(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/*
 * A handle that is not listed is nobody's. One that is may be another region's by now; but to ask which locks
 * it for a moment, and its holder, were he deregistering it just then, would get EBUSY.
 */
static int rdma_check(int fd, const struct process *holder, struct handle *handles, size_t n_handles)
{
	_cleanup_(freep) uint32_t *listed = NULL;
	uint32_t driver, n = 0;
	int r;

	r = find_driver(fd, &driver);
	if (r >= 0)
		r = list_all_regions(fd, driver, &listed, &n);
	if (r < 0 && r != -EIO && r != -E2BIG)
		return r;
	if (listed)
		qsort(listed, n, sizeof(*listed), compare_handle);
	for (size_t i = 0; i < n_handles; i++) {
		uint32_t handle = (uint32_t)handles[i].handle;

		if (r == -EIO || (listed && !bsearch(&handle, listed, n, sizeof(*listed), compare_handle)))
			handles[i].gone = true;
		else if (handles[i].ask)
			handles[i].gone = is_gone(fd, driver, &handles[i]);
	}
	return 0;
}

/* All regions of the context; the caller frees them. */
static int query_regions(int fd, uint32_t driver, struct handle_identity **ret, uint32_t *ret_n)
{
	_cleanup_(freep) struct handle_identity *regions = NULL;
	_cleanup_(freep) uint32_t *handles = NULL;
	uint32_t n, n_regions = 0;
	int r;

	r = list_all_regions(fd, driver, &handles, &n);
	if (r < 0)
		return r;
	regions = calloc(n + 1, sizeof(*regions));
	if (!regions)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++)
		n_regions += query_region(fd, driver, handles[i], &regions[n_regions]) == 0;
	*ret = TAKE_PTR(regions);
	*ret_n = n_regions;
	return 0;
}

static bool is_kept(const struct handle *handles, size_t n_handles, const struct handle_identity *region)
{
	for (size_t i = 0; i < n_handles; i++)
		if (handles[i].keep && handle_identity_equal(&handles[i].identity, region))
			return true;
	return false;
}

/* Is the same memory registered by another name, of which no pin tells? At address 0 it may be any memory. */
static bool is_registered(const struct handle_identity *regions, uint32_t n_regions,
			  const struct handle *handles, size_t n_handles, const struct handle *h)
{
	const struct handle_identity *was = &h->identity;

	for (uint32_t i = 0; i < n_regions && was->address != 0; i++)
		if (regions[i].address < was->address + was->length &&
		    was->address < regions[i].address + regions[i].length &&
		    !is_kept(handles, n_handles, &regions[i]))
			return true;
	return false;
}

static int rdma_detach(int fd, const struct process *holder, struct handle *handles,
		       size_t n_handles)
{
	_cleanup_(freep) struct handle_identity *regions = NULL;
	uint32_t driver, n_regions;
	int r, first = 0;

	r = find_driver(fd, &driver);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_handles; i++) {
		if (handles[i].keep || is_gone(fd, driver, &handles[i]))
			continue;
		/* EINVAL: a memory window is bound to it. The others are tried all the same. */
		r = destroy_region(fd, driver, (uint32_t)handles[i].handle);
		handles[i].destroyed = r == 0;
		if (r < 0 && first == 0)
			first = r;
	}
	r = query_regions(fd, driver, &regions, &n_regions);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_handles; i++) {
		bool registered;

		if (handles[i].keep)
			continue;
		/* What was let go of may be registered again, by another pin that is not bound yet. */
		registered = !handles[i].left &&
			     is_registered(regions, n_regions, handles, n_handles, &handles[i]);
		handles[i].gone = is_gone(fd, driver, &handles[i]) && !registered;
		if (registered && first == 0)
			first = -EBUSY;
	}
	return first;
}

const struct context_ops context_rdma = {
	.kind = "rdma",
	.identify = rdma_identify,
	.describe = rdma_describe,
	.read_handle = rdma_read_handle,
	.detach = rdma_detach,
	.check = rdma_check,
};
