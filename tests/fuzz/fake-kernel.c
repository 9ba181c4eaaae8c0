/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fake-kernel.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <systemd/sd-event.h>

#include "daemon/kernel/access.h"
#include "daemon/kernel/process.h"
#include "daemon/kernel/search.h"
#include "protocol/macro.h"

#define FILE_SIZE 65536

struct fake_kernel kernel;

/* ---- Time: sd-event's timers are due at once, or never ---- */

static struct timer {
	sd_event_source *source;
	uint64_t usec;
} * timers; /* owned */
static size_t n_timers, n_timers_allocated;

int __real_clock_gettime(clockid_t clock, struct timespec *ret);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ret);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ret)
{
	/* before the first input, and outside of any, somebody else may be asking */
	if ((clock != CLOCK_MONOTONIC && clock != CLOCK_THREAD_CPUTIME_ID) || kernel.now_usec == 0)
		return __real_clock_gettime(clock, ret);
	kernel.now_usec += kernel.tick_usec;
	ret->tv_sec = (time_t)(kernel.now_usec / USEC_PER_SEC);
	ret->tv_nsec = (long)(kernel.now_usec % USEC_PER_SEC) * 1000;
	return 0;
}

int __real_sd_event_source_set_time(sd_event_source *source, uint64_t usec);
int __wrap_sd_event_source_set_time(sd_event_source *source, uint64_t usec);

/* In order of their time, all of them long ago for the real clock. */
static int arm(const struct timer *timer)
{
	uint64_t usec = timer->usec <= kernel.now_usec ? timer->usec / USEC_PER_SEC : UINT64_MAX;

	return __real_sd_event_source_set_time(timer->source, usec);
}

static struct timer *find_timer(sd_event_source *source)
{
	size_t i = 0;

	while (i < n_timers && timers[i].source != source)
		i++;
	if (i == n_timers_allocated) {
		n_timers_allocated = 2 * n_timers_allocated + 64;
		timers = realloc(timers, n_timers_allocated * sizeof(*timers));
		if (!timers)
			abort();
	}
	if (i == n_timers)
		timers[n_timers++] = (struct timer){.source = source};
	return &timers[i];
}

int __wrap_sd_event_source_set_time(sd_event_source *source, uint64_t usec)
{
	struct timer *timer = find_timer(source);

	timer->usec = usec;
	return arm(timer);
}

int __wrap_sd_event_source_set_time_relative(sd_event_source *source, uint64_t usec);
int __wrap_sd_event_source_set_time_relative(sd_event_source *source, uint64_t usec)
{
	return __wrap_sd_event_source_set_time(source, kernel.now_usec + usec);
}

int __real_sd_event_add_time(sd_event *event, sd_event_source **ret, clockid_t clock, uint64_t usec,
	uint64_t accuracy, sd_event_time_handler_t callback, void *userdata);
int __wrap_sd_event_add_time(sd_event *event, sd_event_source **ret, clockid_t clock, uint64_t usec,
	uint64_t accuracy, sd_event_time_handler_t callback, void *userdata);
int __wrap_sd_event_add_time(sd_event *event, sd_event_source **ret, clockid_t clock, uint64_t usec,
	uint64_t accuracy, sd_event_time_handler_t callback, void *userdata)
{
	int r = __real_sd_event_add_time(event, ret, clock, UINT64_MAX, 1, callback, userdata);

	return r < 0 ? r : __wrap_sd_event_source_set_time(*ret, usec);
}

int __wrap_sd_event_add_time_relative(sd_event *event, sd_event_source **ret, clockid_t clock,
	uint64_t usec, uint64_t accuracy, sd_event_time_handler_t callback, void *userdata);
int __wrap_sd_event_add_time_relative(sd_event *event, sd_event_source **ret, clockid_t clock,
	uint64_t usec, uint64_t accuracy, sd_event_time_handler_t callback, void *userdata)
{
	return __wrap_sd_event_add_time(
		event, ret, clock, kernel.now_usec + usec, accuracy, callback, userdata);
}

sd_event_source *__real_sd_event_source_disable_unref(sd_event_source *source);
sd_event_source *__wrap_sd_event_source_disable_unref(sd_event_source *source);
sd_event_source *__wrap_sd_event_source_disable_unref(sd_event_source *source)
{
	for (size_t i = 0; i < n_timers; i++)
		if (timers[i].source == source) {
			timers[i] = timers[--n_timers];
			break;
		}
	return __real_sd_event_source_disable_unref(source);
}

