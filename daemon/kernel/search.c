/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/search.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/kcmp.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "daemon/kernel/process.h"
#include "protocol/macro.h"

/* Descriptor tables of one process that are told apart; beyond that a thread's may be read twice.
 */
#define TABLES_MAX 16

/* What is looked for. An inode of its own (sockets, io_urings) tells it apart from all others, and
 * is shown in mappings; what is opened by a path, or is of the anonymous inode that many share,
 * takes kcmp(). */
struct description {
	int fd;
	char link[PATH_MAX];
	uint32_t major, minor;
	uint64_t inode; /* 0: not its own */
};

static void closedirp(DIR **d)
{
	if (*d)
		closedir(*d);
}

static int read_link(int dir, const char *path, char ret[static PATH_MAX])
{
	ssize_t n = readlinkat(dir, path, ret, PATH_MAX - 1);

	if (n < 0)
		return -errno;
	ret[n] = 0;
	return 0;
}

/* Only for what no file system keeps waiting: see access.c. */
static int stat_fd(int fd, const char *path, struct statx *ret)
{
	int flags = AT_STATX_DONT_SYNC | (*path ? 0 : AT_EMPTY_PATH);

	return syscall(SYS_statx, fd, path, flags, STATX_INO, ret) < 0 ? -errno : 0;
}

static int describe(int fd, struct description *ret)
{
	static const char socket[] = "socket:[", ring[] = "anon_inode:[io_uring]";
	char path[64];
	struct statx stx;
	int r;

	*ret = (struct description){.fd = fd};
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	r = read_link(AT_FDCWD, path, ret->link);
	if (r < 0)
		return r;
	/* io_urings have one each since Linux 5.13. */
	if (strncmp(ret->link, socket, strlen(socket)) != 0 && strcmp(ret->link, ring) != 0)
		return 0;
	r = stat_fd(fd, "", &stx);
	if (r < 0)
		return r;
	ret->major = stx.stx_dev_major;
	ret->minor = stx.stx_dev_minor;
	ret->inode = stx.stx_ino;
	return 0;
}

static int kcmp(pid_t pid1, pid_t pid2, int type, int fd1, int fd2)
{
	int r = (int)syscall(SYS_kcmp, pid1, pid2, type, fd1, fd2);

	return r < 0 ? -errno : r;
}

/* For a descriptor whose link reads as ours: 1, 0, or -EACCES. */
static int is_same(const struct description *d, pid_t tid, int fd)
{
	char path[64];
	struct statx stx;
	int r;

	if (d->inode != 0) {
		snprintf(path, sizeof(path), "/proc/%d/fd/%d", tid, fd);
		return stat_fd(AT_FDCWD, path, &stx) >= 0 && stx.stx_dev_major == d->major &&
		       stx.stx_dev_minor == d->minor && stx.stx_ino == d->inode;
	}
	r = kcmp(getpid(), tid, KCMP_FILE, d->fd, fd);
	if (r >= 0)
		return r == 0;
	/* it was closed, or has ended, meanwhile */
	return r == -EBADF || r == -ESRCH ? 0 : -EACCES;
}

/* ---- One process ---- */

typedef int (*link_function)(pid_t tid, int fd, void *userdata);

/* Calls f for each descriptor of the thread whose link reads `link`. Who may list descriptors need not be one who
 * may see what they are: what is refused for one is for all. */
static int for_each_link(pid_t pid, pid_t tid, const char *link, link_function f, void *userdata)
{
	_cleanup_(closedirp) DIR *dir = NULL;
	char path[64], target[PATH_MAX];
	struct dirent *de;
	int r;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/fd", pid, tid);
	dir = opendir(path);
	if (!dir)
		return -errno;
	while ((de = readdir(dir))) {
		if (de->d_name[0] == '.')
			continue;
		r = read_link(dirfd(dir), de->d_name, target);
		/* it was closed meanwhile, or is longer than ours can be */
		if (r == -ENOENT || r == -ENAMETOOLONG || (r >= 0 && strcmp(target, link) != 0))
			continue;
		if (r >= 0)
			r = f(tid, atoi(de->d_name), userdata);
		if (r != 0)
			return r;
	}
	return 0;
}

