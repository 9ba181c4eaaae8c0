/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <systemd/sd-login.h>

#include "protocol/macro.h"
#include "protocol/utf8.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#endif

/* linux/sched.h: a bit of field 9 in /proc/PID/stat */
#define PF_KTHREAD 0x00200000U

/* The fdinfo of an io_uring with as many buffers, and as many files, as most can have, takes 1 MiB. */
#define PROC_MAX (4U * 1024 * 1024)

static void closedirp(DIR **d)
{
	if (*d)
		closedir(*d);
}

int proc_read(char **ret, const char *format, ...)
{
	_cleanup_(close_fdp) int fd = -1;
	_cleanup_(freep) char *buffer = NULL;
	size_t n = 0, size = 4096;
	char path[128];
	va_list ap;

	va_start(ap, format);
	vsnprintf(path, sizeof(path), format, ap);
	va_end(ap);

	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (fd < 0)
		return -errno;
	for (;;) {
		ssize_t k;

		if (!buffer || n + 1 == size) {
			char *p;

			if (buffer)
				size *= 4;
			if (size > PROC_MAX)
				return -EFBIG;
			p = realloc(buffer, size);
			if (!p)
				return -ENOMEM;
			buffer = p;
		}
		k = read(fd, buffer + n, size - n - 1);
		if (k < 0)
			return -errno;
		if (k == 0)
			break;
		n += (size_t)k;
	}
	buffer[n] = 0;
	*ret = TAKE_PTR(buffer);
	return (int)n;
}

static int peer_groups(int fd, gid_t **ret, size_t *ret_n)
{
	socklen_t size = 64 * sizeof(gid_t);
	_cleanup_(freep) gid_t *groups = NULL;

	for (;;) {
		gid_t *p = realloc(groups, size);

		if (!p)
			return -ENOMEM;
		groups = p;
		if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &size) == 0)
			break;
		if (errno != ERANGE)
			return -errno;
	}
	*ret_n = size / sizeof(gid_t);
	*ret = TAKE_PTR(groups);
	return 0;
}

bool process_has_own_proc(void)
{
	char text[16];
	ssize_t n = readlink("/proc/self", text, sizeof(text) - 1);

	if (n < 0)
		return false;
	text[n] = 0;
	return strtol(text, NULL, 10) == getpid();
}

int process_from_socket(int fd, struct process *ret)
{
	struct process p = { .pidfd = -1 };
	struct ucred ucred;
	socklen_t size = sizeof(ucred);
	int r;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &ucred, &size) < 0)
		return -errno;
	p.pid = ucred.pid;
	p.uid = ucred.uid;
	p.gid = ucred.gid;

	size = sizeof(p.pidfd);
	if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &p.pidfd, &size) < 0) {
		if (errno != ENOPROTOOPT)
			return -errno;
		/* 0: of another pid namespace, which call_hello() says */
		p.pidfd = p.pid > 0 ? pidfd_open(p.pid, 0) : -1;
		if (p.pid > 0 && p.pidfd < 0)
			return -errno;
	}
	r = peer_groups(fd, &p.groups, &p.n_groups);
	if (r < 0) {
		process_clear(&p);
		return r;
	}
	*ret = p;
	return 0;
}

int process_copy(const struct process *p, struct process *ret)
{
	struct process q = *p;

	q.groups = NULL;
	q.unit = NULL;
	q.pidfd = fcntl(p->pidfd, F_DUPFD_CLOEXEC, 3);
	if (q.pidfd < 0)
		return -errno;
	q.groups = malloc((p->n_groups + 1) * sizeof(gid_t));
	if (p->unit)
		q.unit = strdup(p->unit);
	if (!q.groups || (p->unit && !q.unit)) {
		process_clear(&q);
		return -ENOMEM;
	}
	if (p->n_groups > 0)
		memcpy(q.groups, p->groups, p->n_groups * sizeof(gid_t));
	*ret = q;
	return 0;
}

void process_clear(struct process *p)
{
	p->pidfd = safe_close(p->pidfd);
	free(p->groups);
	p->groups = NULL;
	free(p->unit);
	p->unit = NULL;
}

bool process_is_alive(const struct process *p)
{
	struct pollfd pfd = { .fd = p->pidfd, .events = POLLIN };

	return poll(&pfd, 1, 0) == 0;
}

int process_read_stat(pid_t pid, pid_t tid, struct process_stat *ret)
{
	_cleanup_(freep) char *text = NULL;
	struct process_stat stat;
	unsigned flags;
	char *p;
	int r;

	r = tid == 0 ? proc_read(&text, "/proc/%d/stat", pid) : proc_read(&text, "/proc/%d/task/%d/stat", pid, tid);
	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	/* The name may hold blanks and parentheses: count from the last one. */
	p = strrchr(text, ')');
	if (!p || sscanf(p, ") %c %d %d %d %*d %*d %u", &stat.state, &stat.parent, &stat.group, &stat.session,
			 &flags) != 5)
		return -EBADMSG;
	stat.kernel_thread = flags & PF_KTHREAD;
	/* behind the parenthesis stands field 3; field 22 is the start time */
	for (int field = 2; field < 22; field++) {
		p = strchr(p, ' ');
		if (!p)
			return -EBADMSG;
		p++;
	}
	stat.start_time = strtoull(p, NULL, 10);
	*ret = stat;
	return 0;
}

