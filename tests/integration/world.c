/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_xdp.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MACHINE_LOCK "/dev/shm/pinbroker-tests.lock" /* client.py's, too */

char dir[] = "/tmp/pinbroker-test-XXXXXX";
char mount_point[64], socket_path[80], bus_address[80], file_path[80];
static char bus_path[64], config_path[64];
pid_t daemon_pid, bus_pid;

static int machine_lock;

static void forget_lock(void)
{
	close(machine_lock);
	machine_lock = -1; /* a child's child has it no more */
}

/* The counters of pins and the lease-break-time are the machine's: one test at a time, also of several
 * runs. Held until the process ends, whatever it leaves behind. */
static void __attribute__((constructor)) lock_machine(void)
{
	machine_lock = open(MACHINE_LOCK, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (machine_lock < 0 || flock(machine_lock, LOCK_EX) < 0 ||
	    pthread_atfork(NULL, NULL, forget_lock) != 0) {
		perror(MACHINE_LOCK);
		exit(1);
	}
	/* Times are measured: what else the machine does is to wait, if it can be made to. */
	(void)setpriority(PRIO_PROCESS, 0, -20);
}

/* One test alone, by the name that is given as argument. */
static void __attribute__((constructor)) choose_test(int argc, char *argv[])
{
	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
}

uint64_t usec_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

unsigned slowness(void)
{
	const char *value = getenv("PINBROKER_SLOW");

	return value ? (unsigned)atoi(value) : 1;
}

/* Long-term pins of the whole machine, in pages. */
unsigned kept_msec(void)
{
	struct utsname uts;

	assert_int_equal(uname(&uts), 0);
	return strncmp(uts.release, "6.1.", 4) == 0 ? 1500 : 0;
}

long pinned(void)
{
	long value, acquired = 0, released = 0;
	char buffer[64];
	FILE *f;
	int fd;

	/* reading it folds the counters of all CPUs */
	fd = open("/proc/sys/vm/stat_refresh", O_RDONLY | O_CLOEXEC);
	assert_true(fd >= 0);
	(void)!read(fd, buffer, sizeof(buffer));
	close(fd);
	f = fopen("/proc/vmstat", "re");
	assert_non_null(f);
	while (fscanf(f, "%63s %ld", buffer, &value) == 2) {
		if (strcmp(buffer, "nr_foll_pin_acquired") == 0)
			acquired = value;
		if (strcmp(buffer, "nr_foll_pin_released") == 0)
			released = value;
	}
	fclose(f);
	return acquired - released;
}

pid_t start(const char *const argv[])
{
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	return pid;
}

int finish(pid_t pid, int sig)
{
	struct pollfd pfd = { .fd = pidfd_open(pid, 0), .events = POLLIN };
	bool ended;
	int status;

	assert_true(pfd.fd >= 0);
	kill(pid, sig);
	ended = poll(&pfd, 1, 2 * WAIT_MSEC) == 1;
	close(pfd.fd);
	if (!ended)
		kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (!ended)
		fail_msg("process %d did not end", pid);
	return status;
}

/* A server is there once its socket takes connections. */
void wait_for_socket(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	int r;

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
	do {
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		r = connect(fd, (struct sockaddr *)&address, sizeof(address));
		close(fd);
		if (r < 0)
			poll(NULL, 0, 1);
	} while (r < 0 && usec_now() < end);
	assert_int_equal(r, 0);
}

void run(const char *format, ...)
{
	char command[256];
	va_list ap;

	va_start(ap, format);
	vsnprintf(command, sizeof(command), format, ap);
	va_end(ap);
	assert_int_equal(system(command), 0);
}

void start_bus(void)
{
	const char *bus[] = { "dbus-daemon", "--session", "--nofork", "--nopidfile", "--address",
			      bus_address, NULL };

	unlink(bus_path);
	bus_pid = start(bus);
	wait_for_socket(bus_path);
}

void start_daemon(void)
{
	const char *broker[] = { getenv("PINBROKERD"), "--socket", socket_path, "--bus",
				 bus_address, "--config", config_path, NULL };

	assert_non_null(broker[0]);
	daemon_pid = start(broker);
	wait_for_socket(socket_path);
}

void world_start(const char *config)
{
	FILE *f;

	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	assert_non_null(mkdtemp(dir));
	snprintf(mount_point, sizeof(mount_point), "%s/mnt", dir);
	snprintf(socket_path, sizeof(socket_path), "%s/socket", dir);
	snprintf(config_path, sizeof(config_path), "%s/conf", dir);
	snprintf(bus_path, sizeof(bus_path), "%s/bus", dir);
	snprintf(bus_address, sizeof(bus_address), "unix:path=%s", bus_path);
	snprintf(file_path, sizeof(file_path), "%s/mnt/data", dir);
	assert_int_equal(mkdir(mount_point, 0755), 0);
	f = fopen(config_path, "we");
	assert_non_null(f);
	fputs(config, f);
	fclose(f);
	start_bus();
	start_daemon();
}

void world_stop(void)
{
	int status = finish(daemon_pid, SIGTERM);

	finish(bus_pid, SIGKILL);
	umount2(mount_point, MNT_DETACH);
	run("rm -rf %s", dir);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

static unsigned old_lease_break_time;

static void write_lease_break_time(unsigned seconds)
{
	FILE *f = fopen("/proc/sys/fs/lease-break-time", "we");

	if (f) {
		fprintf(f, "%u", seconds);
		fclose(f);
	}
}

void restore_lease_break_time(void)
{
	write_lease_break_time(old_lease_break_time);
}

/* A process that has nothing of the test's but the machine's lock, and is in no group that is killed with it.
 * Another one is in client.py. */
static void __attribute__((noreturn)) await_end_of_test(int lock, int test)
{
	struct pollfd pfd = { .fd = 1, .events = POLLIN };

	setsid();
	dup2(lock, 0);
	dup2(test, 1);
	close_range(2, ~0U, 0);
	poll(&pfd, 1, -1);
	restore_lease_break_time();
	_exit(0);
}

static void start_guard(void)
{
	int ready[2], lock = dup(machine_lock), test = pidfd_open(getpid(), 0);
	pid_t pid;
	char c;

	assert_true(lock >= 0 && test >= 0);
	assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0)
		await_end_of_test(lock, test);
	close(lock);
	close(test);
	close(ready[1]);
	assert_int_equal(read(ready[0], &c, 1), 0); /* it has nothing of ours any more */
	close(ready[0]);
}

void set_lease_break_time(unsigned seconds)
{
	static bool guarded;
	FILE *f = fopen("/proc/sys/fs/lease-break-time", "re");

	assert_non_null(f);
	if (!guarded) {
		assert_int_equal(fscanf(f, "%u", &old_lease_break_time), 1);
		start_guard();
		guarded = true;
	}
	fclose(f);
	write_lease_break_time(seconds);
}

void mount_fs(const char *fs)
{
	if (strcmp(fs, "tmpfs") == 0) {
		assert_int_equal(mount("tmpfs", mount_point, "tmpfs", 0, NULL), 0);
		return;
	}
	run("truncate -s 400M %s/image", dir);
	run("mkfs.%s -q %s/image", fs, dir);
	run("mount -o loop %s/image %s", dir, mount_point);
}

void make_file(void)
{
	int fd = open(file_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	char *p = malloc(SIZE);

	assert_true(fd >= 0);
	assert_non_null(p);
	memset(p, 'a', SIZE);
	assert_int_equal(write(fd, p, SIZE), SIZE);
	free(p);
	close(fd);
}

int dial(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path);
	assert_int_equal(connect(s, (struct sockaddr *)&address, sizeof(address)), 0);
	return s;
}

bool send_with_fd(int s, const void *text, size_t size, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = "";
	struct iovec iov = { (void *)text, size };
	struct msghdr mh = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct cmsghdr *c;

	if (fd >= 0) {
		mh.msg_control = control;
		mh.msg_controllen = sizeof(control);
		c = CMSG_FIRSTHDR(&mh);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	return sendmsg(s, &mh, MSG_NOSIGNAL) == (ssize_t)size;
}

/* --- the holder, a process of its own --- */

struct holding {
	const struct holder_options *options;
	struct io_uring ring, second;
	pinbroker_file *file;
	pinbroker_context *context;
	int xdp;
	void *map;
	uint64_t pin;
	FILE *events;
};

static FILE *signal_events;

#define MUST(expression)                                                                           \
	do {                                                                                       \
		int _r = (expression);                                                             \
		if (_r < 0) {                                                                      \
			fprintf(h->events, "error %s: %d\n", #expression, _r);                     \
			_exit(1);                                                                  \
		}                                                                                  \
	} while (0)

static int clone_buffers(struct holding *h)
{
	struct {
		uint32_t src_fd, flags, src_off, dst_off, nr, pad[3];
	} clone = { .src_fd = (uint32_t)h->ring.ring_fd };
	int r = io_uring_queue_init(8, &h->second, 0);

	if (r < 0)
		return r;
	/* IORING_REGISTER_CLONE_BUFFERS, Linux 6.12 */
	return (int)syscall(SYS_io_uring_register, h->second.ring_fd, 30, &clone, 1) < 0 ? -errno : 0;
}

bool can_clone_buffers(void)
{
	struct holding h = {};
	void *page = malloc(PAGE);
	bool can;

	assert_non_null(page);
	assert_int_equal(io_uring_queue_init(8, &h.ring, 0), 0);
	assert_int_equal(io_uring_register_buffers(&h.ring, &(struct iovec){ page, PAGE }, 1), 0);
	can = clone_buffers(&h) == 0;
	free(page);
	io_uring_queue_exit(&h.second);
	io_uring_queue_exit(&h.ring);
	return can;
}

static int transfer_for_ever(struct holding *h)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&h->ring);
	int fds[2];

	if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0)
		return -errno;
	if (h->options->writes) {
		while (write(fds[1], h->map, PAGE) > 0)
			;
		io_uring_prep_write_fixed(sqe, fds[1], h->map, PAGE, 0, 0);
	} else {
		io_uring_prep_read_fixed(sqe, fds[0], h->map, PAGE, 0, 0);
	}
	fcntl(fds[0], F_SETFL, 0);
	fcntl(fds[1], F_SETFL, 0);
	return io_uring_submit(&h->ring);
}

