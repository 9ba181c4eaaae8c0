/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_xdp.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Where a context lives on though its holder's descriptors do not show it: the pages stay pinned,
 * and the truncate waits (I2). And where it does not live on, though the holder's process does.
 */

#define HOLDER_UID   54321
#define BLOCKED_MSEC 500 /* in which a truncate that is held up does not come through */
#define SOON_MSEC    (3000 * slowness())

/* --- what is held --- */

struct context {
	int fd;     /* the ring, or the AF_XDP socket */
	int second; /* a socket that shares the umem */
	void *map;
};

static void must_be(bool condition, const char *what)
{
	if (condition)
		return;
	perror(what);
	_exit(1);
}

#define MUST(condition) must_be(condition, #condition)

/* Its other end is the test's alone: whatever becomes of that, nobody is left behind. */
static int lifeline[2];

static void stay(void)
{
	close(lifeline[1]);
	(void)poll(&(struct pollfd){.fd = lifeline[0], .events = POLLIN}, 1, -1);
	_exit(0);
}

static int ring_new(void)
{
	struct io_uring_params params = {};

	return (int)syscall(SYS_io_uring_setup, 8, &params);
}

static int ring_register(int fd, unsigned opcode, void *arg, unsigned n)
{
	return (int)syscall(SYS_io_uring_register, fd, opcode, arg, n);
}

/* In the first of as many slots as a ring can have: its fdinfo lists all of them. */
static void ring_pin(struct context *c)
{
	static struct iovec slots[16384];

	slots[0] = (struct iovec){c->map, SIZE};
	MUST(ring_register(
		     c->fd, IORING_REGISTER_BUFFERS, slots, sizeof(slots) / sizeof(slots[0])) == 0);
}

static void xdp_pin(struct context *c)
{
	struct xdp_umem_reg umem = {.addr = (uintptr_t)c->map, .len = SIZE, .chunk_size = PAGE};
	int n = 64;

	MUST(setsockopt(c->fd, SOL_XDP, XDP_UMEM_REG, &umem, 24) == 0);
	MUST(setsockopt(c->fd, SOL_XDP, XDP_UMEM_FILL_RING, &n, sizeof(n)) == 0);
	MUST(setsockopt(c->fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &n, sizeof(n)) == 0);
	MUST(setsockopt(c->fd, SOL_XDP, XDP_RX_RING, &n, sizeof(n)) == 0);
}

/* A network of its own, so that nobody else has its only device. */
static void xdp_share(struct context *c)
{
	struct sockaddr_xdp address = {.sxdp_family = AF_XDP, .sxdp_flags = XDP_COPY};
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int n = 64, control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	MUST(ioctl(control, SIOCSIFFLAGS, &lo) == 0);
	close(control);
	address.sxdp_ifindex = if_nametoindex("lo");
	MUST(bind(c->fd, (struct sockaddr *)&address, sizeof(address)) == 0);
	c->second = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	MUST(setsockopt(c->second, SOL_XDP, XDP_RX_RING, &n, sizeof(n)) == 0);
	address.sxdp_flags = XDP_SHARED_UMEM;
	address.sxdp_shared_umem_fd = (uint32_t)c->fd;
	MUST(bind(c->second, (struct sockaddr *)&address, sizeof(address)) == 0);
}

/* --- where it is hidden, by a process that has inherited it --- */

static void say_ready(int fd)
{
	MUST(write(fd, "", 1) == 1);
}

struct hiding {
	struct context *context;
	int ready;
};

static void hide_nothing(struct hiding *h)
{
	close(h->context->fd);
	say_ready(h->ready);
	stay();
}

static void *outlive(void *userdata)
{
	struct hiding *h = userdata;
	char state = 'R';

	while (state != 'Z') {
		FILE *f = fopen("/proc/self/stat", "re");

		MUST(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1);
		fclose(f);
	}
	say_ready(h->ready);
	stay();
	return NULL;
}

static void hide_nowhere(struct hiding *h)
{
	say_ready(h->ready);
	stay();
}

static void hide_first_thread_ended(struct hiding *h)
{
	pthread_t thread;

	MUST(pthread_create(&thread, NULL, outlive, h) == 0);
	pthread_exit(NULL);
}

static void *keep_alone(void *userdata)
{
	pthread_barrier_t *barrier = userdata;

	MUST(unshare(CLONE_FILES) == 0);
	pthread_barrier_wait(barrier);
	stay();
	return NULL;
}

