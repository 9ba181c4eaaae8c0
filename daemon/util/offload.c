/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/offload.h"

#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/eventfd.h>

#include "daemon/util/closer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "daemon/util/user.h"
#include "protocol/macro.h"

#define STACK_SIZE    (256U * 1024)
#define IDLE_SEC      10
#define RETRY_USEC    (100 * USEC_PER_MSEC)
#define DONE_PER_TURN 64U
#define END_WAIT_USEC (200 * USEC_PER_MSEC)

struct lane;

struct thread {
	struct offload *offload; /* a reference, while `taken` */
	struct lane *lane;
	struct job *running;
	bool taken;
};

/* Threads that serve the same queues. They wait for a semaphore: to signal a condition variable can wait itself (glibc
 * before 2.41), for a thread that was woken before and does not get a CPU. */
struct lane {
	sem_t work; /* one for each thread that was promised, and has not noticed */
	TAILQ_HEAD(, offload_queue) ready; /* queues with a job that may start, in turn */
	unsigned n_running_max;            /* of a queue */
	bool closes;                       /* its threads' closes are interrupted */
	struct thread *threads; /* offload::threads */
	unsigned n_threads_max;
	unsigned n_threads;
	unsigned n_idle; /* waiting, and not yet promised to a job */
};

/* Lives until the pool is freed and the last thread has come back. */
struct offload {
	pthread_mutex_t lock; /* all down to `closed` */
	unsigned n_refs;      /* the loop's, and each thread's */
	struct lane lanes[OFFLOAD_LANES];
	struct thread *threads; /* owned */
	unsigned n_threads;
	struct offload_queue own[OFFLOAD_LANES]; /* the broker's */
	struct job_list
		completed; /* ran, done() not called; done_fd is readable while there are any */
	int done_fd;
	bool closed; /* written by the loop */

	/* never changes */
	pthread_attr_t attributes;

	/* the loop's */
	sd_event_source *done_source;
	sd_event_source *retry_source;
	unsigned n_unfinished;
	struct closer *closer; /* owned */
};

static void offload_unlock_and_unref(struct offload *o)
{
	bool last = --o->n_refs == 0;

	pthread_mutex_unlock(&o->lock);
	if (!last)
		return;
	pthread_attr_destroy(&o->attributes);
	for (size_t i = 0; i < OFFLOAD_LANES; i++)
		sem_destroy(&o->lanes[i].work);
	pthread_mutex_destroy(&o->lock);
	closer_free(o->closer);
	free(o->threads);
	free(o);
}

static void queue_make_ready(struct lane *lane, struct offload_queue *q)
{
	if (q->queued || STAILQ_EMPTY(&q->jobs) || q->n_running >= lane->n_running_max)
		return;
	TAILQ_INSERT_TAIL(&lane->ready, q, link);
	q->queued = true;
}

static struct job *job_take(struct lane *lane)
{
	struct offload_queue *q = TAILQ_FIRST(&lane->ready);
	struct job *job;

	if (!q)
		return NULL;
	TAILQ_REMOVE(&lane->ready, q, link);
	q->queued = false;
	q->n_running++;
	job = STAILQ_FIRST(&q->jobs);
	STAILQ_REMOVE_HEAD(&q->jobs, link);
	queue_make_ready(lane, q);
	return job;
}

static void job_complete(struct offload *o, struct lane *lane, struct job *job)
{
	job->queue->n_running--;
	queue_make_ready(lane, job->queue);
	if (STAILQ_EMPTY(&o->completed))
		(void)eventfd_write(o->done_fd, 1);
	STAILQ_INSERT_TAIL(&o->completed, job, link);
}

/* Returns whether there may be work: false when none came for a while, or the pool is gone. */
static bool lane_wait(struct offload *o, struct lane *lane)
{
	struct timespec until;
	int r;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += IDLE_SEC;
	lane->n_idle++;
	pthread_mutex_unlock(&o->lock);
	do
		r = sem_clockwait(&lane->work, CLOCK_MONOTONIC, &until);
	while (r < 0 && errno == EINTR);
	pthread_mutex_lock(&o->lock);
	if (o->closed)
		return false;
	/* who promised has taken this thread off n_idle, or another one that took this one's promise */
	if (r < 0 && sem_trywait(&lane->work) < 0) {
		lane->n_idle--;
		return false;
	}
	return true;
}

