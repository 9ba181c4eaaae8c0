/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/closer.h"
#include "daemon/util/user.h"
#include "protocol/macro.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include <cmocka.h>

/* Closes that hang, and that linger: whom they hold up, what they are charged, and that the loop
 * does none. */

#define N_USERS     20
#define NUMBERS_MAX 4096

static const uint64_t maxima[LIMIT_COUNT] = {[LIMIT_CLIENTS] = 64, [LIMIT_UNFINISHED] = 64, [LIMIT_DESCRIPTORS] = 1024};

static sd_event *event;
static struct users *users;
static struct user *alice, *bob;
static struct offload *offload;
static pthread_t loop_thread;

/* What a test makes fail, or hang. */
static bool allocations_fail;
static atomic_bool hangs[NUMBERS_MAX]; /* the close of that descriptor, until the gate opens */
static int gate[2], hanging[2];        /* a byte for each that does */
static atomic_bool closing_on_the_loop_fails;

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
int __real_close(int fd);
int __wrap_close(int fd);

void *__wrap_calloc(size_t n, size_t size)
{
	return allocations_fail ? NULL : __real_calloc(n, size);
}

void *__wrap_malloc(size_t size)
{
	return allocations_fail ? NULL : __real_malloc(size);
}

int __wrap_close(int fd)
{
	char c = 0;

	if (closing_on_the_loop_fails && pthread_equal(pthread_self(), loop_thread))
		fail_msg("%d is closed on the loop", fd);
	if (fd >= 0 && fd < NUMBERS_MAX && atomic_exchange(&hangs[fd], false)) {
		if (write(hanging[1], &c, 1) != 1 || read(gate[0], &c, 1) != 1)
			abort();
	}
	return __real_close(fd);
}

static int setup(void **state)
{
	loop_thread = pthread_self();
	if (pipe2(gate, O_CLOEXEC) < 0 || pipe2(hanging, O_CLOEXEC) < 0 ||
		sd_event_new(&event) < 0 || users_new(maxima, &users) < 0 ||
		user_get(users, 1, &alice) < 0 || user_get(users, 2, &bob) < 0)
		return -1;
	return offload_new(event, &offload);
}

static int teardown(void **state)
{
	closing_on_the_loop_fails = false;
	assert_int_equal(offload_free(offload), 0);
	event = sd_event_unref(event);
	alice = user_unref(alice);
	bob = user_unref(bob);
	users = users_free(users);
	for (int i = 0; i < 2; i++) {
		safe_close(gate[i]);
		safe_close(hanging[i]);
	}
	return 0;
}

static void open_gate(unsigned n)
{
	while (n-- > 0)
		assert_int_equal(write(gate[1], "", 1), 1);
}

static void await_hanging(unsigned n)
{
	struct pollfd pfd = {.fd = hanging[0], .events = POLLIN};

	/* the loop sends a worker that has just ended for what came meanwhile */
	for (char c; n > 0; n--) {
		while (poll(&pfd, 1, 1) == 0)
			assert_true(sd_event_run(event, 0) >= 0);
		assert_int_equal(read(hanging[0], &c, 1), 1);
	}
}

static void run_until_unfinished(unsigned n)
{
	while (offload_unfinished(offload) > n)
		assert_true(sd_event_run(event, UINT64_MAX) >= 0);
}

/* A pipe's writing end, that is to be closed; the other end tells. */
struct descriptor {
	int fd, other;
};

static struct descriptor descriptor_new(bool hang)
{
	int fds[2];