static int register_umem(struct holding *h)
{
	struct xdp_umem_reg umem = { .addr = (uintptr_t)h->map, .len = SIZE, .chunk_size = PAGE };

	/* the oldest form of the struct: it has grown since */
	return setsockopt(h->xdp, SOL_XDP, XDP_UMEM_REG, &umem, 24) < 0 ? -errno : 0;
}

static void hold(pinbroker *pb, struct holding *h)
{
	struct pinbroker_range range = { 0, SIZE };
	struct iovec iov = { h->map, SIZE };

	MUST(pinbroker_pin(pb, h->file, h->context, &range, 1, PINBROKER_WRITE, "test", &h->pin));
	if (h->options->xdp)
		MUST(register_umem(h));
	else if (!h->options->opaque)
		MUST(io_uring_register_buffers(&h->ring, &iov, 1));
	MUST(pinbroker_bind(pb, h->pin, 0));
	if (h->options->clone)
		MUST(clone_buffers(h));
	if (h->options->in_flight)
		MUST(transfer_for_ever(h));
	fprintf(h->events, "holding %lu\n", h->pin);
}

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holding *h = userdata;

	fprintf(h->events, "notice %s %ld %d %s\n", pinbroker_cause_name(n->cause),
		n->size == PINBROKER_UNKNOWN ? -1 : (long)n->size, n->pid,
		n->comm ? n->comm : "-");
	if (h->options->extend && !n->update) {
		uint64_t deadline;

		MUST(pinbroker_extend(pb, n->revocation, EXTEND_MSEC * 1000, &deadline));
		fprintf(h->events, "extended %lu\n", (deadline - usec_now()) / 1000);
	}
	if ((!n->update && n->cause != PINBROKER_CAUSE_ADMIN) || h->options->ignore)
		return;
	if (h->options->xdp)
		MUST(close(h->xdp));
	else if (!h->options->opaque)
		MUST(io_uring_unregister_buffers(&h->ring));
	MUST(pinbroker_unpin(pb, &h->pin, 1, NULL, NULL));
	fprintf(h->events, "let-go\n");
}