static void *thread_main(void *userdata)
{
	struct thread *thread = userdata;
	struct offload *o = thread->offload;
	struct lane *lane = thread->lane;
	bool closes = lane->closes; /* the lane may have gone at the end */

	if (closes)
		interrupter_start();

	pthread_mutex_lock(&o->lock);
	do {
		struct job *job;

		while (!o->closed && (job = job_take(lane))) {
			thread->running = job;
			pthread_mutex_unlock(&o->lock);
			job->run(job);
			pthread_mutex_lock(&o->lock);
			thread->running = NULL;
			/* offload_free() did not wait for the job: nobody is left to take it. */
			if (!o->closed)
				job_complete(o, lane, job);
		}
	} while (!o->closed && lane_wait(o, lane));
	thread->taken = false;
	lane->n_threads--;
	offload_unlock_and_unref(o);
	if (closes)
		interrupter_stop();
	return NULL;
}

static int lane_start_thread(struct offload *o, struct lane *lane)
{
	struct thread *thread = lane->threads;
	pthread_t id;
	int r;

	while (thread->taken)
		thread++;
	thread->offload = o;
	thread->lane = lane;
	r = pthread_create(&id, &o->attributes, thread_main, thread);
	if (r != 0)
		return -r;
	thread->taken = true;
	lane->n_threads++;
	o->n_refs++;
	return 0;
}

/* Finds a thread for one more job that may start. Returns negative errno if one is missing. */
static int lane_wake(struct offload *o, struct lane *lane)
{
	if (lane->n_idle > 0) {
		/* Promised at once: two jobs in a row must not count on the same thread. */
		lane->n_idle--;
		(void)sem_post(&lane->work);
		return 0;
	}
	if (lane->n_threads < lane->n_threads_max)
		return lane_start_thread(o, lane);
	return 0;
}

static int retry_arm(struct offload *o)
{
	int r = sd_event_source_set_time_relative(o->retry_source, RETRY_USEC);

	return r < 0 ? r : sd_event_source_set_enabled(o->retry_source, SD_EVENT_ONESHOT);
}

static bool lane_retry(struct offload *o, struct lane *lane)
{
	if (TAILQ_EMPTY(&lane->ready) || lane->n_threads >= lane->n_threads_max)
		return false;
	(void)lane_wake(o, lane);
	return true;
}

/* No thread could be started when a job came, and those that exist may hang. */
static int retry_dispatch(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct offload *o = userdata;
	bool again = false;

	pthread_mutex_lock(&o->lock);
	for (size_t i = 0; i < OFFLOAD_LANES; i++)
		again |= lane_retry(o, &o->lanes[i]);
	pthread_mutex_unlock(&o->lock);
	return again ? retry_arm(o) : 0;
}

static bool queue_may_start_last(const struct lane *lane, const struct offload_queue *q)
{
	unsigned n = q->n_running;
	struct job *job;

	STAILQ_FOREACH(job, &q->jobs, link)
		if (++n > lane->n_running_max)
			return false;
	return true;
}

static void job_submit(struct offload *o, enum offload_lane l, struct user *user, struct job *job)
{
	struct offload_queue *q = user ? &user->queues[l] : &o->own[l];
	struct lane *lane = &o->lanes[l];
	int r = 0;

	job->user = user ? user_ref(user) : NULL;
	job->queue = q;

	pthread_mutex_lock(&o->lock);
	if (o->closed) {
		STAILQ_INSERT_TAIL(&o->completed, job, link);
	} else {
		if (!q->jobs.stqh_last)
			STAILQ_INIT(&q->jobs);
		STAILQ_INSERT_TAIL(&q->jobs, job, link);
		queue_make_ready(lane, q);
		if (queue_may_start_last(lane, q))
			r = lane_wake(o, lane);
	}
	pthread_mutex_unlock(&o->lock);

	if (r < 0 && sd_event_source_get_enabled(o->retry_source, NULL) <= 0) {
		log_errno_limit(
			LOG_WARNING, r, LOG_RESOURCE_THREAD, "Cannot start a thread, trying again");
		(void)retry_arm(o);
	}
}

/* With the user's limit charged already. */
static void job_submit_charged(struct offload *o, enum offload_lane lane, struct user *user,
			       struct job *job)
{
	job->charged = true;
	o->n_unfinished++;
	job_submit(o, lane, user, job);
}

static void job_submit_force(struct offload *o, enum offload_lane lane, struct user *user,
			     struct job *job)
{
	if (user)
		user_charge_force(user, LIMIT_UNFINISHED, 1);
	job_submit_charged(o, lane, user, job);
}