static int process_stat(const struct process *p, struct process_stat *ret)
{
	int r = process_read_stat(p->pid, 0, ret);

	if (r < 0)
		return r;
	/* The number can have been another's only if ours was dead by then. */
	return process_is_alive(p) ? 0 : -ESRCH;
}

int process_reopen(struct process *p)
{
	struct process_stat stat;

	p->pidfd = pidfd_open(p->pid, 0);
	if (p->pidfd >= 0 && process_stat(p, &stat) >= 0 && stat.start_time == p->start_time)
		return 0;
	safe_close(p->pidfd);
	/* readable, as the pidfd of one that has ended is */
	p->pidfd = eventfd(1, EFD_CLOEXEC);
	return p->pidfd < 0 ? -errno : 0;
}

int process_describe(struct process *p)
{
	_cleanup_(freep) char *comm = NULL;
	_cleanup_(freep) char *unit = NULL;
	struct process_stat stat;
	int r;

	r = proc_read(&comm, "/proc/%d/comm", p->pid);
	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	comm[strcspn(comm, "\n")] = 0;
	(void)sd_pid_get_unit(p->pid, &unit);
	r = process_stat(p, &stat);
	if (r < 0)
		return r;

	p->start_time = stat.start_time;
	utf8_sanitize(comm);
	snprintf(p->comm, sizeof(p->comm), "%s", comm);
	free(p->unit);
	p->unit = TAKE_PTR(unit);
	return 0;
}

int process_uids(pid_t pid, struct uids *ret)
{
	_cleanup_(freep) char *status = NULL;
	struct uids u;
	char *line;
	int r;

	r = proc_read(&status, "/proc/%d/status", pid);
	if (r < 0)
		return r == -ENOENT ? -ESRCH : r;
	line = strstr(status, "\nUid:");
	if (!line || sscanf(line, "\nUid: %u %u %u %u", &u.real, &u.effective, &u.saved, &u.fs) != 4)
		return -EBADMSG;
	*ret = u;
	return 0;
}

bool process_is_same(const struct process *p)
{
	struct process_stat stat;
	struct uids u;

	if (process_stat(p, &stat) < 0 || stat.start_time != p->start_time)
		return false;
	/* last, as these can change at any time */
	return process_uids(p->pid, &u) >= 0 && u.real == p->uid && u.effective == p->uid &&
	       u.saved == p->uid && u.fs == p->uid;
}

bool process_is_manager(pid_t pid)
{
	const char *started = getenv("SYSTEMD_EXEC_PID"), *manager = getenv("MANAGERPID");

	if (pid == 1)
		return true;
	return pid == getppid() && ((started && atoi(started) == getpid()) ||
				    (manager && atoi(manager) == pid));
}

int process_succeed(const struct process *p, pid_t pid, struct process *ret)
{
	struct process q;
	int r;

	if (process_is_manager(pid))
		return -EPERM;
	r = process_copy(p, &q);
	if (r < 0)
		return r;
	safe_close(q.pidfd);
	q.pid = pid;
	q.pidfd = pidfd_open(pid, 0);
	r = q.pidfd < 0 ? -errno : process_describe(&q);
	if (r >= 0 && !process_is_same(&q))
		r = -EPERM;
	if (r < 0) {
		process_clear(&q);
		return r;
	}
	*ret = q;
	return 0;
}

int process_is_stopped(pid_t pid)
{
	_cleanup_(closedirp) DIR *dir = NULL;
	char path[64];
	struct dirent *de;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return errno == ENOENT ? -ESRCH : -errno;
	while ((de = readdir(dir))) {
		struct process_stat stat;
		int r;

		if (de->d_name[0] == '.')
			continue;
		r = process_read_stat(pid, atoi(de->d_name), &stat);
		if (r == -EBADMSG)
			return r;
		if (r >= 0 && !strchr("TtZXx", stat.state))
			return 0;
	}
	return 1;
}

int process_wait_stopped(pid_t pid, uint64_t end_usec)
{
	for (;;) {
		struct timespec ts = { .tv_nsec = 100000 };
		int r = process_is_stopped(pid);

		if (r != 0)
			return r < 0 ? r : 0;
		if (now_usec() >= end_usec)
			return -ETIMEDOUT;
		/* No event tells of a stop to anyone but the parent. */
		nanosleep(&ts, NULL);
	}
}
