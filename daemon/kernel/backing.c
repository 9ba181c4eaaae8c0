/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/backing.h"

#include <daxctl/libdaxctl.h>
#include <ndctl/libndctl.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <systemd/sd-device.h>

#include "protocol/macro.h"

static void ndctl_unrefp(struct ndctl_ctx **ctx)
{
	ndctl_unref(*ctx);
}

static void daxctl_unrefp(struct daxctl_ctx **ctx)
{
	daxctl_unref(*ctx);
}

static void set_name(char name[static 32], const char *value)
{
	snprintf(name, 32, "%s", value ? value : "");
}

/* What to look for among the namespaces: a disk, or a device-DAX. */
struct wanted {
	const char *disk; /* or NULL */
	dev_t dax;
};

static const char *block_device_of(struct ndctl_namespace *ns)
{
	struct ndctl_pfn *pfn = ndctl_namespace_get_pfn(ns);
	struct ndctl_btt *btt = ndctl_namespace_get_btt(ns);

	if (pfn)
		return ndctl_pfn_get_block_device(pfn);
	return btt ? ndctl_btt_get_block_device(btt) : ndctl_namespace_get_block_device(ns);
}

static struct daxctl_dev *find_dax(struct daxctl_region *region, dev_t device)
{
	struct daxctl_dev *dax;

	daxctl_dev_foreach(region, dax)
		if (daxctl_dev_get_major(dax) == (int)major(device) &&
		    daxctl_dev_get_minor(dax) == (int)minor(device))
			return dax;
	return NULL;
}

static bool carries(struct ndctl_namespace *ns, const struct wanted *wanted)
{
	struct daxctl_region *region;
	struct ndctl_dax *dax;
	const char *disk;

	if (wanted->disk) {
		disk = block_device_of(ns);
		return disk && strcmp(disk, wanted->disk) == 0;
	}
	dax = ndctl_namespace_get_dax(ns);
	region = dax ? ndctl_dax_get_daxctl_region(dax) : NULL;
	return region && find_dax(region, wanted->dax);
}

static void find_namespace(const struct wanted *wanted, struct backing *b)
{
	_cleanup_(ndctl_unrefp) struct ndctl_ctx *nd = NULL;
	struct ndctl_namespace *ns;
	struct ndctl_region *region;
	struct ndctl_bus *bus;

	if (ndctl_new(&nd) < 0)
		return;
	ndctl_bus_foreach(nd, bus)
	ndctl_region_foreach(bus, region)
	ndctl_namespace_foreach(region, ns) {
		if (!carries(ns, wanted))
			continue;
		set_name(b->nvdimm_namespace, ndctl_namespace_get_devname(ns));
		set_name(b->region, ndctl_region_get_devname(region));
		b->numa_node = ndctl_namespace_get_numa_node(ns);
		return;
	}
}

static enum backing_kind find_kind(const char *file_system, bool dax)
{
	if (dax)
		return BACKING_FSDAX;
	if (strcmp(file_system, "tmpfs") == 0)
		return BACKING_TMPFS;
	if (strcmp(file_system, "hugetlbfs") == 0)
		return BACKING_HUGETLBFS;
	return BACKING_PAGE_CACHE;
}

void backing_find(dev_t device, const char *file_system, bool dax, struct backing *ret)
{
	_cleanup_(sd_device_unrefp) sd_device *block = NULL;
	struct wanted wanted = {};
	sd_device *disk, *nvdimm;
	const char *name;

	*ret = (struct backing){ .kind = find_kind(file_system, dax), .numa_node = -1 };
	/* tmpfs, btrfs and the like have numbers of their own, which are no device's */
	if (major(device) == 0 || sd_device_new_from_devnum(&block, 'b', device) < 0 ||
	    sd_device_get_sysname(block, &name) < 0)
		return;
	set_name(ret->device, name);
	if (sd_device_get_parent_with_subsystem_devtype(block, "block", "disk", &disk) < 0)
		disk = block;
	if (sd_device_get_parent_with_subsystem_devtype(disk, "nd", NULL, &nvdimm) < 0 ||
	    sd_device_get_sysname(disk, &wanted.disk) < 0)
		return;
	find_namespace(&wanted, ret);
}

int backing_find_device(dev_t device, struct backing *ret, uint64_t *ret_size)
{
	_cleanup_(daxctl_unrefp) struct daxctl_ctx *ctx = NULL;
	struct daxctl_region *region;
	struct daxctl_dev *dax = NULL;
	int r;

	r = daxctl_new(&ctx);
	if (r < 0)
		return r;
	daxctl_region_foreach(ctx, region) {
		dax = find_dax(region, device);
		if (dax)
			break;
	}
	if (!dax)
		return -ENODEV;
	*ret = (struct backing){
		.kind = BACKING_DEVICE_DAX,
		.numa_node = daxctl_dev_get_target_node(dax),
	};
	set_name(ret->device, daxctl_dev_get_devname(dax));
	*ret_size = daxctl_dev_get_size(dax);
	find_namespace(&(struct wanted){ .dax = device }, ret);
	return 0;
}

enum pinnable backing_pinnable(const struct backing *backing, enum access access,
			       const char **ret_reason)
{
	*ret_reason = NULL;
	switch (backing->kind) {
	case BACKING_FSDAX:
		*ret_reason = "The kernel makes no long-term pins of fsdax pages, which belong to the "
			      "file system: use on-demand paging (IBV_ACCESS_ON_DEMAND).";
		return PINNABLE_NO;
	case BACKING_PAGE_CACHE:
		if (access == ACCESS_READ)
			break;
		*ret_reason = "Kernels from Linux 6.5 on refuse it where the file system must be told "
			      "of every write.";
		return PINNABLE_UNKNOWN;
	default:
		break;
	}
	return PINNABLE_YES;
}

bool backing_is_on(const struct backing *b, const char *name)
{
	return *name && (strcmp(b->device, name) == 0 || strcmp(b->nvdimm_namespace, name) == 0 ||
			 strcmp(b->region, name) == 0);
}

static const char *name_or_null(const char *name)
{
	return *name ? name : NULL;
}

void backing_info(const struct backing *backing, struct msg_backing *ret)
{
	*ret = (struct msg_backing){
		.kind = backing->kind,
		.deviceName = name_or_null(backing->device),
		.namespace = name_or_null(backing->nvdimm_namespace),
		.region = name_or_null(backing->region),
		.numaNode = backing->numa_node >= 0 ? backing->numa_node : INT_NULL,
	};
}