static void hide_table(struct hiding *h)
{
	pthread_barrier_t barrier;
	pthread_t thread;

	MUST(pthread_barrier_init(&barrier, NULL, 2) == 0);
	MUST(pthread_create(&thread, NULL, keep_alone, &barrier) == 0);
	pthread_barrier_wait(&barrier);
	hide_nothing(h);
}

static void hide_mapping(struct hiding *h)
{
	MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, h->context->fd, 0) != MAP_FAILED);
	hide_nothing(h);
}

static void hide_fill_ring(struct hiding *h)
{
	MUST(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, h->context->fd,
		     XDP_UMEM_PGOFF_FILL_RING) != MAP_FAILED);
	hide_nothing(h);
}

static void hide_registered(struct hiding *h)
{
	struct io_uring_rsrc_update update = {
		.offset = UINT32_MAX, .data = (uint64_t)h->context->fd};

	MUST(ring_register(h->context->fd, IORING_REGISTER_RING_FDS, &update, 1) == 1);
	hide_nothing(h);
}

static void hide_in_queue(struct hiding *h)
{
	int pair[2];

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	MUST(send_with_fd(pair[0], "", 1, h->context->fd));
	hide_nothing(h);
}

static void hide_in_ring(struct hiding *h)
{
	int ring = ring_new();

	MUST(ring_register(ring, IORING_REGISTER_FILES, &h->context->fd, 1) == 0);
	hide_nothing(h);
}

/* --- the holder --- */

enum kind { RING, XDP, OPAQUE };

struct hideout {
	enum kind kind;
	void (*prepare)(struct context *c); /* NULL: nothing is to be done before */
	void (*hide)(struct hiding *h);
	uid_t uid;       /* of the holder */
	bool detachable; /* it is found, and the buffers are taken away by force */
};

static void connect_holder(struct context *c, enum kind kind)
{
	struct pinbroker_range range = {0, SIZE};
	pinbroker_context *context;
	pinbroker_file *file;
	uint64_t pin;
	pinbroker *pb;

	MUST(pinbroker_new("hiding", socket_path, &pb) >= 0);
	MUST(pinbroker_set_channels(pb, 0) >= 0 && pinbroker_connect(pb) >= 0);
	MUST(pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &file) >= 0);
	c->map = mmap(
		NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	MUST(c->map != MAP_FAILED);
	MUST((kind == RING ? pinbroker_add_context_remote : pinbroker_add_context)(
		     pb, c->fd, NULL, &context) >= 0);
	MUST(pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, NULL, &pin) >= 0);
	if (kind == XDP)
		xdp_pin(c);
	else if (kind == RING)
		ring_pin(c);
	MUST(pinbroker_bind(pb, pin, 0) >= 0);
}

static int context_new(enum kind kind)
{
	if (kind == XDP)
		return socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	return kind == RING ? ring_new() : eventfd(0, EFD_CLOEXEC);
}

static void hold(const struct hideout *hideout, int ready)
{
	struct context c = {.second = -1};
	struct hiding hiding = {&c, ready};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (hideout->kind == XDP)
		MUST(unshare(CLONE_NEWNET) == 0);
	if (hideout->uid != 0)
		MUST(setresuid(hideout->uid, hideout->uid, hideout->uid) == 0);
	c.fd = context_new(hideout->kind);
	MUST(c.fd >= 0);
	connect_holder(&c, hideout->kind);
	if (hideout->prepare)
		hideout->prepare(&c);
	if (fork() == 0)
		hideout->hide(&hiding);
	stay();
}

static void await(int fd)
{
	char c;

	assert_int_equal(poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, WAIT_MSEC), 1);
	assert_int_equal(read(fd, &c, 1), 1);
}

/* The child of the holder, which is in a process group of its own. */
static pid_t start_holder(const struct hideout *hideout)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0) {
		setpgid(0, 0);
		hold(hideout, fds[1]);
	}
	close(fds[1]);
	await(fds[0]);
	close(fds[0]);
	return pid;
}

static int on_revocation(const struct pinbroker_revocation_info *info, void *userdata)
{
	/* the one of what was pinned beyond the new end comes after one that was lost */
	if (info->cause != PINBROKER_CAUSE_SHRINK)
		*(struct pinbroker_revocation_info *)userdata = *info;
	return 0;
}

static struct pinbroker_revocation_info last_revocation(void)
{
	struct pinbroker_revocation_info last = {};
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_true(pinbroker_list_revocations(pb, on_revocation, &last) >= 0);
	pinbroker_unref(pb);
	return last;
}

