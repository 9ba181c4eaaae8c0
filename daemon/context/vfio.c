/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <linux/major.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

#include "daemon/context/ops.h"
#include "daemon/util/config.h"

/*
 * A VFIO container with a type 1 IOMMU; the handle is the iova. The kernel tells of no mapping whose it is,
 * nor what it maps: a forced unmap relies on what the holder has bound, and no proof is better than claimed.
 * The device may be in the middle of a transfer, which then ends in a fault: hence ForceUnmap=.
 */

/* linux/miscdevice.h */
#define VFIO_MINOR 196

/* Where iommufd stands in for the container, mappings do not end with the last group: it is opaque. Linux
 * 6.1 has no header of it. */
static bool is_iommufd(int fd)
{
	struct {
		uint32_t size, ioas;
		uint16_t op, reserved;
	} get = { .size = 12 }; /* IOMMU_VFIO_IOAS_GET */

	return ioctl(fd, _IO(VFIO_TYPE, 0x88), &get) >= 0 || errno == ENODEV;
}

static bool vfio_identify(int fd, const char *link)
{
	return *link == '/' && context_device_number(fd) == makedev(MISC_MAJOR, VFIO_MINOR) &&
	       !is_iommufd(fd);
}

static int vfio_describe(int fd, const struct config *config, struct context_description *ret)
{
	*ret = (struct context_description){ .device = "vfio", .proof = PROOF_CLAIMED };
	ret->forcible = config->force_unmap &&
			ioctl(fd, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU) > 0;
	return 0;
}

static int unmap(int fd, const struct handle *h)
{
	struct vfio_iommu_type1_dma_unmap request = {
		.argsz = sizeof(request),
		.iova = (uint64_t)h->handle,
		.size = h->length,
	};

	/* EINVAL: it would have to divide a mapping, or there is no group any more */
	if (ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &request) < 0)
		return -errno;
	/* less, or nothing: it is mapped elsewhere, or the holder has said what is not so */
	return request.size == h->length ? 0 : -ENOENT;
}

static int vfio_detach(int fd, const struct process *holder, struct handle *handles,
		       size_t n_handles)
{
	int first = 0;

	for (size_t i = 0; i < n_handles; i++) {
		int r;

		if (handles[i].keep)
			continue;
		r = unmap(fd, &handles[i]);
		handles[i].gone = r == 0;
		if (r < 0 && first == 0)
			first = r;
	}
	return first;
}

/* The IOMMU goes with the last group, whose descriptors need not be where the container is. */
static bool vfio_is_empty(int fd)
{
	struct vfio_iommu_type1_info info = { .argsz = sizeof(info) };

	return ioctl(fd, VFIO_IOMMU_GET_INFO, &info) < 0 && errno == EINVAL;
}

const struct context_ops context_vfio = {
	.kind = "vfio",
	.identify = vfio_identify,
	.describe = vfio_describe,
	.detach = vfio_detach,
	.is_empty = vfio_is_empty,
};
