/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/offload.h"
#include "daemon/util/user.h"
#include "protocol/macro.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define MAX_UNFINISHED 8

static const uint64_t maxima[LIMIT_COUNT] = {[LIMIT_UNFINISHED] = MAX_UNFINISHED};

/* What a test makes fail. */
static unsigned n_threads_to_fail;
static atomic_bool waits_expire;

int __real_pthread_create(
	pthread_t *id, const pthread_attr_t *attributes, void *(*main)(void *), void *userdata);
int __wrap_pthread_create(
	pthread_t *id, const pthread_attr_t *attributes, void *(*main)(void *), void *userdata);
int __real_sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *until);
int __wrap_sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *until);

struct thread {
	void *(*main)(void *);
	void *userdata;
};

static int ended[2]; /* a byte for each thread that is over */
static unsigned n_threads;

static void byte_write(int fd)
{
	assert_int_equal(write(fd, "x", 1), 1);
}

static void bytes_read(int fd, unsigned n)
{
	for (char c; n > 0; n--)
		assert_int_equal(read(fd, &c, 1), 1);
}

static void *thread_main(void *userdata)
{
	struct thread thread = *(struct thread *)userdata;

	free(userdata);
	thread.main(thread.userdata);
	byte_write(ended[1]);
	return NULL;
}

int __wrap_pthread_create(
	pthread_t *id, const pthread_attr_t *attributes, void *(*main)(void *), void *userdata)
{
	struct thread *thread;

	if (n_threads_to_fail > 0) {
		n_threads_to_fail--;
		return EAGAIN;
	}
	thread = malloc(sizeof(*thread));
	*thread = (struct thread){main, userdata};
	n_threads++;
	return __real_pthread_create(id, attributes, thread_main, thread);
}

int __wrap_sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *until)
{
	if (!waits_expire)
		return __real_sem_clockwait(sem, clock, until);
	errno = ETIMEDOUT;
	return -1;
}

static sd_event *event;
static struct users *users;
static struct user *alice, *bob;
static struct offload *offload;
static unsigned n_descriptors;
static int started[2]; /* a byte for each job that begins */
static pthread_t loop_thread;

struct test_job {
	struct job job;
	int gate[2]; /* run() reads a byte; < 0: does not wait */
	bool done;
	bool ran_elsewhere; /* than on the loop's thread, and with all signals blocked */
};

static atomic_uint n_running, n_running_max;
static unsigned n_done;

static unsigned count_descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	assert_non_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void job_run(struct job *job)
{
	struct test_job *t = container_of(job, struct test_job, job);
	unsigned n = ++n_running, max = n_running_max;
	sigset_t blocked;

	while (n > max && !atomic_compare_exchange_weak(&n_running_max, &max, n))
		;
	pthread_sigmask(SIG_SETMASK, NULL, &blocked);
	t->ran_elsewhere = !pthread_equal(pthread_self(), loop_thread) &&
			   sigismember(&blocked, SIGTERM) && sigismember(&blocked, SIGIO) &&
			   sigismember(&blocked, SIGRTMIN);
	byte_write(started[1]);
	if (t->gate[0] >= 0)
		bytes_read(t->gate[0], 1);
	n_running--;
}

static void job_done(struct job *job)
{
	struct test_job *t = container_of(job, struct test_job, job);

	assert_true(pthread_equal(pthread_self(), loop_thread));
	assert_false(t->done);
	t->done = true;
	n_done++;
}

static struct test_job quick_job(void)
{
	return (struct test_job){{.run = job_run, .done = job_done}, {-1, -1}};
}

static struct test_job hanging_job(void)
{
	struct test_job t = quick_job();

	assert_int_equal(pipe2(t.gate, O_CLOEXEC), 0);
	return t;
}

static void release(struct test_job *t)
{
	byte_write(t->gate[1]);
}

static void job_clear(struct test_job *t)
{
	safe_close(t->gate[0]);
	safe_close(t->gate[1]);
}

static void run_until_done(const struct test_job *t)
{
	while (!t->done)
		assert_true(sd_event_run(event, UINT64_MAX) >= 0);
}

static void run_until_finished(void)
{
	while (offload_unfinished(offload) > 0)
		assert_true(sd_event_run(event, UINT64_MAX) >= 0);
}

