/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "holding.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* One handle of libpinbroker in several threads, in one of its own, and in a child. */

#define THREADS 4
#define ROUNDS  100
#define BREAKS  10

static atomic_bool working;

struct worker {
	struct holding *h;
	unsigned n_failed;
	int error;
	pthread_t thread;
};

static int bind_listed(const struct pinbroker_pin_info *info, void *userdata)
{
	pinbroker *pb = userdata;

	/* Calls are allowed in callbacks; here the pin may already be gone, and another's. */
	pinbroker_bind(pb, info->pin, 7);
	return 1;
}

/* With breaks coming in between. */
static bool is_refusal(int r)
{
	return r == -EAGAIN || r == -EBUSY || r == -ESTALE;
}

static int work_once(struct holding *h, unsigned i)
{
	const struct pinbroker_range range = {i * PAGE, PAGE};
	uint64_t pin, ended;
	size_t n_ended;
	int r;

	r = pinbroker_pin(h->pb, h->file, h->context, &range, 1, PINBROKER_READ, NULL, &pin);
	if (r < 0)
		return r;
	r = pinbroker_bind(h->pb, pin, i);
	if (r >= 0 || is_refusal(r))
		r = pinbroker_list_pins(h->pb, 0, 0, bind_listed, h->pb);
	if (r >= 0)
		r = pinbroker_unpin(h->pb, &pin, 1, &ended, &n_ended);
	return r >= 0 && n_ended != 0 ? -EOWNERDEAD : r;
}

static void *work(void *p)
{
	struct worker *w = p;
	pinbroker *pb = w->h->pb;

	for (unsigned i = 0; i < ROUNDS; i++) {
		int r = work_once(w->h, i);

		if (r < 0 && !is_refusal(r)) {
			w->n_failed++;
			w->error = r;
		}
		/* Each thread has its own last error. */
		if (pinbroker_bind(pb, UINT64_MAX, i) != -EINVAL ||
			pinbroker_last_error(pb)->error != -EINVAL)
			w->n_failed++;
	}
	return NULL;
}

/* A process whose opening for writing waits for the pins that there are. */
static pid_t break_leases(unsigned n)
{
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (pid == 0) {
		while (n-- > 0) {
			int fd = open(file_path, O_RDWR | O_CLOEXEC);

			if (fd < 0)
				_exit(1);
			close(fd);
		}
		_exit(0);
	}
	return pid;
}

static void *dispatch_meanwhile(void *p)
{
	struct holding *h = p;
	struct pollfd pfd = {.fd = pinbroker_get_fd(h->pb), .events = POLLIN};

	while (atomic_load(&working))
		if (poll(&pfd, 1, 10) == 1 && pinbroker_dispatch(h->pb) < 0)
			return (void *)"dispatch";
	return NULL;
}

static void leave_it(struct holding *h, const struct pinbroker_notice *n)
{
	h->seen.let_go = true;
}

static void work_together(bool own_thread)
{
	struct holding h = {.on_notice = leave_it};
	struct worker workers[THREADS] = {};
	pthread_t dispatcher;
	void *failed;
	pid_t breaker;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	holding_connect(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS, own_thread);
	breaker = break_leases(BREAKS);
	atomic_store(&working, true);
	if (!own_thread)
		assert_int_equal(pthread_create(&dispatcher, NULL, dispatch_meanwhile, &h), 0);
	for (size_t i = 0; i < THREADS; i++) {
		workers[i].h = &h;
		assert_int_equal(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
	}
	for (size_t i = 0; i < THREADS; i++) {
		pthread_join(workers[i].thread, NULL);
		if (workers[i].n_failed > 0)
			fail_msg("%u calls failed, one with %d", workers[i].n_failed,
				workers[i].error);
	}
	assert_int_equal(finish(breaker, 0), 0);
	atomic_store(&working, false);
	if (!own_thread) {
		pthread_join(dispatcher, &failed);
		assert_null(failed);
	}
	holding_end(&h);
	world_stop();
}

static void test_threads(void **state)
{
	work_together(false);
}

static void test_threads_and_own_thread(void **state)
{
	work_together(true);
}

static void test_own_thread_lets_go(void **state)
{
	struct holding h = {};
	struct result result;
	pid_t pid;
	int fd;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	holding_connect(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS, true);
	holding_pin(&h);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	holding_end(&h);
	assert_true(h.seen.let_go);
	world_stop();
}

static int find_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	return info->pin == *(uint64_t *)userdata;
}