static void on_signal(int sig)
{
	(void)!write(fileno(signal_events), "signal\n", 7);
}

static void *truncate_own(void *userdata)
{
	struct holding *h = userdata;

	MUST(truncate(file_path, PAGE) < 0 ? -errno : 0);
	fprintf(h->events, "truncated\n");
	return NULL;
}

static void obey(pinbroker *pb, struct holding *h, char command)
{
	pthread_t thread;
	pid_t pid;

	switch (command) {
	case 'r':
		MUST(ftruncate(pinbroker_file_get_fd(h->file), SIZE) < 0 ? -errno : 0);
		hold(pb, h);
		break;
	case 'f':
		pid = fork();
		if (pid == 0) {
			prctl(PR_SET_PDEATHSIG, 0);
			pause();
			_exit(0);
		}
		fprintf(h->events, "child %d\n", pid);
		break;
	case 'm':
		MUST(munmap(h->map, SIZE));
		MUST(close(pinbroker_file_get_fd(h->file)));
		fprintf(h->events, "unmapped\n");
		break;
	case 'b':
		MUST(-pthread_create(&thread, NULL, truncate_own, h));
		break;
	default:
		_exit(0);
	}
}

static void holder_main(const struct holder_options *options, int events, int commands)
{
	struct holding holding = { .options = options, .events = fdopen(events, "w") },
		       *h = &holding;
	pinbroker *pb;
	char c;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setvbuf(h->events, NULL, _IOLBF, 0);
	signal_events = h->events;
	/* cmocka catches it in the tests' own process */
	signal(SIGBUS, options->catch_signal ? on_signal : SIG_DFL);
	MUST(pinbroker_new("test holder", socket_path, &pb));
	MUST(pinbroker_set_channels(pb, options->channels ? options->channels
							   : PINBROKER_CHANNEL_WATCH));
	MUST(pinbroker_set_bus_address(pb, bus_address));
	MUST(pinbroker_set_revoke_callback(pb, on_revoke, h));
	MUST(pinbroker_connect(pb));
	MUST(pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &h->file));
	if (options->xdp) {
		h->xdp = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
		MUST(h->xdp < 0 ? -errno : 0);
		MUST(pinbroker_add_context(pb, h->xdp, "umem", &h->context));
	} else if (!options->opaque) {
		MUST(io_uring_queue_init(8, &h->ring, options->ring_flags));
		MUST(pinbroker_add_context_remote(pb, h->ring.ring_fd, "ring", &h->context));
	} else {
		MUST(pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), "no ring", &h->context));
	}
	h->map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
		      pinbroker_file_get_fd(h->file), 0);
	MUST(h->map == MAP_FAILED ? -errno : 0);
	hold(pb, h);
	for (;;) {
		struct pollfd fds[] = {
			{ .fd = pinbroker_get_fd(pb), .events = POLLIN },
			{ .fd = commands, .events = POLLIN },
		};

		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[0].revents)
			MUST(pinbroker_dispatch(pb));
		if (!fds[1].revents)
			continue;
		obey(pb, h, read(commands, &c, 1) == 1 ? c : 'x');
	}
}