static long begin(void)
{
	long base = pinned();

	world_start("[Revocation]\nRevokeGraceSec=600ms\nSignalGraceSec=100ms\n");
	mount_fs("tmpfs");
	make_file();
	return base;
}

static bool is_blocked(int fd)
{
	return poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, BLOCKED_MSEC) == 0;
}

/* Its holder dies, and something keeps the pages: they are not taken away under it. */
static void test_hideout(void **state)
{
	const struct hideout *hideout = *state;
	long base = begin(), pages = hideout->kind == OPAQUE ? 0 : PAGES;
	struct result result;
	pid_t holder, pid;
	int fd;

	assert_int_equal(chmod(dir, 0755), 0);
	assert_int_equal(chown(file_path, hideout->uid, hideout->uid), 0);
	holder = start_holder(hideout);
	expect_pinned(pinned(), base, pages);
	kill(holder, SIGKILL);
	assert_int_equal(waitpid(holder, NULL, 0), holder);
	pid = truncate_start(&fd);
	if (!hideout->detachable) {
		assert_true(is_blocked(fd));
		expect_pinned(pinned(), base, pages);
		kill(-holder, SIGKILL);
	}
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	expect_pinned(result.pinned, base, 0);
	assert_in_range(result.usec / 1000, 0, BLOCKED_MSEC + SOON_MSEC + kept_msec());
	kill(-holder, SIGKILL);
	wait_pinned(base, 0);
	world_stop();
}

/* Nobody can be turned to: it is kept as long as the kernel waits, and then said to be lost. */
static void test_lost(void **state)
{
	const struct hideout *hideout = *state;
	long base;
	struct pinbroker_revocation_info last;
	struct result result;
	pid_t holder, pid;
	int fd;

	set_lease_break_time(3);
	base = begin();
	holder = start_holder(hideout);
	kill(holder, SIGKILL);
	assert_int_equal(waitpid(holder, NULL, 0), holder);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_in_range(result.usec / 1000, 2000, 4000);
	expect_pinned(result.pinned, base, PAGES);
	last = last_revocation();
	assert_int_equal(last.state, PINBROKER_REVOCATION_LOST);
	assert_int_equal(last.n_remaining, 1);
	kill(-holder, SIGKILL);
	wait_pinned(base, 0);
	set_lease_break_time(45);
	world_stop();
}

/* --- others pin and unpin meanwhile: what the counter shows says nothing against an honest holder
 * --- */

static void make_noise(int ready)
{
	struct context c = {.fd = ring_new()};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	c.map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
		-1, 0);
	for (;;) {
		ring_pin(&c);
		MUST(ring_register(c.fd, IORING_UNREGISTER_BUFFERS, NULL, 0) == 0);
		if (ready >= 0)
			say_ready(ready);
		ready = -1;
	}
}

static void test_noise(void **state)
{
	static const struct hideout nowhere = {.kind = XDP, .hide = hide_nothing};
	struct result result;
	pid_t noise, holder, pid;
	long base = begin();
	int fds[2], fd;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	noise = fork();
	if (noise == 0)
		make_noise(fds[1]);
	await(fds[0]);
	holder = start_holder(&nowhere);
	kill(holder, SIGKILL);
	assert_int_equal(waitpid(holder, NULL, 0), holder);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 0, 2 * SOON_MSEC);
	assert_true(last_revocation().start_usec == 0 ||
		    last_revocation().state == PINBROKER_REVOCATION_RELEASED);
	kill(-holder, SIGKILL);
	finish(noise, SIGKILL);
	close(fds[0]);
	close(fds[1]);
	wait_pinned(base, 0);
	world_stop();
}

static bool daemon_has_ring(void)
{
	char path[64], target[32];
	struct dirent *entry;
	bool has = false;
	DIR *d;

	snprintf(path, sizeof(path), "/proc/%d/fd", daemon_pid);
	d = opendir(path);
	assert_non_null(d);
	while (!has && (entry = readdir(d))) {
		ssize_t n = readlinkat(dirfd(d), entry->d_name, target, sizeof(target) - 1);

		target[n < 0 ? 0 : n] = 0;
		has = strcmp(target, "anon_inode:[io_uring]") == 0;
	}
	closedir(d);
	return has;
}