static int setup(void **state)
{
	n_descriptors = count_descriptors();
	loop_thread = pthread_self();
	n_running = n_running_max = 0;
	n_threads = n_done = 0;
	if (pipe2(started, O_CLOEXEC) < 0 || pipe2(ended, O_CLOEXEC) < 0)
		return -1;
	if (sd_event_new(&event) < 0 || users_new(maxima, &users) < 0 ||
		user_get(users, 1, &alice) < 0 || user_get(users, 2, &bob) < 0)
		return -1;
	return offload_new(event, &offload);
}

static int teardown(void **state)
{
	assert_int_equal(offload_free(offload), 0);
	offload = NULL;
	bytes_read(ended[0], n_threads);
	event = sd_event_unref(event);
	alice = user_unref(alice);
	bob = user_unref(bob);
	users = users_free(users);
	for (int i = 0; i < 2; i++) {
		safe_close(started[i]);
		safe_close(ended[i]);
	}
	assert_int_equal(count_descriptors(), n_descriptors);
	return 0;
}

/* I6: a job that hangs holds up neither other users nor the broker. */
static void test_hanging_job(void **state)
{
	struct test_job hanging[OFFLOAD_RUNNING_PER_USER], waiting = quick_job();
	struct test_job other = quick_job(), own = quick_job();

	for (size_t i = 0; i < ELEMENTS(hanging); i++) {
		hanging[i] = hanging_job();
		assert_int_equal(offload_submit(offload, alice, &hanging[i].job), 0);
	}
	assert_int_equal(offload_submit(offload, alice, &waiting.job), 0);
	bytes_read(started[0], OFFLOAD_RUNNING_PER_USER);

	assert_int_equal(offload_submit(offload, bob, &other.job), 0);
	assert_int_equal(offload_submit(offload, NULL, &own.job), 0);
	run_until_done(&other);
	run_until_done(&own);
	assert_false(waiting.done);
	assert_int_equal(offload_unfinished(offload), OFFLOAD_RUNNING_PER_USER + 1);

	release(&hanging[0]);
	run_until_done(&waiting);
	for (size_t i = 1; i < ELEMENTS(hanging); i++)
		release(&hanging[i]);
	run_until_finished();
	for (size_t i = 0; i < ELEMENTS(hanging); i++)
		job_clear(&hanging[i]);
}

/* I3: what ends a user's pins does not stand behind what else of his hangs. */
static void test_steps_pass_by(void **state)
{
	struct test_job hanging[OFFLOAD_RUNNING_PER_USER + 1], step = quick_job();
	struct test_job reap = quick_job(), sig = quick_job();

	for (size_t i = 0; i < ELEMENTS(hanging); i++) {
		hanging[i] = hanging_job();
		assert_int_equal(offload_submit(offload, alice, &hanging[i].job), 0);
	}
	offload_submit_step(offload, alice, &step.job);
	offload_submit_reap(offload, alice, &reap.job);
	offload_submit_signal(offload, alice, &sig.job);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], ELEMENTS(hanging) + 3);
	run_until_done(&step);
	run_until_done(&reap);
	run_until_done(&sig);
	for (size_t i = 0; i < ELEMENTS(hanging); i++) {
		assert_false(hanging[i].done);
		release(&hanging[i]);
	}
	run_until_finished();
	for (size_t i = 0; i < ELEMENTS(hanging); i++)
		job_clear(&hanging[i]);
}

/* I6: even when every job that the clients' threads can run hangs, the broker's own run. */
static void test_all_client_threads_hang(void **state)
{
	enum { N_USERS = OFFLOAD_CLIENT_THREADS / OFFLOAD_RUNNING_PER_USER };
	struct test_job hanging[OFFLOAD_CLIENT_THREADS], own = quick_job(), late = quick_job();

	for (unsigned i = 0; i < OFFLOAD_CLIENT_THREADS; i++) {
		struct user *user;

		assert_int_equal(user_get(users, 100 + i % N_USERS, &user), 0);
		hanging[i] = hanging_job();
		assert_int_equal(offload_submit(offload, user, &hanging[i].job), 0);
		user_unref(user);
	}
	bytes_read(started[0], OFFLOAD_CLIENT_THREADS);
	assert_int_equal(offload_submit(offload, bob, &late.job), 0);
	assert_int_equal(offload_submit(offload, NULL, &own.job), 0);
	run_until_done(&own);
	assert_false(late.done);

	release(&hanging[7]);
	run_until_done(&late);
	for (unsigned i = 0; i < OFFLOAD_CLIENT_THREADS; i++)
		if (i != 7)
			release(&hanging[i]);
	run_until_finished();
	for (unsigned i = 0; i < OFFLOAD_CLIENT_THREADS; i++)
		job_clear(&hanging[i]);
}