void kernel_pass_time(uint64_t usec)
{
	kernel.now_usec += usec;
	for (size_t i = 0; i < n_timers; i++)
		if (timers[i].usec <= kernel.now_usec && arm(&timers[i]) < 0)
			abort();
}

/* ---- Chance: there is none ---- */

ssize_t __wrap_getrandom(void *buffer, size_t size, unsigned flags);
ssize_t __wrap_getrandom(void *buffer, size_t size, unsigned flags)
{
	memset(buffer, 0, size);
	return (ssize_t)size;
}

/* ---- Processes ---- */

/* One of all file systems. */
static uint64_t inode_of(int fd)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		abort();
	return (uint64_t)st.st_dev << 40 | st.st_ino;
}

static struct fake_process *find_process(pid_t pid)
{
	size_t i = (size_t)(pid - FIRST_PID);

	return i < N_PROCESSES ? &kernel.processes[i] : NULL;
}

static struct fake_process *find_pidfd(int pidfd)
{
	uint64_t inode = inode_of(pidfd);

	for (size_t i = 0; i < N_PROCESSES; i++)
		if (kernel.processes[i].inode == inode)
			return &kernel.processes[i];
	return NULL;
}

void kernel_kill(struct fake_process *p)
{
	if (!p->dead && write(p->pipe[1], "", 1) != 1)
		abort();
	p->dead = true;
}

static void become(struct process *p, const struct fake_process *fake)
{
	p->pid = fake->pid;
	p->start_time = (uint64_t)fake->pid;
	snprintf(p->comm, sizeof(p->comm), "fake");
}

static struct {
	int fd;
	struct fake_process *process;
} backlog[8];
static size_t n_backlog, i_backlog;
static int backlog_fd = -1; /* not owned */
static struct fake_process *accepted;

int kernel_listen(void)
{
	backlog_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (backlog_fd < 0)
		abort();
	return backlog_fd;
}

void kernel_connect(int fd, struct fake_process *process)
{
	if (n_backlog == ELEMENTS(backlog)) {
		close(fd);
		return;
	}
	backlog[n_backlog].fd = fd;
	backlog[n_backlog++].process = process;
	if (eventfd_write(backlog_fd, 1) < 0)
		abort();
}

void kernel_close_backlog(void)
{
	while (i_backlog < n_backlog)
		close(backlog[i_backlog++].fd);
	i_backlog = n_backlog = 0;
}

int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags);
int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
	eventfd_t value;

	if (i_backlog == n_backlog) {
		i_backlog = n_backlog = 0;
		(void)eventfd_read(fd, &value);
		errno = EAGAIN;
		return -1;
	}
	accepted = backlog[i_backlog].process;
	return backlog[i_backlog++].fd;
}

int __wrap_process_from_socket(int fd, struct process *ret);
int __wrap_process_from_socket(int fd, struct process *ret)
{
	*ret = (struct process){.uid = accepted->uid, .gid = accepted->uid};
	become(ret, accepted);
	ret->pidfd = fcntl(accepted->pipe[0], F_DUPFD_CLOEXEC, 3);
	return ret->pidfd < 0 ? -errno : 0;
}

int __wrap_process_describe(struct process *p);
int __wrap_process_describe(struct process *p)
{
	const struct fake_process *fake = find_process(p->pid);

	if (fake->dead)
		return -ESRCH;
	become(p, fake);
	return 0;
}

bool __wrap_process_is_same(const struct process *p);
bool __wrap_process_is_same(const struct process *p)
{
	const struct fake_process *fake = find_process(p->pid);

	return !fake->dead && !fake->changed && fake->uid == p->uid;
}

int __wrap_process_succeed(const struct process *p, pid_t pid, struct process *ret);
int __wrap_process_succeed(const struct process *p, pid_t pid, struct process *ret)
{
	const struct fake_process *fake = find_process(pid);
	int r;

	if (fake->dead || fake->changed || fake->uid != p->uid)
		return -EPERM;
	r = process_copy(p, ret);
	if (r < 0)
		return r;
	close(ret->pidfd);
	ret->pidfd = fcntl(fake->pipe[0], F_DUPFD_CLOEXEC, 3);
	become(ret, fake);
	return ret->pidfd < 0 ? -errno : 0;
}

