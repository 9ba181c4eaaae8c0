/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "daemon/context/ops.h"
#include "daemon/kernel/search.h"
#include "daemon/util/closer.h"
#include "protocol/macro.h"

/*
 * The handle is the index of a fixed buffer. The ring's fdinfo lists the buffers by address and
 * length; the kernel's word that one is unregistered says little by itself, for requests in flight
 * and rings that the buffers were cloned into keep the pages.
 */

#define RING_LINK "anon_inode:[io_uring]"

/* How long a request in flight may take to end after its buffer was unregistered. */
#define IDLE_WAIT_USEC (20 * USEC_PER_MSEC)

/* How long Linux 6.1 may take to unregister all buffers: 15 to 45 ms were seen, if nothing is in flight. */
#define UNREGISTER_WAIT_USEC (250 * USEC_PER_MSEC)

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

struct buffer {
	uint32_t index;
	uint64_t address, length; /* length 0: the slot is empty */
};

/* For next_buffer(): the line before the first. */
static const char *first_buffer(const char *info)
{
	const char *line = strstr(info, "\nUserBufs:");

	return line ? line + 1 : NULL;
}

/* Returns the line that it is on, NULL if there is none any more. There can be thousands: sscanf() would look at
 * all that follow for each. */
static const char *next_buffer(const char *line, struct buffer *ret)
{
	char *end, *rest;

	line = line ? strchr(line, '\n') : NULL;
	if (!line)
		return NULL;
	*ret = (struct buffer){ .index = (uint32_t)strtoul(++line, &end, 10) };
	if (end == line || *end != ':')
		return NULL;
	ret->address = strtoull(++end, &rest, 16);
	if (rest != end && *rest == '/')
		ret->length = strtoull(rest + 1, NULL, 10);
	return line;
}

/* Those that are in use, in the order of their indices. */
struct buffers {
	struct buffer *list; /* owned */
	size_t n;
};

static void buffers_clear(struct buffers *buffers)
{
	free(buffers->list);
}

static int read_buffers(pid_t pid, int fd, struct buffers *ret)
{
	_cleanup_(freep) char *info = NULL;
	_cleanup_(buffers_clear) struct buffers buffers = {};
	const char *line;
	struct buffer b;
	size_t n = 0;
	int r;

	r = read_fdinfo(pid, fd, &info);
	if (r < 0)
		return r;
	for (line = first_buffer(info); (line = next_buffer(line, &b));)
		n += b.length > 0;
	buffers.list = calloc(n + 1, sizeof(*buffers.list));
	if (!buffers.list)
		return -ENOMEM;
	for (line = first_buffer(info); (line = next_buffer(line, &b));)
		if (b.length > 0)
			buffers.list[buffers.n++] = b;
	*ret = buffers;
	buffers.list = NULL;
	return 0;
}

static int compare_buffers(const void *a, const void *b)
{
	const struct buffer *x = a, *y = b;

	return x->index < y->index ? -1 : x->index > y->index;
}

static bool is_in(const struct buffers *buffers, const struct handle *handle)
{
	struct buffer key = { .index = (uint32_t)handle->handle };
	const struct buffer *b = bsearch(&key, buffers->list, buffers->n, sizeof(key), compare_buffers);

	return b && b->index == handle->handle && b->address == handle->identity.address &&
	       b->length == handle->identity.length;
}

