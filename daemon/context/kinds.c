/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/context/ops.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/stat.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "protocol/macro.h"

/* What a descriptor is, and what can be done through it. */

static const struct context_ops *const kinds[] = {
	&context_io_uring,
	&context_af_xdp,
	&context_rdma,
	&context_vfio,
	&context_opaque, /* last: takes what the others leave */
};

const char *context_kind(size_t i)
{
	return i < ELEMENTS(kinds) ? kinds[i]->kind : NULL;
}

const struct context_ops *context_find_kind(const char *kind)
{
	for (size_t i = 0; i < ELEMENTS(kinds); i++)
		if (strcmp(kinds[i]->kind, kind) == 0)
			return kinds[i];
	return NULL;
}

static int read_link(int fd, char ret[static PATH_MAX])
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, ret, PATH_MAX - 1);
	if (n < 0)
		return -errno;
	ret[n] = 0;
	return 0;
}

static int refuse_file(struct refusal *ret_refusal)
{
	return refuse(ret_refusal, REFUSAL_NOT_SUPPORTED, "descriptor",
		      "A file, directory or pipe holds no pins.");
}

static const struct context_ops *find_kind(int fd, const char *link)
{
	size_t i = 0;

	while (!kinds[i]->identify(fd, link))
		i++;
	return kinds[i];
}

dev_t context_device_number(int fd)
{
	struct statx stx;

	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &stx) < 0 ||
	    !S_ISCHR(stx.stx_mode))
		return 0;
	return makedev(stx.stx_rdev_major, stx.stx_rdev_minor);
}

/* The kernel waits with the removal of a device for all who have it open: too late to become one of them. */
static bool is_removed(dev_t number)
{
	static const char directory[] = "/sys/dev/char";
	char path[64];

	snprintf(path, sizeof(path), "%s/%u:%u", directory, major(number), minor(number));
	return number != 0 && access(path, F_OK) < 0 && access(directory, F_OK) == 0;
}

int context_identify(int fd, const struct config *config, const struct context_ops **ret,
		     struct context_description *ret_description, struct refusal *ret_refusal)
{
	char link[PATH_MAX];
	struct statx stx;
	dev_t number;
	int r;

	r = context_identify_at_once(fd, ret, ret_description, ret_refusal);
	if (r != -EAGAIN)
		return r;
	/* see access.c: whatever else could wait for a FUSE server */
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &stx) < 0)
		return -errno;
	if (S_ISREG(stx.stx_mode) || S_ISDIR(stx.stx_mode) || S_ISFIFO(stx.stx_mode) ||
	    S_ISLNK(stx.stx_mode))
		return refuse_file(ret_refusal);
	r = read_link(fd, link);
	if (r < 0)
		return r;
	number = context_device_number(fd);
	if (is_removed(number))
		return refuse(ret_refusal, REFUSAL_NOT_SUPPORTED, "removed",
			      "The kernel does not list the device of this descriptor (any more).");
	*ret = find_kind(fd, link);
	*ret_description = (struct context_description){ .proof = PROOF_CLAIMED };
	r = (*ret)->describe ? (*ret)->describe(fd, config, ret_description) : 0;
	ret_description->number = number;
	return r;
}

int context_identify_at_once(int fd, const struct context_ops **ret,
			     struct context_description *ret_description,
			     struct refusal *ret_refusal)
{
	static const char anonymous[] = "anon_inode:", pipes[] = "pipe:[";
	socklen_t size = sizeof(int);
	char link[PATH_MAX] = "";
	int domain, flags, r;

	flags = fcntl(fd, F_GETFL);
	if (flags < 0)
		return -errno;
	if (flags & O_PATH)
		return refuse_file(ret_refusal);
	/* What has no path belongs to no file system that could keep anyone waiting. */
	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0) {
		r = read_link(fd, link);
		if (r < 0)
			return r;
		if (strncmp(link, pipes, sizeof(pipes) - 1) == 0)
			return refuse_file(ret_refusal);
		if (strncmp(link, anonymous, sizeof(anonymous) - 1) != 0)
			return -EAGAIN;
	} else if (domain == AF_UNIX) {
		return refuse(ret_refusal, REFUSAL_NOT_SUPPORTED, "unixSocket",
			      "An AF_UNIX socket holds no pins, but could hold this connection.");
	}
	*ret = find_kind(fd, link);
	*ret_description = (struct context_description){ .proof = PROOF_CLAIMED };
	return (*ret)->describe ? -EAGAIN : 0;
}

bool context_is_of_kind(int fd, const struct context_ops *ops)
{
	char link[PATH_MAX];

	return read_link(fd, link) >= 0 && ops->identify(fd, link);
}

bool context_may_be_kept(int fd, const struct context_ops *ops)
{
	static const char anonymous[] = "anon_inode:";
	char link[PATH_MAX];

	return ops != &context_opaque ||
	       (read_link(fd, link) >= 0 && strncmp(link, anonymous, strlen(anonymous)) == 0);
}
