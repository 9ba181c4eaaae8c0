/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/access.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/stat.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "daemon/kernel/mount.h"
#include "protocol/macro.h"
#include "protocol/utf8.h"

/* On the calling thread alone: glibc has no wrapper for the system call, and needs none. */
static int set_dac_capabilities(bool on)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = {};
	const uint32_t dac = 1U << CAP_DAC_OVERRIDE | 1U << CAP_DAC_READ_SEARCH;

	if (syscall(SYS_capget, &header, data) < 0)
		return -errno;
	data[0].effective &= ~dac;
	if (on)
		data[0].effective |= data[0].permitted & dac;
	return syscall(SYS_capset, &header, data) < 0 ? -errno : 0;
}

static void become_self(void)
{
	if (geteuid() == 0) {
		setfsuid(0);
		setfsgid(0);
		(void)syscall(SYS_setgroups, 0, NULL);
	}
	(void)set_dac_capabilities(true);
}

/* Takes on a client's credentials, on this thread alone (glibc's setgroups() changes all). Whoever the
 * client is, no capability decides for the kernel: setfsuid() drops them only when it leaves 0. */
static int become(const struct process *client, struct refusal *ret_refusal)
{
	if (geteuid() != 0 && client->uid != geteuid())
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "otherUser",
			      "This broker runs as uid %u and serves that user's files only.",
			      geteuid());
	if (geteuid() == 0) {
		if (syscall(SYS_setgroups, client->n_groups, client->groups) < 0)
			return -errno;
		setfsgid(client->gid);
		setfsuid(client->uid);
		if ((uid_t)setfsuid((uid_t)-1) != client->uid ||
		    (gid_t)setfsgid((gid_t)-1) != client->gid) {
			become_self();
			return -EPERM;
		}
	}
	return set_dac_capabilities(false);
}

static const char *type_name(mode_t mode)
{
	if (S_ISDIR(mode))
		return "directory";
	if (S_ISCHR(mode))
		return "characterDevice";
	if (S_ISBLK(mode))
		return "blockDevice";
	if (S_ISFIFO(mode))
		return "pipe";
	if (S_ISSOCK(mode))
		return "socket";
	if (S_ISLNK(mode))
		return "symbolicLink";
	return "notAFile";
}

static int refuse_file(struct refusal *ret, const char *cause, const struct probe *probe,
		       const char *message)
{
	refuse(ret, REFUSAL_NOT_LEASABLE, cause, "%s", message);
	snprintf(ret->file_system, sizeof(ret->file_system), "%s", probe->file_system);
	return REFUSED;
}

/* Its mount is in no table. */
static bool is_memfd(const struct probe *probe)
{
	static const char prefix[] = "/memfd:";

	return strncmp(probe->path, prefix, strlen(prefix)) == 0;
}

/* Mount ids of other mount namespaces are in no table but the client's own; and even that lists no mount that its
 * root hides, or that a descriptor from elsewhere is on. Then the file is asked, which can wait for whoever
 * serves it, on a thread of the client's user. */
static int find_file_system(int fd, uint64_t mount_id, const struct process *client,
			    char *const *file_systems, struct probe *probe)
{
	int r = mount_find(client, mount_id, probe->file_system, sizeof(probe->file_system),
			   &probe->mount_device);

	if (r != -ENOENT || is_memfd(probe))
		return r;
	return mount_find_of_file(fd, file_systems, probe->file_system, sizeof(probe->file_system));
}

static int find_path(int fd, struct probe *probe)
{
	char path[64], link[PATH_MAX];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, link, sizeof(link) - 1);
	if (n < 0)
		return -errno;
	link[n] = 0;
	utf8_sanitize(link);
	probe->path = strdup(link);
	return probe->path ? 0 : -ENOMEM;
}

/* Where the node of a device lies, matters only in that it must not be with somebody else's process. */
static bool is_accepted(const struct probe *p, char *const *file_systems)
{
	for (char *const *name = file_systems; *name; name++)
		if (strcmp(*name, p->file_system) == 0)
			return true;
	return p->backing.kind == BACKING_DEVICE_DAX && strcmp(p->file_system, "devtmpfs") == 0;
}

static int probe_file(int fd, const struct process *client, char *const *file_systems,
		      struct probe *p, struct refusal *ret_refusal)
{
	struct statx stx;
	int r;

	/* On a FUSE file even fstat() waits for its server, statx() with this flag does not. */
	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT,
		    STATX_TYPE | STATX_UID | STATX_INO | STATX_SIZE | STATX_MNT_ID, &stx) < 0)
		return -errno;
	p->device = makedev(stx.stx_dev_major, stx.stx_dev_minor);
	p->inode = stx.stx_ino;
	p->owner = stx.stx_uid;
	p->size = stx.stx_size;
	r = find_path(fd, p);
	if (r < 0)
		return r;

	if (S_ISCHR(stx.stx_mode))
		r = backing_find_device(makedev(stx.stx_rdev_major, stx.stx_rdev_minor),
					&p->backing, &p->size);
	else if (!S_ISREG(stx.stx_mode))
		r = -ENODEV;
	if (r == -ENODEV)
		return refuse_file(ret_refusal, type_name(stx.stx_mode), p,
				   "Only regular files can be put under a lease.");
	if (r < 0)
		return r;
	if (!(stx.stx_mask & STATX_MNT_ID))
		return -EOPNOTSUPP;
	p->mount = stx.stx_mnt_id;
	p->mount_device = p->device;
	r = find_file_system(fd, stx.stx_mnt_id, client, file_systems, p);
	if (r == -ENOENT && is_memfd(p))
		return refuse_file(ret_refusal, "memfd", p,
				   "Leases do not protect a memfd; seal it with F_SEAL_SHRINK.");
	if (r == -ENOENT)
		return refuse_file(ret_refusal, "mount", p,
				   "The file's mount is not in the caller's mount table, and its file "
				   "system is of no known type.");
	if (r < 0)
		return r;
	if (!is_accepted(p, file_systems))
		return refuse_file(ret_refusal, "fileSystem", p,
				   "The file system is not in FileSystems= of pinbroker.conf.");
	if (S_ISREG(stx.stx_mode))
		backing_find(p->device, p->file_system, stx.stx_attributes & STATX_ATTR_DAX,
			     &p->backing);
	return 0;
}