int search_process(pid_t pid, int fd)
{
	const struct fake_process *fake = find_process(pid);

	return !fake->dead && fake->holds;
}

bool search_is_sure(int fd)
{
	return true;
}

bool process_holds(pid_t pid, int fd)
{
	return search_process(pid, fd) > 0;
}

int search_run(struct search *search)
{
	int r = kernel.cannot_search ? -EMFILE : 0;

	search->unseen = 0;
	for (size_t i = 0; i < N_PROCESSES && r == 0; i++)
		if (search->fd >= 0 && process_holds(kernel.processes[i].pid, search->fd))
			r = search->found(kernel.processes[i].pid, search->userdata);
	return r;
}

int __wrap_pidfd_send_signal(int pidfd, int sig, siginfo_t *info, unsigned flags);
int __wrap_pidfd_send_signal(int pidfd, int sig, siginfo_t *info, unsigned flags)
{
	struct fake_process *fake = find_pidfd(pidfd);

	if (!fake || fake->dead) {
		errno = ESRCH;
		return -1;
	}
	if (sig == SIGKILL)
		kernel_kill(fake);
	return 0;
}

int __wrap_pidfd_getfd(int pidfd, int number, unsigned flags);
int __wrap_pidfd_getfd(int pidfd, int number, unsigned flags)
{
	static const char kinds[] = "etpgiuso0";

	if (number == 77)
		errno = EPERM;
	else if ((size_t)number >= ELEMENTS(kinds) - 1)
		errno = EBADF;
	else
		return kernel_descriptor(kinds[number]);
	return -1;
}

/* ---- Data files ---- */

static struct fake_file *find_file(int fd)
{
	uint64_t inode = inode_of(fd);

	for (size_t i = 0; i < N_FILES; i++)
		if (kernel.files[i].inode == inode)
			return &kernel.files[i];
	return NULL;
}

void kernel_open(struct fake_file *file, bool to_write)
{
	/* without a lease it is open at once */
	file->elsewhere = true;
	file->event = to_write ? LEASE_WRITER : LEASE_READER;
}

/* The last is the first user's alone to write, and the one before it a device-DAX. */
int access_probe(int fd, const struct process *client, char *const *file_systems, struct probe *ret,
	struct refusal *ret_refusal)
{
	const struct fake_file *file = find_file(fd);
	char path[32];

	if (!file)
		return refuse(ret_refusal, REFUSAL_NOT_LEASABLE, "kind", "It is no file.");
	snprintf(path, sizeof(path), "/data/%zu", (size_t)(file - kernel.files));
	*ret = (struct probe){
		.device = makedev(8, 1),
		.inode = file->inode,
		.mount = 20 + (uint64_t)(file - kernel.files),
		.mount_device = makedev(8, 1),
		.owner = FIRST_UID,
		.size = FILE_SIZE,
		.backing = {.kind = BACKING_PAGE_CACHE, .device = "sda1", .numa_node = -1},
		.path = strdup(path),
		.file_system = "ext4",
	};
	if (file == &kernel.files[N_FILES - 2])
		ret->backing = (struct backing){.kind = BACKING_DEVICE_DAX, .device = "dax0.0"};
	return ret->path ? 0 : -ENOMEM;
}

void probe_clear(struct probe *probe)
{
	free(probe->path);
	*probe = (struct probe){};
}

int access_check_lease(int fd, const struct process *client, const struct probe *probe,
	enum leases leases, struct refusal *ret_refusal)
{
	return 0;
}

int access_check_descriptor(int fd, enum access access, struct refusal *ret_refusal)
{
	return 0;
}

int access_check_open(
	int fd, const struct process *client, enum access access, struct refusal *ret_refusal)
{
	if (access == ACCESS_READ || client->uid == FIRST_UID ||
		find_file(fd) != &kernel.files[N_FILES - 1])
		return 0;
	return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "access", "It is another's.");
}

int access_open(int fd, const struct process *client, enum access access, const struct probe *probe,
	int *ret_fd, struct refusal *ret_refusal)
{
	int r = access_check_open(fd, client, access, ret_refusal);

	if (r != 0)
		return r;
	*ret_fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	return *ret_fd < 0 ? -errno : 0;
}

