/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/blame.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "daemon/core/broker.h"
#include "daemon/kernel/process.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"
#include "protocol/utf8.h"

#define BATCH_MAX 64

/* A holder that lets go at once is not kept from it by the search for who made him; nor could that find
 * anybody in time. */
#define LOOK_USEC (1 * USEC_PER_MSEC)
/* Who opened without waiting is not found. Another may come who waits, of which there is no signal. */
#define AGAIN_USEC (1 * USEC_PER_SEC)

struct suspect {
	uint64_t file;
	struct inode_key key;
	struct lease_line line; /* as /proc/locks has it: on btrfs other files can have the same */
	char name[64];   /* the last component of the path, cut off */
	pid_t breakers[BREAKERS_MAX];
	size_t n_breakers;
	struct conflict who; /* the first breaker */
};

struct blame_job {
	struct job job;
	struct blame *blame;
	size_t n_suspects;
	struct suspect suspects[BATCH_MAX];
};

struct blame {
	struct broker *broker;
	struct blame_job *running;
	struct blame_job *next; /* collects what is asked meanwhile */
	sd_event_source *timer; /* enabled: the next is to begin */
};

static bool is_line_of(const struct lease_line *line, const struct suspect *suspect)
{
	const struct lease_line *own = &suspect->line;

	return own->pid == line->pid && own->device == line->device && own->inode == line->inode;
}

static void add_breaker(struct blame_job *j, const struct lease_line *line, pid_t pid)
{
	for (size_t i = 0; i < j->n_suspects; i++) {
		struct suspect *s = &j->suspects[i];

		if (is_line_of(line, s) && s->n_breakers < BREAKERS_MAX)
			s->breakers[s->n_breakers++] = pid;
	}
}

/* A lease of ours, and below it those who wait for it, each nested one deeper:
 *     1: LEASE  BREAKING  UNLCK 5531 00:1b:3 0 EOF
 *     1: -> LEASE  BREAKER   WRITE 5572 <none>:0 0 EOF */
static void read_locks(struct blame_job *j)
{
	struct lease_line lease = {}, none = {};
	char *line = NULL;
	size_t size = 0;
	FILE *f;

	f = fopen("/proc/locks", "re");
	if (!f)
		return;
	while (getline(&line, &size, f) > 0) {
		unsigned major, minor;
		pid_t pid;

		if (sscanf(line, "%*d: LEASE %*s %*s %d %x:%x:%" SCNu64, &lease.pid, &major, &minor,
			   &lease.inode) == 4)
			lease.device = makedev(major, minor);
		else if (sscanf(line, "%*d: -> LEASE BREAKER WRITE %d", &pid) == 1)
			add_breaker(j, &lease, pid);
		else if (!strstr(line, "->"))
			lease = none;
	}
	free(line);
	fclose(f);
}

static bool read_memory(pid_t pid, uint64_t address, void *ret, size_t size)
{
	struct iovec local = { ret, size }, remote = { (void *)(uintptr_t)address, size };

	return process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)size;
}

/* A path in another process, as far as it can be read. */
static void read_path(pid_t pid, uint64_t address, char ret[static PATH_MAX])
{
	size_t n = 0;

	while (n + 1 < PATH_MAX && read_memory(pid, address + n, &ret[n], 1) && ret[n])
		n++;
	ret[n] = 0;
}

/* Does the path lead another process to another file? It has just been walked, so that nothing has to be waited
 * for; else it is not known. */
static bool leads_elsewhere(pid_t pid, int directory, const char *path, const struct inode_key *key)
{
	struct open_how how = { .flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_CACHED };
	_cleanup_(close_fdp) int from = -1;
	_cleanup_(close_fdp) int fd = -1;
	struct statx stx;
	char link[64];

	how.resolve |= *path == '/' ? RESOLVE_IN_ROOT : RESOLVE_BENEATH;
	if (*path == '/')
		snprintf(link, sizeof(link), "/proc/%d/root", pid);
	else if (directory == AT_FDCWD)
		snprintf(link, sizeof(link), "/proc/%d/cwd", pid);
	else
		snprintf(link, sizeof(link), "/proc/%d/fd/%d", pid, directory);
	from = open(link, O_PATH | O_CLOEXEC);
	fd = from < 0 ? -1 : (int)syscall(SYS_openat2, from, path, &how, sizeof(how));
	if (fd < 0 || syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, &stx) < 0)
		return false;
	return stx.stx_ino != key->inode ||
	       makedev(stx.stx_dev_major, stx.stx_dev_minor) != key->device;
}