int access_probe(int fd, const struct process *client, char *const *file_systems,
		 struct probe *ret, struct refusal *ret_refusal)
{
	struct probe p = {};
	int r;

	r = probe_file(fd, client, file_systems, &p, ret_refusal);
	if (r != 0) {
		probe_clear(&p);
		return r;
	}
	*ret = p;
	return 0;
}

void probe_clear(struct probe *probe)
{
	free(probe->path);
	probe->path = NULL;
}

static int check_as(int fd, const struct process *client, int mode, struct refusal *ret_refusal)
{
	int r;

	r = become(client, ret_refusal);
	if (r != 0)
		return r;
	if (syscall(SYS_faccessat2, fd, "", mode, AT_EMPTY_PATH | AT_EACCESS) < 0)
		r = -errno;
	become_self();
	return r;
}

int access_check_lease(int fd, const struct process *client, const struct probe *probe,
		       enum leases leases, struct refusal *ret_refusal)
{
	int r;

	if (client->uid == 0 || client->uid == probe->owner ||
	    !backing_needs_lease(&probe->backing))
		return 0;
	if (leases == LEASES_OWNER)
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "notOwner",
			      "Only the owner may have %s put under a lease (Leases=owner).",
			      probe->path);
	r = check_as(fd, client, W_OK, ret_refusal);
	if (r == -EACCES || r == -EROFS || r == -EPERM)
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "notWritable",
			      "A lease holds up writers: it needs the right to write %s.",
			      probe->path);
	return r;
}

static int refuse_open(struct refusal *ret, int error, enum access access)
{
	return refuse(ret, REFUSAL_NOT_ALLOWED, "access", "You may not open the file for %s: %s.",
		      access == ACCESS_WRITE ? "writing" : "reading", strerror(error));
}

int access_check_descriptor(int fd, enum access access, struct refusal *ret_refusal)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -errno;
	if (flags & O_PATH || (flags & O_ACCMODE) == O_WRONLY ||
	    (access == ACCESS_WRITE && (flags & O_ACCMODE) != O_RDWR))
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "descriptor",
			      "RequireOpenDescriptor= is set: send a descriptor that is open for %s.",
			      access == ACCESS_WRITE ? "reading and writing" : "reading");
	return 0;
}

/* The kernel opens such a file for writing with O_APPEND alone, which faccessat2() does not know. */
static int check_append_only(int fd)
{
	struct statx stx;

	if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0,
		    &stx) < 0)
		return -errno;
	return stx.stx_attributes & STATX_ATTR_APPEND ? -EPERM : 0;
}

int access_check_open(int fd, const struct process *client, enum access access,
		      struct refusal *ret_refusal)
{
	int r;

	r = check_as(fd, client, access == ACCESS_WRITE ? R_OK | W_OK : R_OK, ret_refusal);
	if (r == 0 && access == ACCESS_WRITE)
		r = check_append_only(fd);
	if (r == -EACCES || r == -EROFS || r == -EPERM)
		return refuse_open(ret_refusal, -r, access);
	return r;
}

int access_open(int fd, const struct process *client, enum access access,
		const struct probe *probe, int *ret_fd, struct refusal *ret_refusal)
{
	_cleanup_(close_fdp) int opened = -1;
	struct stat st;
	char path[64];
	int r;

	r = become(client, ret_refusal);
	if (r != 0)
		return r;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	opened = open(path, (access == ACCESS_WRITE ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_CLOEXEC |
				    O_NOCTTY);
	if (opened < 0)
		r = -errno;
	become_self();
	if (r == -EACCES || r == -EROFS || r == -EPERM || r == -ETXTBSY)
		return refuse_open(ret_refusal, -r, access);
	if (r == -EWOULDBLOCK)
		return refuse(ret_refusal, REFUSAL_BUSY, "otherLease",
			      "Another program holds a lease on the file, which is now being broken.");
	if (r != 0)
		return r;
	if (fstat(opened, &st) < 0)
		return -errno;
	if (st.st_dev != probe->device || st.st_ino != probe->inode ||
	    !(backing_needs_lease(&probe->backing) ? S_ISREG(st.st_mode) : S_ISCHR(st.st_mode)))
		return -ESTALE;
	/* O_NONBLOCK was for the leases of others only. */
	if (fcntl(opened, F_SETFL, 0) < 0)
		return -errno;
	*ret_fd = TAKE_FD(opened);
	return 0;
}