static void test_running_per_user(void **state)
{
	struct test_job jobs[3 * OFFLOAD_RUNNING_PER_USER];

	for (size_t i = 0; i < ELEMENTS(jobs); i++) {
		jobs[i] = hanging_job();
		offload_submit_force(offload, alice, &jobs[i].job);
	}
	bytes_read(started[0], OFFLOAD_RUNNING_PER_USER);
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		release(&jobs[i]);
	run_until_finished();
	assert_int_equal(n_done, ELEMENTS(jobs));
	assert_int_equal(n_running_max, OFFLOAD_RUNNING_PER_USER);
	assert_int_equal(n_threads, OFFLOAD_RUNNING_PER_USER);
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		job_clear(&jobs[i]);
}

/* A user with many jobs waiting does not come before one with a single job. */
static void test_turns(void **state)
{
	struct test_job many[200], single = quick_job();

	for (size_t i = 0; i < ELEMENTS(many); i++) {
		many[i] = i < OFFLOAD_RUNNING_PER_USER ? hanging_job() : quick_job();
		offload_submit_force(offload, alice, &many[i].job);
	}
	bytes_read(started[0], OFFLOAD_RUNNING_PER_USER);
	assert_int_equal(offload_submit(offload, bob, &single.job), 0);
	run_until_done(&single);
	assert_int_equal(n_done, 1);
	for (size_t i = 0; i < OFFLOAD_RUNNING_PER_USER; i++)
		release(&many[i]);

	/* one turn of the loop: 64 at most */
	while (offload_unfinished(offload) > 0) {
		unsigned before = n_done;

		assert_true(sd_event_run(event, UINT64_MAX) >= 0);
		assert_in_range(n_done - before, 0, 64);
	}
	assert_int_equal(n_done, 1 + ELEMENTS(many));
	for (size_t i = 0; i < OFFLOAD_RUNNING_PER_USER; i++)
		job_clear(&many[i]);
}

static void test_unfinished_limit(void **state)
{
	struct test_job jobs[MAX_UNFINISHED], forced = quick_job(), refused = quick_job();

	for (size_t i = 0; i < ELEMENTS(jobs); i++) {
		jobs[i] = hanging_job();
		assert_int_equal(offload_submit(offload, alice, &jobs[i].job), 0);
	}
	assert_int_equal(offload_submit(offload, alice, &refused.job), -EDQUOT);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], MAX_UNFINISHED);
	offload_submit_force(offload, alice, &forced.job);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], MAX_UNFINISHED + 1);
	assert_int_equal(offload_unfinished(offload), MAX_UNFINISHED + 1);

	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		release(&jobs[i]);
	run_until_finished();
	assert_true(forced.done);
	assert_false(refused.done);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], 0);
	assert_int_equal(offload_submit(offload, alice, &refused.job), 0);
	run_until_done(&refused);
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		job_clear(&jobs[i]);
}

/* done() comes on the loop, in the order in which jobs ended. */
static void test_done(void **state)
{
	static const unsigned order[] = {2, 0, 3, 1};
	struct test_job jobs[ELEMENTS(order)];

	for (size_t i = 0; i < ELEMENTS(jobs); i++) {
		jobs[i] = hanging_job();
		assert_int_equal(offload_submit(offload, i < 2 ? alice : NULL, &jobs[i].job), 0);
	}
	bytes_read(started[0], ELEMENTS(jobs));
	for (size_t i = 0; i < ELEMENTS(order); i++) {
		release(&jobs[order[i]]);
		run_until_done(&jobs[order[i]]);
		assert_int_equal(n_done, i + 1);
		assert_true(jobs[order[i]].ran_elsewhere);
	}
	for (size_t i = 0; i < ELEMENTS(jobs); i++)
		job_clear(&jobs[i]);
}

struct chain {
	struct test_job t;
	unsigned n_left;
};

static void chain_done(struct job *job)
{
	struct chain *chain = container_of(job, struct chain, t.job);

	assert_true(alice->used[LIMIT_UNFINISHED] < MAX_UNFINISHED);
	if (--chain->n_left > 0)
		assert_int_equal(offload_submit(offload, alice, job), 0);
	else
		job_done(job);
}

