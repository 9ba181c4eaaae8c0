/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "context.h"
#include "macro.h"

/*
 * The handle is the index of a fixed buffer. The ring's fdinfo lists the buffers by address and
 * length; the kernel's word that one is unregistered says little by itself, for requests in flight
 * and rings that the buffers were cloned into keep the pages.
 */

#define RING_LINK "anon_inode:[io_uring]"

/* How long a request in flight may take to end after its buffer was unregistered. */
#define IDLE_WAIT_USEC (20 * USEC_PER_MSEC)

static bool ring_identify(int fd, const char *link)
{
	return strcmp(link, RING_LINK) == 0;
}

static int ring_register(int fd, unsigned opcode, void *arg, unsigned n)
{
	int r = (int)syscall(SYS_io_uring_register, fd, opcode, arg, n);

	return r < 0 ? -errno : r;
}

static int ring_describe(int fd, const struct config *config, struct context_description *ret)
{
	_Alignas(struct io_uring_probe) char probe[sizeof(struct io_uring_probe) +
						   256 * sizeof(struct io_uring_probe_op)] = {};

	*ret = (struct context_description){ .proof = PROOF_CLAIMED };
	/* EEXIST: IORING_SETUP_SINGLE_ISSUER; EACCES: restricted; EBADFD: not enabled yet. Only the
	 * ring's own task can unregister then. */
	ret->forcible = ring_register(fd, IORING_REGISTER_PROBE, probe, 256) >= 0;
	return 0;
}

/* The kernel leaves the lists out while somebody else has the ring locked; Linux 6.1 gives their
 * lengths all the same. */
static bool has_buffers_listed(const char *info)
{
	static const char key[] = "\nUserBufs:";
	const char *line = strstr(info, key);

	if (!line || strtoul(line + strlen(key), NULL, 10) == 0)
		return line;
	line = strchr(line + 1, '\n');
	return line && line[1] == ' ';
}

static int read_fdinfo(pid_t pid, int fd, char **ret)
{
	for (unsigned try = 0; try < 100; try++) {
		_cleanup_(freep) char *info = NULL;
		int r = proc_read(&info, "/proc/%d/fdinfo/%d", pid, fd);

		if (r < 0)
			return r;
		if (has_buffers_listed(info)) {
			*ret = TAKE_PTR(info);
			return 0;
		}
		usleep(100);
	}
	return -EAGAIN;
}

static int find_buffer(const char *info, int64_t index, struct handle_identity *ret)
{
	const char *line = strstr(info, "\nUserBufs:");
	unsigned long long address, length;
	long long i;

	while (line && (line = strchr(line + 1, '\n')) &&
	       sscanf(line, " %lld: %llx/%llu", &i, &address, &length) >= 1) {
		if (i != index)
			continue;
		if (sscanf(line, " %lld: %llx/%llu", &i, &address, &length) != 3)
			return -ENOENT;
		*ret = (struct handle_identity){ .address = address, .length = length };
		return 0;
	}
	return -ENOENT;
}

static int ring_read_handle(int fd, int64_t handle, struct handle_identity *ret)
{
	_cleanup_(freep) char *info = NULL;
	int r;

	r = read_fdinfo(getpid(), fd, &info);
	return r < 0 ? r : find_buffer(info, handle, ret);
}

static unsigned long info_value(const char *info, const char *key)
{
	const char *p = strstr(info, key);

	return p ? strtoul(p + strlen(key), NULL, 0) : 0;
}

/* Can a request in flight still use a fixed buffer? Requests that wait for readiness are listed with
 * their opcode; of others only the number can be told. */
static bool may_use_buffers(const char *info)
{
	const char *line = strstr(info, "\nPollList:");
	unsigned in_flight = (unsigned)info_value(info, "\nCachedSqHead:") -
			     (unsigned)info_value(info, "\nCachedCqTail:");
	unsigned op, harmless = 0;

	while (line && (line = strchr(line + 1, '\n')) && sscanf(line, " op=%u,", &op) == 1) {
		if (op == IORING_OP_READ_FIXED || op == IORING_OP_WRITE_FIXED ||
		    op >= IORING_OP_URING_CMD)
			return true;
		harmless++;
	}
	return in_flight != harmless;
}

static bool wait_until_idle(int fd)
{
	uint64_t end = now_usec() + IDLE_WAIT_USEC;

	for (;;) {
		_cleanup_(freep) char *info = NULL;

		if (read_fdinfo(getpid(), fd, &info) < 0)
			return false;
		if (!may_use_buffers(info))
			return true;
		if (now_usec() >= end)
			return false;
		usleep(500);
	}
}

struct clone_search {
	const struct handle *handles;
	size_t n_handles;
};

static int has_clone(pid_t pid, int fd, void *userdata)
{
	const struct clone_search *s = userdata;
	_cleanup_(freep) char *info = NULL;

	if (read_fdinfo(pid, fd, &info) < 0)
		return 0;
	for (size_t i = 0; i < s->n_handles; i++) {
		char line[64];

		if (s->handles[i].keep)
			continue;

		snprintf(line, sizeof(line), ": 0x%llx/%llu\n",
			 (unsigned long long)s->handles[i].identity.address,
			 (unsigned long long)s->handles[i].identity.length);
		if (strstr(info, line))
			return pid;
	}
	return 0;
}

static int ring_detach(int fd, const struct process *holder, struct handle *handles,
		       size_t n_handles)
{
	struct clone_search search = { handles, n_handles };
	int r;

	for (size_t i = 0; i < n_handles; i++) {
		struct iovec none = {};
		struct io_uring_rsrc_update2 update = {
			.offset = (uint32_t)handles[i].handle,
			.data = (uintptr_t)&none,
			.nr = 1,
		};
		struct handle_identity now;

		if (handles[i].keep)
			continue;
		r = ring_read_handle(fd, handles[i].handle, &now);
		if (r == 0 && handle_identity_equal(&now, &handles[i].identity))
			r = ring_register(fd, IORING_REGISTER_BUFFERS_UPDATE, &update,
					  sizeof(update));
		if (r < 0 && r != -ENOENT)
			return r;
	}
	if (!wait_until_idle(fd))
		return -EBUSY;
	r = process_for_each_fd(holder->uid, RING_LINK, has_clone, &search);
	if (r != 0)
		return r < 0 ? r : -EBUSY;
	for (size_t i = 0; i < n_handles; i++)
		handles[i].gone = !handles[i].keep;
	return 0;
}

static int ring_check(int fd, struct handle *handles, size_t n_handles)
{
	_cleanup_(freep) char *info = NULL;
	int r;

	r = read_fdinfo(getpid(), fd, &info);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_handles; i++) {
		struct handle_identity now;

		handles[i].gone = find_buffer(info, handles[i].handle, &now) < 0 ||
				  !handle_identity_equal(&now, &handles[i].identity);
	}
	return 0;
}

const struct context_ops context_io_uring = {
	.kind = "io_uring",
	.identify = ring_identify,
	.describe = ring_describe,
	.read_handle = ring_read_handle,
	.detach = ring_detach,
	.check = ring_check,
	/* 3 to 15 ms were seen */
	.frees_usec = 25 * USEC_PER_MSEC,
	/* more than a second in Linux 6.1, at once in 6.12 */
	.detach_frees_usec = 1500 * USEC_PER_MSEC,
};