struct holder holder_start(const struct holder_options *options)
{
	int events[2], commands[2];
	struct holder h;

	assert_int_equal(pipe2(events, O_CLOEXEC), 0);
	assert_int_equal(pipe2(commands, O_CLOEXEC), 0);
	h.pid = fork();
	assert_true(h.pid >= 0);
	if (h.pid == 0) {
		close(commands[1]);
		holder_main(options, events[1], commands[0]);
		_exit(0);
	}
	close(events[1]);
	close(commands[0]);
	h.events = events[0];
	h.commands = commands[1];
	return h;
}

void holder_command(struct holder *h, char command)
{
	assert_int_equal(write(h->commands, &command, 1), 1);
}

static void holder_line(struct holder *h, const char *expected, char *line, size_t size)
{
	struct pollfd fd = { .fd = h->events, .events = POLLIN };
	size_t n = 0;

	while (n + 1 < size) {
		if (poll(&fd, 1, WAIT_MSEC) != 1)
			fail_msg("the holder did not say \"%s\"", expected);
		assert_int_equal(read(h->events, line + n, 1), 1);
		if (line[n] == '\n')
			break;
		n++;
	}
	line[n] = 0;
	if (strncmp(line, expected, strlen(expected)) != 0)
		fail_msg("the holder said \"%s\", not \"%s\"", line, expected);
}

void holder_expect(struct holder *h, const char *format, ...)
{
	char line[256], expected[256];
	va_list ap;

	va_start(ap, format);
	vsnprintf(expected, sizeof(expected), format, ap);
	va_end(ap);
	holder_line(h, expected, line, sizeof(line));
}

unsigned long holder_number(struct holder *h, const char *what)
{
	char line[256];

	holder_line(h, what, line, sizeof(line));
	return strtoul(line + strlen(what), NULL, 10);
}

int holder_stop(struct holder *h, int sig)
{
	int status;

	close(h->commands);
	status = finish(h->pid, sig);
	close(h->events);
	return status;
}

/* --- who truncates, a process of its own --- */

pid_t truncate_start(int *ret_fd)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		struct result result = {};
		uint64_t begin;

		prctl(PR_SET_NAME, "truncater");
		begin = usec_now();
		if (truncate(file_path, PAGE) < 0)
			result.error = errno;
		result.usec = usec_now() - begin;
		result.pinned = pinned();
		(void)!write(fds[1], &result, sizeof(result));
		_exit(0);
	}
	close(fds[1]);
	*ret_fd = fds[0];
	return pid;
}

struct result truncate_finish(pid_t pid, int fd)
{
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	struct result result;

	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	assert_int_equal(read(fd, &result, sizeof(result)), sizeof(result));
	close(fd);
	assert_int_equal(waitpid(pid, NULL, 0), pid);
	return result;
}

void expect_pinned(long value, long base, long pages)
{
	if (labs(value - base - pages) > 8)
		fail_msg("%ld pages are pinned, not %ld", value - base, pages);
}

void wait_pinned(long base, long pages)
{
	uint64_t end = usec_now() + WAIT_MSEC * 1000;

	while (labs(pinned() - base - pages) > 8 && usec_now() < end)
		poll(NULL, 0, 10);
	expect_pinned(pinned(), base, pages);
}