struct tables {
	pid_t tids[TABLES_MAX]; /* a thread of each */
	size_t n;
};

/* Is it the table of a thread that has been looked at? Most programs have one for all. */
static bool is_known_table(struct tables *tables, pid_t tid)
{
	for (size_t i = 0; i < tables->n; i++)
		if (kcmp(tables->tids[i], tid, KCMP_FILES, 0, 0) == 0)
			return true;
	if (tables->n < TABLES_MAX)
		tables->tids[tables->n++] = tid;
	return false;
}

/* Of a zombie, and of a kernel thread, nothing can be seen, and nothing is to be. */
static bool has_nothing(pid_t pid, pid_t tid)
{
	struct process_stat stat;
	int r = process_read_stat(pid, tid, &stat);

	return r < 0 || strchr("ZXx", stat.state) || stat.kernel_thread;
}

/* Most of what /proc lists on a small machine are kernel threads, which have no program, as what has ended. But
 * the first thread can end before the others: there are two links to the directory of threads, and one from
 * each. */
static bool has_no_program(pid_t pid)
{
	char path[64], program;
	struct statx stx;

	snprintf(path, sizeof(path), "/proc/%d/exe", pid);
	if (readlink(path, &program, 1) >= 0 || errno != ENOENT)
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	return syscall(SYS_statx, AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_NLINK, &stx) >= 0 &&
	       stx.stx_nlink <= 3;
}

/* As for_each_link(), in the tables of all its threads. */
static int for_each_link_of(pid_t pid, const char *link, link_function f, void *userdata)
{
	_cleanup_(closedirp) DIR *dir = NULL;
	struct tables tables = {};
	struct dirent *de;
	int r, refused = 0;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return errno == ENOENT || errno == ESRCH ? 0 : -errno;
	while ((de = readdir(dir))) {
		pid_t tid = atoi(de->d_name);

		if (tid <= 0 || is_known_table(&tables, tid))
			continue;
		r = for_each_link(pid, tid, link, f, userdata);
		if (r > 0)
			return r;
		if (r < 0 && r != -ENOENT && r != -ESRCH && !has_nothing(pid, tid))
			refused = r;
	}
	return refused;
}

static int read_maps(int fd, const char *needle)
{
	_cleanup_(freep) char *buffer = malloc(65536 + 1);
	size_t n = 0;

	if (!buffer)
		return -ENOMEM;
	for (;;) {
		ssize_t k = read(fd, buffer + n, 65536 - n);
		char *line;

		if (k < 0)
			return errno == ESRCH ? 0 : -errno;
		if (k == 0)
			return 0;
		n += (size_t)k;
		buffer[n] = 0;
		if (strstr(buffer, needle))
			return 1;
		/* The last line may go on in the next piece. */
		line = memrchr(buffer, '\n', n);
		if (line) {
			n -= (size_t)(line + 1 - buffer);
			memmove(buffer, line + 1, n);
		} else if (n == 65536) {
			n = 0;
		}
	}
}

/* Does any of its mappings have the description's inode? All threads have the same, but the first
 * may have ended before the others. */
static int is_mapped(const struct description *d, pid_t pid)
{
	_cleanup_(closedirp) DIR *dir = NULL;
	char path[64], needle[64];
	struct dirent *de;
	int r = 0;

	snprintf(needle, sizeof(needle), " %02x:%02x %llu ", d->major, d->minor,
		(unsigned long long)d->inode);
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && (de = readdir(dir))) {
		_cleanup_(close_fdp) int fd = -1;
		pid_t tid = atoi(de->d_name);

		if (tid <= 0)
			continue;
		snprintf(path, sizeof(path), "/proc/%d/task/%d/maps", pid, tid);
		fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
		r = fd < 0 ? -errno : read_maps(fd, needle);
		if (r == -ENOENT || r == -ESRCH || (r <= 0 && has_nothing(pid, tid))) {
			r = 0;
			continue;
		}
		return r;
	}
	return r;
}

/* ---- All ---- */

struct look {
	const struct description *description;
	struct search *search; /* NULL: one process is enough */
	pid_t pid;
	bool unsure;
};