/* What others pin once it has been closed is no contradiction, however late the kernel frees its pages. */
static void test_pinned_meanwhile(void **state)
{
	static const struct hideout nowhere = {.kind = RING, .hide = hide_nothing};
	struct context other = {.fd = ring_new()};
	long base = begin();
	pid_t holder = start_holder(&nowhere), pid;
	struct result result;
	int fd;

	kill(holder, SIGKILL);
	assert_int_equal(waitpid(holder, NULL, 0), holder);
	for (unsigned i = 0; daemon_has_ring(); i++) {
		assert_true(i < WAIT_MSEC);
		usleep(1000);
	}
	other.map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	ring_pin(&other);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 0, SOON_MSEC);
	kill(-holder, SIGKILL);
	close(other.fd);
	munmap(other.map, SIZE);
	wait_pinned(base, 0);
	world_stop();
}

/* --- the holder lives, and has it no more --- */

/* It executes another program; everything else is closed as it does. */
static pid_t start_leaver(enum kind kind)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
	pid = fork();
	if (pid == 0) {
		struct context c = {.fd = context_new(kind)};

		fcntl(c.fd, F_SETFD, FD_CLOEXEC);
		connect_holder(&c, kind);
		execl("/bin/sleep", "sleep", "100", NULL);
		_exit(1);
	}
	close(fds[1]);
	assert_int_equal(poll(&(struct pollfd){.fd = fds[0], .events = POLLIN}, 1, WAIT_MSEC), 1);
	close(fds[0]);
	return pid;
}

static void leave(enum kind kind)
{
	struct result result;
	long base = begin();
	pid_t leaver = start_leaver(kind), pid;
	int fd;

	/* of its own accord, with nobody waiting */
	wait_pinned(base, 0);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 0, 250 * slowness() + kept_msec());
	expect_pinned(result.pinned, base, 0);
	assert_int_equal(waitpid(leaver, NULL, WNOHANG), 0);
	finish(leaver, SIGKILL);
	world_stop();
}

static void test_exec(void **state)
{
	leave(RING);
}

static void test_exec_opaque(void **state)
{
	leave(OPAQUE);
}

static void test_exec_xdp(void **state)
{
	leave(XDP);
}

/* --- what the broker may not look into --- */

/* As container runtimes do it. Nobody can be told apart who has an eventfd; so a worker of the
 * holder's that has one counts, and nobody is sent a signal. Not to be undone: for the last test.
 */
static void test_kcmp_refused(void **state)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_kcmp, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof(filter) / sizeof(filter[0]), filter};

	assert_int_equal(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	assert_int_equal(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
	test_hideout(state);
}

static struct hideout hideouts[] = {
	{.hide = hide_first_thread_ended, .detachable = true},
	{.hide = hide_table, .detachable = true},
	{.hide = hide_mapping, .detachable = true},
	{.hide = hide_registered, .detachable = true},
	{.kind = XDP, .hide = hide_first_thread_ended},
	{.kind = XDP, .hide = hide_fill_ring},
	{.kind = XDP, .hide = hide_in_queue},
	{.kind = XDP, .hide = hide_in_ring},
	{.kind = XDP, .prepare = xdp_share, .hide = hide_nothing},
	{.kind = OPAQUE, .hide = hide_nowhere, .uid = HOLDER_UID},
};

#define HIDEOUT(number, function)                                  \
	{                                                          \
		.name = "hideout " #number, .test_func = function, \
		.initial_state = &hideouts[number]                 \
	}

int main(void)
{
	const struct CMUnitTest tests[] = {
		HIDEOUT(0, test_hideout),
		HIDEOUT(1, test_hideout),
		HIDEOUT(2, test_hideout),
		HIDEOUT(3, test_hideout),
		HIDEOUT(4, test_hideout),
		HIDEOUT(5, test_hideout),
		HIDEOUT(6, test_hideout),
		HIDEOUT(7, test_hideout),
		HIDEOUT(8, test_hideout),
		{.name = "lost", .test_func = test_lost, .initial_state = &hideouts[8]},
		cmocka_unit_test(test_noise),
		cmocka_unit_test(test_pinned_meanwhile),
		cmocka_unit_test(test_exec),
		cmocka_unit_test(test_exec_xdp),
		cmocka_unit_test(test_exec_opaque),
		HIDEOUT(9, test_kcmp_refused),
	};

	if (pipe2(lifeline, O_CLOEXEC) < 0)
		return 1;
	return cmocka_run_group_tests(tests, NULL, NULL);
}