static void call_everything(struct holding *h, const struct pinbroker_notice *n)
{
	uint64_t client, deadline;
	pinbroker_file *file;

	must(h->pb, pinbroker_get_client(h->pb, &client));
	assert_int_equal(n->client, client);
	if (h->seen.let_go)
		return;
	assert_int_equal(pinbroker_list_pins(h->pb, 0, client, find_pin, &h->pin), 1);
	must(h->pb, pinbroker_extend(h->pb, n->revocation, 1000000, &deadline));
	assert_true(deadline > n->deadline_usec);
	assert_int_equal(pinbroker_open_file(h->pb, dir, PINBROKER_READ, &file), -EMEDIUMTYPE);
	assert_int_equal(pinbroker_dispatch(h->pb), -EBUSY);
	must(h->pb, pinbroker_unpin(h->pb, &h->pin, 1, NULL, NULL));
	h->seen.let_go = true;
}

/* What callbacks may do, they may do in the library's thread. */
static void test_own_thread_may_call(void **state)
{
	struct holding h = {.on_notice = call_everything};
	struct result result;
	pid_t pid;
	int fd;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	holding_connect(&h, PINBROKER_CHANNEL_WATCH, true);
	holding_pin(&h);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	holding_end(&h);
	assert_true(h.seen.let_go);
	world_stop();
}

static atomic_bool released;

static void let_go_before_release(struct holding *h, const struct pinbroker_notice *n)
{
	assert_false(atomic_load(&released));
	h->seen.let_go = true;
	/* The main thread may have been faster. */
	(void)pinbroker_unpin(h->pb, n->pins, n->n_pins, NULL, NULL);
	assert_false(atomic_load(&released));
}

/* The last reference goes while notices come. */
static void test_release_and_notice_at_once(void **state)
{
	world_start("");
	mount_fs("tmpfs");
	make_file();
	for (unsigned i = 0; i < 30; i++) {
		struct holding h = {.on_notice = let_go_before_release};
		pid_t breaker;
		int r;

		atomic_store(&released, false);
		holding_connect(&h, PINBROKER_CHANNEL_WATCH, true);
		do
			r = pinbroker_pin(h.pb, h.file, h.context,
				&(struct pinbroker_range){0, PAGE}, 1, PINBROKER_READ, NULL,
				&h.pin);
		while (r == -EBUSY);
		must(h.pb, r);
		breaker = break_leases(1);
		for (unsigned k = 0; k < 500 * (i % 10); k++)
			sched_yield();
		r = pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL);
		assert_true(r == 0 || r == -ENOENT);
		holding_end(&h);
		atomic_store(&released, true);
		assert_int_equal(finish(breaker, 0), 0);
	}
	world_stop();
}

static int use_in_child(struct holding *h)
{
	pinbroker *pb;
	int r;

	if (pinbroker_unpin(h->pb, &h->pin, 1, NULL, NULL) != -ECHILD ||
		pinbroker_dispatch(h->pb) != -ECHILD || pinbroker_get_version(h->pb) ||
		pinbroker_close_file(h->file) != -ECHILD)
		return 1;
	pinbroker_context_free(h->context);
	pinbroker_file_free(h->file);
	pinbroker_unref(h->pb);
	/* It is free to be a client of its own. */
	r = pinbroker_new("child", socket_path, &pb);
	if (r >= 0)
		r = pinbroker_set_bus_address(pb, bus_address);
	if (r >= 0)
		r = pinbroker_connect(pb);
	if (r >= 0)
		r = pinbroker_get_version(pb) ? 0 : -1;
	pinbroker_unref(pb);
	return r < 0 ? 2 : 0;
}

static void fork_from(bool own_thread)
{
	struct holding h = {};
	struct result result;
	int status, fd;
	pid_t pid;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	holding_connect(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS, own_thread);
	holding_pin(&h);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0)
		_exit(use_in_child(&h));
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	if (own_thread) {
		pid = truncate_start(&fd);
		result = truncate_finish(pid, fd);
		assert_int_equal(result.error, 0);
	} else {
		holding_see_truncate(&h);
	}
	holding_end(&h);
	assert_true(h.seen.let_go);
	world_stop();
}

static void test_child_disturbs_nothing(void **state)
{
	fork_from(false);
}

static void test_child_disturbs_no_thread(void **state)
{
	fork_from(true);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_threads),
		cmocka_unit_test(test_threads_and_own_thread),
		cmocka_unit_test(test_own_thread_lets_go),
		cmocka_unit_test(test_own_thread_may_call),
		cmocka_unit_test(test_release_and_notice_at_once),
		cmocka_unit_test(test_child_disturbs_nothing),
		cmocka_unit_test(test_child_disturbs_no_thread),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