static bool flags_break(uint64_t flags)
{
	return flags & O_TRUNC || (flags & O_ACCMODE) != O_RDONLY;
}

/* Does this system call break a lease as a writer? */
static bool read_syscall(pid_t pid, const char *text, struct conflict *ret, int *ret_directory,
			 uint64_t *ret_path)
{
	uint64_t nr, arg[4], flags = 0;
	struct open_how how;

	if (sscanf(text, "%" SCNu64 " %" SCNx64 " %" SCNx64 " %" SCNx64 " %" SCNx64, &nr, &arg[0],
		   &arg[1], &arg[2], &arg[3]) != 5)
		return false;
	*ret = conflict_new(CAUSE_OPEN);
	*ret_directory = AT_FDCWD;
	*ret_path = arg[0];
	switch (nr) {
	case SYS_truncate:
		ret->cause = CAUSE_TRUNCATE;
		ret->size = (int64_t)arg[1];
		ret->offset = arg[1];
		return true;
#ifdef SYS_creat
	case SYS_creat:
		flags = O_WRONLY | O_TRUNC;
		break;
#endif
#ifdef SYS_open
	case SYS_open:
		flags = arg[1];
		break;
#endif
	case SYS_openat:
		*ret_directory = (int)arg[0];
		*ret_path = arg[1];
		flags = arg[2];
		break;
	case SYS_openat2:
		*ret_directory = (int)arg[0];
		*ret_path = arg[1];
		if (!read_memory(pid, arg[2], &how, sizeof(how)))
			return false;
		flags = how.flags;
		break;
	default:
		return false;
	}
	if (flags & O_TRUNC) {
		ret->cause = CAUSE_TRUNCATE;
		ret->size = 0;
	}
	return flags_break(flags);
}

/* /proc/locks names the process; one of its threads is blocked in the call. False: on other files alone. */
static bool read_calls(pid_t pid, const struct suspect *suspect, struct conflict *ret)
{
	bool found = false, sure = false, elsewhere = false;
	struct dirent *de;
	char path[PATH_MAX];
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && !sure && (de = readdir(dir))) {
		_cleanup_(freep) char *text = NULL;
		struct conflict c;
		const char *name;
		uint64_t address;
		int directory;

		if (de->d_name[0] == '.' ||
		    proc_read(&text, "/proc/%d/task/%s/syscall", pid, de->d_name) < 0 ||
		    !read_syscall(pid, text, &c, &directory, &address))
			continue;
		read_path(pid, address, path);
		if (suspect->line.device != suspect->key.device &&
		    leads_elsewhere(pid, directory, path, &suspect->key)) {
			elsewhere = true;
			continue;
		}
		/* Several may be blocked on several files: the name tells them apart. */
		name = strrchr(path, '/');
		sure = strncmp(name ? name + 1 : path, suspect->name, sizeof(suspect->name) - 1) == 0;
		if (!found || sure)
			*ret = c;
		found = true;
	}
	if (dir)
		closedir(dir);
	return found || !elsewhere;
}

static bool look_at(pid_t pid, const struct suspect *suspect, struct conflict *ret)
{
	_cleanup_(freep) char *comm = NULL;
	struct conflict who = conflict_new(CAUSE_MODIFY);
	struct uids uids;

	if (!read_calls(pid, suspect, &who))
		return false;
	if (proc_read(&comm, "/proc/%d/comm", pid) >= 0) {
		comm[strcspn(comm, "\n")] = 0;
		utf8_sanitize(comm);
		snprintf(who.comm, sizeof(who.comm), "%s", comm);
	}
	if (process_uids(pid, &uids) >= 0)
		who.uid = uids.real;
	who.pid = pid;
	*ret = who;
	return true;
}

/* Leaves those that break this lease, and not another with the same line. */
static void sift_breakers(struct suspect *s)
{
	size_t n = 0;

	for (size_t i = 0; i < s->n_breakers; i++) {
		struct conflict who;

		if (!look_at(s->breakers[i], s, &who))
			continue;
		if (n == 0)
			s->who = who;
		s->breakers[n++] = s->breakers[i];
	}
	s->n_breakers = n;
}