static int ring_read_handle(int fd, int64_t handle, struct handle_identity *ret)
{
	_cleanup_(freep) char *info = NULL;
	const char *line;
	struct buffer b;
	int r;

	r = read_fdinfo(getpid(), fd, &info);
	if (r < 0)
		return r;
	for (line = first_buffer(info); (line = next_buffer(line, &b));) {
		if (b.index != handle || b.length == 0)
			continue;
		*ret = (struct handle_identity){ .address = b.address, .length = b.length };
		return 0;
	}
	return -ENOENT;
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

/* --- buffers cloned into other rings (Linux 6.12) --- */

#ifndef IORING_REGISTER_CLONE_BUFFERS
#define IORING_REGISTER_CLONE_BUFFERS 30
#endif

/* A clone has the address and length of its original, and is in a ring that the same process has made. Another
 * process's can look so and be its own: workers that were forked from one parent have the same addresses. */
struct clone_search {
	const struct process *holder;
	const struct handle *handles;
	size_t n_handles;
};

static bool can_have_clones(int fd)
{
	uint32_t from[8] = { UINT32_MAX }; /* struct io_uring_clone_buffers: from no descriptor */

	return ring_register(fd, IORING_REGISTER_CLONE_BUFFERS, from, 1) != -EINVAL;
}

static bool is_clone(const struct clone_search *s, uint64_t address, uint64_t length)
{
	for (size_t i = 0; i < s->n_handles; i++)
		if (!s->handles[i].keep && s->handles[i].identity.address == address &&
		    s->handles[i].identity.length == length)
			return true;
	return false;
}

static int has_clone(pid_t tid, int fd, void *userdata)
{
	const struct clone_search *s = userdata;
	_cleanup_(buffers_clear) struct buffers buffers = {};
	struct uids uids;

	/* another user's ring counts its pages to another user; or it was closed meanwhile */
	if (process_uids(tid, &uids) < 0 || uids.real != s->holder->uid || read_buffers(tid, fd, &buffers) < 0)
		return 0;
	for (size_t i = 0; i < buffers.n; i++)
		if (is_clone(s, buffers.list[i].address, buffers.list[i].length))
			return tid;
	return 0;
}

static int clear_buffer(int fd, uint32_t index)
{
	struct iovec none = {};
	struct io_uring_rsrc_update2 update = { .offset = index, .data = (uintptr_t)&none, .nr = 1 };

	return ring_register(fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
}

/* The same pages under another name: in a ring of the holder, which stands still. */
static int clear_clones(pid_t tid, int number, void *userdata)
{
	const struct clone_search *s = userdata;
	_cleanup_(close_fdp) int fd = pidfd_getfd(s->holder->pidfd, number, 0);
	_cleanup_(buffers_clear) struct buffers buffers = {};

	/* what a thread has in a table of its own cannot be had */
	if (fd < 0 || tid != s->holder->pid || read_buffers(getpid(), fd, &buffers) < 0)
		return 0;
	for (size_t i = 0; i < buffers.n; i++)
		if (is_clone(s, buffers.list[i].address, buffers.list[i].length))
			(void)clear_buffer(fd, buffers.list[i].index);
	return 0;
}

static int ring_detach(int fd, const struct process *holder, struct handle *handles,
		       size_t n_handles)
{
	struct clone_search search = { holder, handles, n_handles };
	_cleanup_(buffers_clear) struct buffers buffers = {};
	int r;

	/* Nobody who has it runs meanwhile. */
	r = read_buffers(getpid(), fd, &buffers);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_handles; i++) {
		if (handles[i].keep || !is_in(&buffers, &handles[i]))
			continue;
		r = clear_buffer(fd, (uint32_t)handles[i].handle);
		if (r < 0)
			return r;
	}
	if (!wait_until_idle(fd))
		return -EBUSY;
	if (can_have_clones(fd)) {
		if (process_is_same(holder))
			(void)search_links(holder->pid, RING_LINK, clear_clones, &search);
		r = search_links(0, RING_LINK, has_clone, &search);
		if (r != 0)
			return r < 0 ? r : -EBUSY;
	}
	for (size_t i = 0; i < n_handles; i++)
		handles[i].gone = !handles[i].keep;
	return 0;
}

static int ring_check(int fd, const struct process *holder, struct handle *handles, size_t n_handles)
{
	struct clone_search search = { holder, handles, n_handles };
	_cleanup_(buffers_clear) struct buffers buffers = {};
	bool any = false;
	int r;

	r = read_buffers(getpid(), fd, &buffers);
	if (r < 0)
		return r;
	for (size_t i = 0; i < n_handles; i++) {
		handles[i].gone = !is_in(&buffers, &handles[i]);
		any |= handles[i].gone;
	}
	if (!any || !can_have_clones(fd))
		return 0;
	for (size_t i = 0; i < n_handles; i++)
		handles[i].keep = !handles[i].gone;
	if (search_links(holder->pid, RING_LINK, has_clone, &search) <= 0)
		return 0;
	for (size_t i = 0; i < n_handles; i++)
		handles[i].gone = false;
	return -EBUSY;
}

static void ring_count(int fd, uint64_t n_bound, struct page_count *ret)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	_cleanup_(buffers_clear) struct buffers buffers = {};

	*ret = (struct page_count){};
	if (read_buffers(getpid(), fd, &buffers) < 0)
		return;
	for (size_t i = 0; i < buffers.n; i++) {
		ret->most += buffers.list[i].length / page;
		ret->least += buffers.list[i].length >= page;
	}
}

/* Linux 6.1 frees at once what is taken away together, but waits for requests in flight, as long as it takes; what is
 * taken away one by one it keeps for a second more, and a ring that is closed meanwhile, too. */
static int unregister_all(int fd)
{
	int r;

	if (!interrupts_begin(UNREGISTER_WAIT_USEC))
		return -EOPNOTSUPP;
	r = ring_register(fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
	interrupts_end();
	return r;
}

static void ring_clear(int fd)
{
	_cleanup_(buffers_clear) struct buffers buffers = {};

	if (unregister_all(fd) >= 0 || read_buffers(getpid(), fd, &buffers) < 0)
		return;
	for (size_t i = 0; i < buffers.n; i++)
		(void)clear_buffer(fd, buffers.list[i].index);
}

const struct context_ops context_io_uring = {
	.kind = "io_uring",
	.identify = ring_identify,
	.describe = ring_describe,
	.read_handle = ring_read_handle,
	.detach = ring_detach,
	.check = ring_check,
	.count = ring_count,
	.clear = ring_clear,
	/* 3 to 15 ms were seen */
	.frees_usec = 25 * USEC_PER_MSEC,
	/* more than a second in Linux 6.1, at once in 6.12 */
	.detach_frees_usec = 1500 * USEC_PER_MSEC,
};