/* ---- Leases ---- */

int lease_own(const struct lease *lease)
{
	return 0;
}

int lease_take(struct lease *lease)
{
	struct fake_file *file = find_file(lease->fd);

	if (lease->state != LEASE_NONE)
		abort();
	if (file->elsewhere)
		return -EAGAIN;
	file->event = LEASE_INTACT;
	lease->state = lease->access == ACCESS_WRITE ? LEASE_WRITE : LEASE_READ;
	lease->looked_usec = now_usec();
	return 0;
}

int lease_resume(struct lease *lease, uint64_t since_usec)
{
	return 0;
}

enum lease_tampering lease_inspect(const struct lease *lease, uid_t *ret_uid)
{
	struct fake_file *file = find_file(lease->fd);
	enum lease_tampering tampering = file->tampering;

	file->tampering = LEASE_UNTOUCHED;
	*ret_uid = file->culprit;
	return tampering;
}

static enum lease_event lease_event(struct lease *lease, struct fake_file *file)
{
	switch (file->event) {
	case LEASE_GONE:
		lease->state = LEASE_NONE;
		return LEASE_GONE;
	case LEASE_STRIPPED:
		file->event = LEASE_INTACT;
		return lease_is_held(lease) && lease_is_shared(lease) ? LEASE_STRIPPED
								      : LEASE_INTACT;
	case LEASE_WRITER:
		if (lease->state == LEASE_BREAKING)
			return LEASE_INTACT;
		lease->state = LEASE_BREAKING;
		lease->broken_usec = now_usec();
		return LEASE_WRITER;
	case LEASE_READER:
		return lease->state == LEASE_WRITE ? LEASE_READER : LEASE_INTACT;
	default:
		return LEASE_INTACT;
	}
}

enum lease_event lease_look(struct lease *lease)
{
	enum lease_event event = LEASE_INTACT;

	if (lease->state != LEASE_NONE)
		event = lease_event(lease, find_file(lease->fd));
	lease->looked_usec = now_usec();
	lease->unheard = event != LEASE_INTACT;
	return event;
}

void lease_settle(struct lease *lease, uint64_t break_usec)
{
	if (lease->state != LEASE_WRITE)
		abort();
	lease->state = LEASE_SETTLING;
	lease->settled_usec = now_usec() + break_usec;
}

void lease_settled(struct lease *lease)
{
	if (lease->state != LEASE_SETTLING)
		return;
	lease->state = LEASE_SETTLED;
	find_file(lease->fd)->event = LEASE_INTACT;
}

int lease_give(struct lease *lease)
{
	if (lease->state != LEASE_NONE)
		find_file(lease->fd)->event = LEASE_INTACT;
	lease->state = LEASE_NONE;
	return 0;
}

uint64_t lease_break_usec(void)
{
	return kernel.break_usec;
}

/* ---- */

static void make_file(struct fake_file *file)
{
	file->fd = memfd_create("file", MFD_CLOEXEC);
	if (file->fd < 0 || ftruncate(file->fd, FILE_SIZE) < 0)
		abort();
	file->inode = inode_of(file->fd);
}

static void make_process(struct fake_process *p, size_t i)
{
	if (pipe2(p->pipe, O_CLOEXEC) < 0)
		abort();
	p->inode = inode_of(p->pipe[0]);
	p->pid = FIRST_PID + (pid_t)i;
	p->uid = FIRST_UID + i % 2;
	p->holds = i < 2;
}

void kernel_start(void)
{
	kernel = (struct fake_kernel){.now_usec = USEC_PER_SEC, .break_usec = 45 * USEC_PER_SEC};
	for (size_t i = 0; i < N_FILES; i++)
		make_file(&kernel.files[i]);
	for (size_t i = 0; i < N_PROCESSES; i++)
		make_process(&kernel.processes[i], i);
}

void kernel_stop(void)
{
	for (size_t i = 0; i < N_FILES; i++)
		close(kernel.files[i].fd);
	for (size_t i = 0; i < N_PROCESSES; i++) {
		close(kernel.processes[i].pipe[0]);
		close(kernel.processes[i].pipe[1]);
	}
	if (n_timers > 0)
		abort(); /* left behind */
	free(timers);
	timers = NULL;
	n_timers_allocated = 0;
	kernel.now_usec = 0;
}