/* done() may submit the next job, even of a user who was at the limit; the user may be let go. */
static void test_submit_from_done(void **state)
{
	struct chain chains[MAX_UNFINISHED];

	for (size_t i = 0; i < ELEMENTS(chains); i++) {
		chains[i] = (struct chain){quick_job(), 10};
		chains[i].t.job.done = chain_done;
		assert_int_equal(offload_submit(offload, alice, &chains[i].t.job), 0);
	}
	run_until_finished();
	assert_int_equal(n_done, ELEMENTS(chains));
}

/* Jobs that hang are left behind without their done(); those that wait are dropped with it. */
static void test_free_while_hanging(void **state)
{
	struct test_job hanging[OFFLOAD_RUNNING_PER_USER], own = hanging_job();
	struct test_job waiting = quick_job();
	struct chain chain = {quick_job(), 2};

	for (size_t i = 0; i < ELEMENTS(hanging); i++) {
		hanging[i] = hanging_job();
		assert_int_equal(offload_submit(offload, alice, &hanging[i].job), 0);
	}
	assert_int_equal(offload_submit(offload, NULL, &own.job), 0);
	bytes_read(started[0], ELEMENTS(hanging) + 1);
	chain.t.job.done = chain_done;
	assert_int_equal(offload_submit(offload, alice, &waiting.job), 0);
	assert_int_equal(offload_submit(offload, alice, &chain.t.job), 0);

	assert_int_equal(offload_free(offload), ELEMENTS(hanging) + 1);
	offload = NULL;
	assert_true(waiting.done);
	assert_true(chain.t.done);
	assert_false(own.done);
	assert_int_equal(n_done, 2);
	assert_int_equal(alice->used[LIMIT_UNFINISHED], ELEMENTS(hanging));

	/* What they find when they come back is gone. */
	for (size_t i = 0; i < ELEMENTS(hanging); i++)
		release(&hanging[i]);
	release(&own);
	bytes_read(ended[0], n_threads);
	n_threads = 0;
	for (size_t i = 0; i < ELEMENTS(hanging); i++) {
		assert_false(hanging[i].done);
		job_clear(&hanging[i]);
		user_discharge(alice, LIMIT_UNFINISHED, 1);
		user_unref(alice);
	}
	assert_false(own.done);
	job_clear(&own);
}

static void test_free_idle(void **state)
{
	struct test_job a = quick_job(), b = quick_job();

	assert_int_equal(offload_free(NULL), 0);
	assert_int_equal(offload_submit(offload, alice, &a.job), 0);
	assert_int_equal(offload_submit(offload, NULL, &b.job), 0);
	run_until_finished();
}

/* A thread that has had no work for a while ends, and the next job has a new one. */
static void test_idle_threads_end(void **state)
{
	waits_expire = true;
	for (unsigned i = 1; i <= 3; i++) {
		struct test_job job = quick_job(), own = quick_job();

		assert_int_equal(offload_submit(offload, alice, &job.job), 0);
		assert_int_equal(offload_submit(offload, NULL, &own.job), 0);
		run_until_finished();
		bytes_read(ended[0], 2);
		assert_int_equal(n_threads, 2);
		n_threads = 0;
	}
	waits_expire = false;
}

/* A job that found no thread is not lost, and does not run on the loop. */
static void test_no_thread(void **state)
{
	struct test_job job = quick_job(), own = quick_job();

	n_threads_to_fail = 5;
	assert_int_equal(offload_submit(offload, alice, &job.job), 0);
	assert_int_equal(offload_submit(offload, NULL, &own.job), 0);
	run_until_finished();
	assert_int_equal(n_threads_to_fail, 0);
	assert_true(job.ran_elsewhere);
	assert_true(own.ran_elsewhere);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
		TEST(test_hanging_job),
		TEST(test_steps_pass_by),
		TEST(test_all_client_threads_hang),
		TEST(test_running_per_user),
		TEST(test_turns),
		TEST(test_unfinished_limit),
		TEST(test_done),
		TEST(test_submit_from_done),
		TEST(test_free_while_hanging),
		TEST(test_free_idle),
		TEST(test_idle_threads_end),
		TEST(test_no_thread),
#undef TEST
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