static void blame_run(struct job *job)
{
	struct blame_job *j = container_of(job, struct blame_job, job);

	read_locks(j);
	for (size_t i = 0; i < j->n_suspects; i++)
		sift_breakers(&j->suspects[i]);
}

/* Those who still wait for an answer. */
static void drop_ended(struct blame_job *j)
{
	size_t n = 0;

	for (size_t i = 0; i < j->n_suspects; i++) {
		const struct file *file = broker_find_file(j->blame->broker, j->suspects[i].file);

		if (file && file->revocation)
			j->suspects[n++] = j->suspects[i];
	}
	j->n_suspects = n;
}

static int on_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct blame *blame = userdata;

	if (!blame->next || blame->running)
		return 0;
	drop_ended(blame->next);
	if (blame->next->n_suspects == 0)
		return 0;
	blame->running = TAKE_PTR(blame->next);
	offload_submit_force(blame->broker->offload, NULL, &blame->running->job);
	return 0;
}

static void blame_done(struct job *job);

static void look_later(struct blame *blame, uint64_t usec)
{
	uint64_t due;

	if (sd_event_source_get_enabled(blame->timer, NULL) > 0 &&
	    sd_event_source_get_time(blame->timer, &due) >= 0 && due <= now_usec() + usec)
		return;
	if (sd_event_source_set_time_relative(blame->timer, usec) < 0 ||
	    sd_event_source_set_enabled(blame->timer, SD_EVENT_ONESHOT) < 0)
		(void)on_timer(blame->timer, 0, blame);
}

static void add_suspect(struct blame *blame, const struct file *file)
{
	const char *name = strrchr(file->path, '/');
	struct suspect *s;

	if (!blame->next) {
		blame->next = calloc(1, sizeof(*blame->next));
		if (!blame->next) {
			log_errno(LOG_WARNING, ENOMEM, "Cannot find out who wants %s", file->path);
			return;
		}
		blame->next->blame = blame;
		blame->next->job.run = blame_run;
		blame->next->job.done = blame_done;
	}
	if (blame->next->n_suspects == BATCH_MAX) {
		log_debug("Not looking who wants %s: too many at once.", file->path);
		return;
	}
	s = &blame->next->suspects[blame->next->n_suspects++];
	s->file = file->id;
	s->key = file->key;
	/* Whose line is not found has no lease any more, and nobody who waits for it. */
	if (lease_find_line(&file->lease, &s->line) <= 0)
		s->line = (struct lease_line){};
	snprintf(s->name, sizeof(s->name), "%s", name ? name + 1 : file->path);
}

static void blame_done(struct job *job)
{
	struct blame_job *j = container_of(job, struct blame_job, job);
	struct blame *blame = j->blame;

	bool more = blame->next && blame->next->n_suspects > 0;

	blame->running = NULL;
	for (size_t i = 0; i < j->n_suspects; i++) {
		const struct suspect *s = &j->suspects[i];
		struct file *file = broker_find_file(blame->broker, s->file);

		if (!file || !file->revocation)
			continue;
		if (s->n_breakers > 0)
			revocation_blame(file->revocation, &s->who, s->breakers, s->n_breakers);
		else
			add_suspect(blame, file);
	}
	free(j);
	if (blame->next && blame->next->n_suspects > 0)
		look_later(blame, more ? LOOK_USEC : AGAIN_USEC);
}

int blame_new(struct broker *broker, struct blame **ret)
{
	struct blame *blame = calloc(1, sizeof(*blame));
	int r;

	if (!blame)
		return -ENOMEM;
	r = sd_event_add_time(broker->event, &blame->timer, CLOCK_MONOTONIC, 0, 1, on_timer, blame);
	if (r >= 0)
		r = sd_event_source_set_enabled(blame->timer, SD_EVENT_OFF);
	if (r < 0) {
		blame_free(blame);
		return r;
	}
	blame->broker = broker;
	*ret = blame;
	return 0;
}

struct blame *blame_free(struct blame *blame)
{
	if (!blame)
		return NULL;
	sd_event_source_disable_unref(blame->timer);
	free(blame->next);
	free(blame);
	return NULL;
}

void blame_request(struct blame *blame, const struct file *file)
{
	add_suspect(blame, file);
	if (blame->next && !blame->running)
		look_later(blame, LOOK_USEC);
}