	assert_int_equal(pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
	assert_in_range(fds[1], 0, NUMBERS_MAX - 1);
	hangs[fds[1]] = hang;
	return (struct descriptor){fds[1], fds[0]};
}

static void close_later(struct user *user, int fd)
{
	if (user)
		assert_int_equal(user_charge(user, LIMIT_DESCRIPTORS, 1), 0);
	assert_int_equal(offload_close(offload, user, fd), -1);
}

static void expect_closed(struct descriptor *d, bool closed)
{
	ssize_t n;
	char c;

	n = read(d->other, &c, 1);
	assert_true(n == 0 || errno == EAGAIN);
	assert_int_equal(n == 0, closed);
	if (closed)
		__real_close(d->other);
}

static void everything_is_closed_and_discharged(void **state)
{
	struct descriptor d[500];

	for (size_t i = 0; i < ELEMENTS(d); i++) {
		struct user *user = i % 3 == 0 ? alice : i % 3 == 1 ? bob : NULL;

		d[i] = descriptor_new(false);
		closing_on_the_loop_fails = true;
		if (user && i % 2 == 0) {
			user_charge_force(user, LIMIT_CLIENTS, 1);
			assert_int_equal(offload_close_connection(offload, user, d[i].fd), -1);
		} else {
			close_later(user, d[i].fd);
		}
		closing_on_the_loop_fails = false;
	}
	assert_int_equal(offload_close(offload, alice, -1), -1);
	run_until_unfinished(0);
	for (size_t i = 0; i < ELEMENTS(d); i++)
		expect_closed(&d[i], true);
	assert_int_equal(alice->used[LIMIT_UNFINISHED] + alice->used[LIMIT_CLIENTS] +
				 alice->used[LIMIT_DESCRIPTORS], 0);
	assert_int_equal(bob->used[LIMIT_UNFINISHED] + bob->used[LIMIT_CLIENTS] +
				 bob->used[LIMIT_DESCRIPTORS], 0);
}

/* With no memory they wait for their turn as ever. */
static void nothing_is_allocated(void **state)
{
	struct descriptor hung[OFFLOAD_CLOSES_PER_USER], d[200];

	for (size_t i = 0; i < ELEMENTS(hung); i++) {
		hung[i] = descriptor_new(true);
		close_later(alice, hung[i].fd);
	}
	await_hanging(ELEMENTS(hung));
	closing_on_the_loop_fails = true;
	for (size_t i = 0; i < ELEMENTS(d); i++) {
		d[i] = descriptor_new(false);
		allocations_fail = true;
		close_later(alice, d[i].fd);
		allocations_fail = false;
	}
	closing_on_the_loop_fails = false;
	for (size_t i = 0; i < ELEMENTS(d); i++)
		expect_closed(&d[i], false);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], ELEMENTS(hung) + ELEMENTS(d));
	open_gate(ELEMENTS(hung));
	run_until_unfinished(0);
	for (size_t i = 0; i < ELEMENTS(d); i++)
		expect_closed(&d[i], true);
	for (size_t i = 0; i < ELEMENTS(hung); i++)
		expect_closed(&hung[i], true);
}

/* What was closed before another close hangs is not charged any more. */
static void a_hanging_close_is_charged_alone(void **state)
{
	struct descriptor d[30], hung = descriptor_new(true), last = descriptor_new(true);

	for (size_t i = 0; i < ELEMENTS(d); i++) {
		d[i] = descriptor_new(false);
		close_later(alice, d[i].fd);
	}
	close_later(alice, hung.fd);
	close_later(alice, last.fd);
	await_hanging(2);
	run_until_unfinished(2);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], 2);
	open_gate(2);
	run_until_unfinished(0);
	for (size_t i = 0; i < ELEMENTS(d); i++)
		expect_closed(&d[i], true);
	expect_closed(&hung, true);
	expect_closed(&last, true);
}

struct test_job {
	struct job job;
	bool done;
};

static void job_run(struct job *job)
{
}

static void job_done(struct job *job)
{
	container_of(job, struct test_job, job)->done = true;
}

static void run_until_done(const struct test_job *t)
{
	while (!t->done)
		assert_true(sd_event_run(event, UINT64_MAX) >= 0);
}

/* I6: twenty users whose closes hang for ever hold up nobody else, and themselves in nothing else:
 * not in what ends their pins, what signals their processes, or closes their connections. */
static void hanging_closes_hold_up_nothing(void **state)
{
	struct descriptor hung[N_USERS][OFFLOAD_CLOSES_PER_USER], waiting[N_USERS], connection,
		other, file;
	struct test_job jobs[6] = {};
	struct user *first = NULL;

	for (unsigned i = 0; i < N_USERS; i++) {
		struct user *user;

		assert_int_equal(user_get(users, 100 + i, &user), 0);
		for (unsigned k = 0; k < OFFLOAD_CLOSES_PER_USER; k++) {
			hung[i][k] = descriptor_new(true);
			close_later(user, hung[i][k].fd);
		}
		waiting[i] = descriptor_new(false);
		close_later(user, waiting[i].fd);
		if (i == 0)
			first = user_ref(user);
		user_unref(user);
	}
	await_hanging(N_USERS * OFFLOAD_CLOSES_PER_USER);

	connection = descriptor_new(false);
	other = descriptor_new(false);
	file = descriptor_new(false);
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		jobs[i].job = (struct job){.run = job_run, .done = job_done};
	user_charge_force(first, LIMIT_CLIENTS, 1);
	offload_close_connection(offload, first, connection.fd);
	offload_submit_step(offload, first, &jobs[0].job);
	offload_submit_reap(offload, first, &jobs[1].job);
	offload_submit_signal(offload, first, &jobs[2].job);
	assert_int_equal(offload_submit(offload, first, &jobs[3].job), 0);
	assert_int_equal(offload_submit(offload, bob, &jobs[4].job), 0);
	assert_int_equal(offload_submit(offload, NULL, &jobs[5].job), 0);
	close_later(bob, other.fd);
	close_later(NULL, file.fd);
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		run_until_done(&jobs[i]);
	run_until_unfinished(N_USERS * (OFFLOAD_CLOSES_PER_USER + 1));
	expect_closed(&connection, true);
	expect_closed(&other, true);
	expect_closed(&file, true);
	assert_int_equal(first->used[LIMIT_CLIENTS], 0);
	for (unsigned i = 0; i < N_USERS; i++)
		expect_closed(&waiting[i], false);

	open_gate(N_USERS * OFFLOAD_CLOSES_PER_USER);
	run_until_unfinished(0);
	for (unsigned i = 0; i < N_USERS; i++) {
		expect_closed(&waiting[i], true);
		for (unsigned k = 0; k < OFFLOAD_CLOSES_PER_USER; k++)
			expect_closed(&hung[i][k], true);
	}
	user_unref(first);
}