int offload_submit(struct offload *o, struct user *user, struct job *job)
{
	if (user) {
		int r = user_charge(user, LIMIT_UNFINISHED, 1);

		if (r < 0)
			return r;
	}
	job_submit_charged(o, user ? OFFLOAD_CLIENTS : OFFLOAD_SYSTEM, user, job);
	return 0;
}

void offload_submit_force(struct offload *o, struct user *user, struct job *job)
{
	job_submit_force(o, user ? OFFLOAD_CLIENTS : OFFLOAD_SYSTEM, user, job);
}

void offload_submit_step(struct offload *o, struct user *user, struct job *job)
{
	job_submit_force(o, OFFLOAD_STEPS, user, job);
}

void offload_submit_reap(struct offload *o, struct user *user, struct job *job)
{
	job_submit_force(o, OFFLOAD_REAPS, user, job);
}

void offload_submit_signal(struct offload *o, struct user *user, struct job *job)
{
	job_submit_force(o, OFFLOAD_SIGNALS, user, job);
}

void offload_submit_uncharged(struct offload *o, enum offload_lane lane, struct user *user,
			      struct job *job)
{
	job->charged = false;
	job_submit(o, lane, user, job);
}

bool offload_is_closed(const struct offload *o)
{
	return o->closed; /* written by the loop alone */
}

struct closer *offload_get_closer(struct offload *o)
{
	return o->closer;
}

unsigned offload_unfinished(const struct offload *o)
{
	return o->n_unfinished + closer_unfinished(o->closer);
}

static bool job_finish_next(struct offload *o)
{
	uint64_t begin_usec;
	struct user *user;
	struct job *job;

	pthread_mutex_lock(&o->lock);
	job = STAILQ_FIRST(&o->completed);
	if (job) {
		STAILQ_REMOVE_HEAD(&o->completed, link);
		if (STAILQ_EMPTY(&o->completed)) {
			eventfd_t count;

			(void)eventfd_read(o->done_fd, &count);
		}
	}
	pthread_mutex_unlock(&o->lock);
	if (!job)
		return false;

	/* Not charged any more when done() runs: it may want to submit the next. */
	user = TAKE_PTR(job->user);
	if (job->charged) {
		if (user)
			user_discharge(user, LIMIT_UNFINISHED, 1);
		o->n_unfinished--;
	}
	begin_usec = turn_cpu_usec();
	job->done(job);
	if (user)
		user_spend(user, turn_cpu_usec() - begin_usec);
	user_unref(user);
	return true;
}

static int done_dispatch(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct slice slice = slice_begin();
	struct offload *o = userdata;

	for (unsigned i = 0; i < DONE_PER_TURN && job_finish_next(o); i++)
		if (slice_is_over(&slice))
			break;
	return 0;
}

/* Those in which strangers' work can hang are so large that it takes 32 users, or 64, to fill one. */
static const struct {
	unsigned n_threads, n_running;
	bool closes;
} lanes[OFFLOAD_LANES] = {
	[OFFLOAD_CLIENTS] = { OFFLOAD_CLIENT_THREADS, OFFLOAD_RUNNING_PER_USER },
	[OFFLOAD_STEPS] = { 128, OFFLOAD_RUNNING_PER_USER },
	[OFFLOAD_REAPS] = { 128, OFFLOAD_RUNNING_PER_USER, true },
	[OFFLOAD_SIGNALS] = { 64, OFFLOAD_RUNNING_PER_USER },
	[OFFLOAD_CLOSES] = { 128, OFFLOAD_CLOSES_PER_USER, true },
	[OFFLOAD_CONNECTIONS] = { 32, OFFLOAD_CLOSES_PER_USER, true },
	[OFFLOAD_FILES] = { 4, 4, true },
	[OFFLOAD_SETTLES] = { 4, 4 },
	[OFFLOAD_SYSTEM] = { 4, 4 },
};

static int lanes_init(struct offload *o)
{
	struct thread *threads;

	for (size_t i = 0; i < OFFLOAD_LANES; i++)
		o->n_threads += lanes[i].n_threads;
	threads = o->threads = calloc(o->n_threads, sizeof(*threads));
	if (!threads)
		return -ENOMEM;
	for (size_t i = 0; i < OFFLOAD_LANES; i++) {
		struct lane *lane = &o->lanes[i];

		(void)sem_init(&lane->work, 0, 0);
		TAILQ_INIT(&lane->ready);
		lane->n_running_max = lanes[i].n_running;
		lane->closes = lanes[i].closes;
		lane->n_threads_max = lanes[i].n_threads;
		lane->threads = threads;
		threads += lanes[i].n_threads;
	}
	return 0;
}