static int on_link(pid_t tid, int fd, void *userdata)
{
	struct look *look = userdata;
	int r = is_same(look->description, tid, fd);

	look->unsure |= r < 0;
	if (r <= 0)
		return 0;
	return look->search ? look->search->found(look->pid, look->search->userdata) : 1;
}

/* What found() has returned, 0, or a negative errno. */
static int look_into(struct look *look)
{
	const struct description *d = look->description;
	int r, refused;

	r = for_each_link_of(look->pid, d->link, on_link, look);
	if (r > 0)
		return r;
	refused = r;
	r = d->inode != 0 ? is_mapped(d, look->pid) : 0;
	if (r > 0)
		return look->search ? look->search->found(look->pid, look->search->userdata) : 1;
	if (refused < 0 || r < 0)
		return refused < 0 ? refused : r;
	return look->unsure ? -EACCES : 0;
}

int search_process(pid_t pid, int fd)
{
	struct description description;
	int r = describe(fd, &description);

	return r < 0 ? r : look_into(&(struct look){.description = &description, .pid = pid});
}

bool search_is_sure(int fd)
{
	struct description description;

	return describe(fd, &description) >= 0 && description.inode != 0;
}

bool process_holds(pid_t pid, int fd)
{
	return search_process(pid, fd) > 0;
}

/* Of the holder's uid, or started by it, as far as that can be told. But not the init process: what
 * of ours it has it has been given to keep. */
static bool is_related(pid_t pid, const struct process *holder)
{
	struct process_stat stat;
	struct uids u;

	if (process_is_manager(pid) || process_uids(pid, &u) < 0 ||
		process_read_stat(pid, 0, &stat) < 0)
		return false;
	return u.real == holder->uid || u.effective == holder->uid || u.saved == holder->uid ||
	       stat.parent == holder->pid || stat.group == holder->pid ||
	       stat.session == holder->pid;
}

static int for_each_process(int (*f)(pid_t pid, void *userdata), void *userdata)
{
	_cleanup_(closedirp) DIR *dir = opendir("/proc");
	pid_t self = getpid();
	struct dirent *de;
	int r;

	if (!dir)
		return -errno;
	while ((de = readdir(dir))) {
		pid_t pid = atoi(de->d_name);

		if (pid <= 0 || pid == self)
			continue;
		r = f(pid, userdata);
		if (r != 0)
			return r;
	}
	return 0;
}

static int look_at_process(pid_t pid, void *userdata)
{
	struct look *look = userdata;
	const struct process *holder = look->search->holder;
	int r;

	if (has_no_program(pid))
		return 0;
	look->pid = pid;
	look->unsure = false;
	r = look_into(look);
	/* What we lack ourselves says nothing of it. */
	if (r >= 0 || r == -ENOMEM || r == -EMFILE || r == -ENFILE)
		return r;
	if (holder && is_related(pid, holder))
		look->search->unseen = pid;
	return 0;
}

int search_run(struct search *search)
{
	struct description description;
	struct look look = {.description = &description, .search = search};
	int r;

	search->unseen = 0;
	/* No link reads so. */
	description = (struct description){.fd = -1, .link = ""};
	if (search->fd >= 0) {
		r = describe(search->fd, &description);
		if (r < 0)
			return r;
	}
	return for_each_process(look_at_process, &look);
}

struct link_search {
	const char *link;
	link_function f;
	void *userdata;
};

static int look_for_links(pid_t pid, void *userdata)
{
	struct link_search *s = userdata;
	int r = has_no_program(pid) ? 0 : for_each_link_of(pid, s->link, s->f, s->userdata);

	return r > 0 ? r : 0;
}

int search_links(pid_t pid, const char *link, link_function f, void *userdata)
{
	struct link_search s = {link, f, userdata};

	return pid > 0 ? look_for_links(pid, &s) : for_each_process(look_for_links, &s);
}

/* ---- What may be looked into ---- */

static struct search_powers powers;

static void find_powers(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {};

	powers.kcmp = kcmp(getpid(), getpid(), KCMP_FILE, STDERR_FILENO, STDERR_FILENO) == 0;
	powers.others = syscall(SYS_capget, &header, data) == 0 &&
			data[0].effective & 1U << CAP_SYS_PTRACE;
}

const struct search_powers *search_powers(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, find_powers);
	return &powers;
}