/* Its last close would take ten minutes. */
static int lingering_socket(int *ret_listener, int *ret_peer)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	struct linger linger = {.l_onoff = 1, .l_linger = 600};
	socklen_t size = sizeof(address);
	static char data[65536];
	int fd;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	*ret_listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(*ret_listener, (struct sockaddr *)&address, size), 0);
	assert_int_equal(listen(*ret_listener, 1), 0);
	assert_int_equal(getsockname(*ret_listener, (struct sockaddr *)&address, &size), 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&address, size), 0);
	*ret_peer = accept4(*ret_listener, NULL, NULL, SOCK_CLOEXEC);
	assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)), 0);
	while (send(fd, data, sizeof(data), MSG_DONTWAIT) > 0)
		;
	assert_int_equal(errno, EAGAIN);
	return fd;
}

static void send_descriptor(int s, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = {};
	struct iovec iov = {(char[]){0}, 1};
	struct msghdr mh = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control)};

	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(&control.header), &fd, sizeof(int));
	assert_int_equal(sendmsg(s, &mh, 0), 1);
}

/* SO_LINGER keeps nobody waiting: neither in a descriptor that was sent, nor in one that lies
 * unread in a connection, or in a socket in that. */
static void lingering_ends(void **state)
{
	int listener[9], peer[9], pair[2], inner[2], fd;

	for (int i = 0; i < 9; i++) {
		fd = lingering_socket(&listener[i], &peer[i]);
		if (i % 3 == 0) {
			close_later(alice, fd);
			continue;
		}
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
		if (i % 3 == 1) {
			send_descriptor(pair[1], fd);
		} else {
			assert_int_equal(
				socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, inner), 0);
			send_descriptor(inner[1], fd);
			send_descriptor(pair[1], inner[0]);
			__real_close(inner[0]);
			__real_close(inner[1]);
		}
		__real_close(fd);
		user_charge_force(alice, LIMIT_CLIENTS, 1);
		offload_close_connection(offload, alice, pair[0]);
		__real_close(pair[1]);
	}
	run_until_unfinished(0);
	for (int i = 0; i < 9; i++) {
		__real_close(peer[i]);
		__real_close(listener[i]);
	}
}

/* What hangs at the end is left behind, and what waits behind it to the process's exit. */
static void the_end_does_not_wait(void **state)
{
	struct descriptor hung[OFFLOAD_CLOSES_PER_USER], waiting = descriptor_new(false);

	for (size_t i = 0; i < ELEMENTS(hung); i++) {
		hung[i] = descriptor_new(true);
		close_later(alice, hung[i].fd);
	}
	await_hanging(ELEMENTS(hung));
	close_later(alice, waiting.fd);
	assert_int_equal(offload_free(offload), ELEMENTS(hung));
	assert_int_equal(alice->used[LIMIT_UNFINISHED], ELEMENTS(hung) + 1);
	offload = NULL;
	open_gate(ELEMENTS(hung));
	for (size_t i = 0; i < ELEMENTS(hung); i++) {
		while (fcntl(hung[i].fd, F_GETFD) >= 0)
			usleep(100);
		expect_closed(&hung[i], true);
	}
	/* what the process's exit would end */
	user_discharge(alice, LIMIT_UNFINISHED, alice->used[LIMIT_UNFINISHED]);
	user_discharge(alice, LIMIT_DESCRIPTORS, alice->used[LIMIT_DESCRIPTORS]);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	static const struct CMUnitTest tests[] = {
		TEST(everything_is_closed_and_discharged),
		TEST(nothing_is_allocated),
		TEST(a_hanging_close_is_charged_alone),
		TEST(hanging_closes_hold_up_nothing),
		TEST(lingering_ends),
	};
	/* Last, and by itself: what it leaves behind is never freed. */
	static const struct CMUnitTest end[] = {
		cmocka_unit_test_setup_teardown(the_end_does_not_wait, setup, NULL),
	};
	int r = cmocka_run_group_tests(tests, NULL, NULL);

	return r != 0 ? r : cmocka_run_group_tests(end, NULL, NULL);
}