static int attributes_init(pthread_attr_t *attributes)
{
	sigset_t all;
	int r;

	sigfillset(&all);
	r = pthread_attr_setsigmask_np(attributes, &all);
	if (r == 0)
		r = pthread_attr_setdetachstate(attributes, PTHREAD_CREATE_DETACHED);
	if (r == 0)
		r = pthread_attr_setstacksize(attributes, STACK_SIZE);
	return -r;
}

static void offload_freep(struct offload **o)
{
	offload_free(*o);
}

int offload_new(sd_event *event, struct offload **ret)
{
	_cleanup_(offload_freep) struct offload *o = calloc(1, sizeof(*o));
	int r;

	if (!o)
		return -ENOMEM;
	o->n_refs = 1;
	o->done_fd = -1;
	pthread_mutex_init(&o->lock, NULL);
	pthread_attr_init(&o->attributes);
	STAILQ_INIT(&o->completed);

	r = lanes_init(o);
	if (r >= 0)
		r = attributes_init(&o->attributes);
	if (r >= 0)
		r = closer_new(event, o, &o->closer);
	if (r < 0)
		return r;
	o->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (o->done_fd < 0)
		return -errno;
	r = sd_event_add_io(event, &o->done_source, o->done_fd, EPOLLIN, done_dispatch, o);
	if (r < 0)
		return r;
	r = sd_event_add_time_relative(
		event, &o->retry_source, CLOCK_MONOTONIC, 0, 0, retry_dispatch, o);
	if (r < 0)
		return r;
	r = sd_event_source_set_enabled(o->retry_source, SD_EVENT_OFF);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(o);
	return 0;
}

/* A queue has jobs waiting only while it is ready or some of its jobs run. Returns how many run on. */
static unsigned drop_waiting(struct offload *o)
{
	unsigned n_left = 0;

	for (size_t i = 0; i < OFFLOAD_LANES; i++) {
		struct offload_queue *q;

		while ((q = TAILQ_FIRST(&o->lanes[i].ready))) {
			TAILQ_REMOVE(&o->lanes[i].ready, q, link);
			q->queued = false;
			STAILQ_CONCAT(&o->completed, &q->jobs);
		}
	}
	for (size_t i = 0; i < o->n_threads; i++)
		if (o->threads[i].running) {
			STAILQ_CONCAT(&o->completed, &o->threads[i].running->queue->jobs);
			n_left++;
		}
	return n_left;
}

static bool is_running(struct offload *o)
{
	bool running = false;

	pthread_mutex_lock(&o->lock);
	for (size_t i = 0; i < o->n_threads; i++)
		running |= o->threads[i].running != NULL;
	pthread_mutex_unlock(&o->lock);
	return running;
}

/* What does not hang comes back. */
static void wait_for_running(struct offload *o)
{
	uint64_t now, end = now_usec() + END_WAIT_USEC;
	eventfd_t value;

	while (is_running(o) && (now = now_usec()) < end) {
		struct pollfd pfd = { .fd = o->done_fd, .events = POLLIN };

		if (poll(&pfd, 1, (int)((end - now) / USEC_PER_MSEC) + 1) > 0)
			(void)eventfd_read(o->done_fd, &value);
		while (job_finish_next(o))
			;
		closer_collect(o->closer);
	}
}

unsigned offload_free(struct offload *o)
{
	unsigned n_left;

	if (!o)
		return 0;
	sd_event_source_disable_unref(o->done_source);
	sd_event_source_disable_unref(o->retry_source);
	wait_for_running(o);

	pthread_mutex_lock(&o->lock);
	o->closed = true;
	for (size_t i = 0; i < OFFLOAD_LANES; i++)
		for (; o->lanes[i].n_idle > 0; o->lanes[i].n_idle--)
			(void)sem_post(&o->lanes[i].work);
	n_left = drop_waiting(o);
	pthread_mutex_unlock(&o->lock);

	while (job_finish_next(o))
		;
	closer_detach(o->closer);

	pthread_mutex_lock(&o->lock);
	o->done_fd = safe_close(o->done_fd);
	offload_unlock_and_unref(o);
	return n_left;
}
