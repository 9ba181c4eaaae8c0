/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/closer.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "daemon/util/log.h"
#include "daemon/util/user.h"
#include "protocol/macro.h"

#ifndef sigev_notify_thread_id /* glibc before 2.38 */
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define CLOSES_PER_RUN   64U
#define INTERRUPT_SIGNAL SIGURG
#define INTERRUPT_USEC   1000U
#define NUMBERS_MAX      (16U * 1024 * 1024)

struct closer {
	struct offload *offload;
	sd_event_source *source;
	unsigned n_unfinished;
	struct closer_queue own[CLOSER_KINDS];

	pthread_mutex_t lock; /* of all below, and the lists in the queues */
	int closed_fd;        /* readable while there are `closed` */
	TAILQ_HEAD(, closer_queue) closed;
	int *next; /* of each number that is listed: the one behind it, plus 1 */
	size_t n_numbers;
};

static enum offload_lane lane_of(const struct closer_queue *q)
{
	if (q->kind == CLOSER_CONNECTION)
		return OFFLOAD_CONNECTIONS;
	return q->user ? OFFLOAD_CLOSES : OFFLOAD_FILES;
}

static void list_add(struct closer *c, struct closer_queue *q, int fd)
{
	pthread_mutex_lock(&c->lock);
	c->next[fd] = 0;
	if (q->last > 0)
		c->next[q->last - 1] = fd + 1;
	else
		q->first = fd + 1;
	q->last = fd + 1;
	pthread_mutex_unlock(&c->lock);
}

/* Returns -1 if none is left. */
static int list_take(struct closer *c, struct closer_queue *q)
{
	int fd;

	pthread_mutex_lock(&c->lock);
	fd = q->first - 1;
	if (fd >= 0) {
		q->first = c->next[fd];
		if (q->first == 0)
			q->last = 0;
	}
	pthread_mutex_unlock(&c->lock);
	return fd;
}

static bool list_is_empty(struct closer *c, struct closer_queue *q)
{
	bool empty;

	pthread_mutex_lock(&c->lock);
	empty = q->first == 0;
	pthread_mutex_unlock(&c->lock);
	return empty;
}

static void add_closed(struct closer *c, struct closer_queue *q)
{
	pthread_mutex_lock(&c->lock);
	q->n_closed++;
	if (!q->queued) {
		if (TAILQ_EMPTY(&c->closed))
			(void)eventfd_write(c->closed_fd, 1);
		TAILQ_INSERT_TAIL(&c->closed, q, link);
		q->queued = true;
	}
	pthread_mutex_unlock(&c->lock);
}

static void worker_run(struct job *job)
{
	struct closer_queue *q = container_of(job, struct closer_worker, job)->queue;
	int fd;

	for (unsigned n = 0; n < CLOSES_PER_RUN && (fd = list_take(q->closer, q)) >= 0; n++) {
		interruptible_close(fd);
		add_closed(q->closer, q);
	}
}

static void worker_done(struct job *job);

/* All that are idle, as any of those that are not may hang. */
static void start_worker(struct closer_queue *q)
{
	enum offload_lane lane = lane_of(q);
	unsigned n = lane == OFFLOAD_FILES ? CLOSER_WORKERS : OFFLOAD_CLOSES_PER_USER;

	for (unsigned i = 0; i < n; i++) {
		struct closer_worker *w = &q->workers[i];

		if (w->busy)
			continue;
		w->busy = true;
		w->queue = q;
		w->job.run = worker_run;
		w->job.done = worker_done;
		offload_submit_uncharged(q->closer->offload, lane, q->user, &w->job);
		return;
	}
}

static void discharge(struct closer_queue *q, unsigned n)
{
	struct closer *c = q->closer;

	if (q->user && q->kind == CLOSER_RECEIVED)
		user_discharge(q->user, LIMIT_DESCRIPTORS, n);
	if (q->user)
		user_discharge(q->user,
			q->kind == CLOSER_CONNECTION ? LIMIT_CLIENTS : LIMIT_UNFINISHED, n);
	c->n_unfinished -= n;
	q->n_unfinished -= n;
	if (q->n_unfinished == 0)
		user_unref(TAKE_PTR(q->user)); /* the queue may go with it */
}

/* What is listed is left to the process's exit: closing it here could wait. */
static void abandon(struct closer_queue *q)
{
	unsigned n = 0;

	while (list_take(q->closer, q) >= 0)
		n++;
	if (n > 0)
		discharge(q, n);
}

static void worker_done(struct job *job)
{
	struct closer_worker *w = container_of(job, struct closer_worker, job);
	struct closer_queue *q = w->queue;

	w->busy = false;
	if (offload_is_closed(q->closer->offload))
		abandon(q);
	else if (!list_is_empty(q->closer, q))
		start_worker(q);
}

void closer_collect(struct closer *c)
{
	struct closer_queue *q;

	do {
		unsigned n = 0;

		pthread_mutex_lock(&c->lock);
		q = TAILQ_FIRST(&c->closed);
		if (q) {
			TAILQ_REMOVE(&c->closed, q, link);
			q->queued = false;
			n = q->n_closed;
			q->n_closed = 0;
		}
		pthread_mutex_unlock(&c->lock);
		if (q)
			discharge(q, n);
	} while (q);
}

static int on_closed(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	eventfd_t value;

	/* Before: whatever is closed from now on makes it readable again. */
	(void)eventfd_read(fd, &value);
	closer_collect(userdata);
	return 0;
}

static void start(struct closer *c, struct user *user, enum closer_kind kind, int fd)
{
	struct closer_queue *q = user ? &user->closers[kind] : &c->own[kind];

	if ((size_t)fd >= c->n_numbers) {
		log_error("Descriptor %d is beyond the limit of the start, and stays open.", fd);
		if (user && kind == CLOSER_CONNECTION)
			user_discharge(user, LIMIT_CLIENTS, 1);
		return;
	}
	/* Workers read it, and they may be at work. */
	if (q->closer != c)
		q->closer = c;
	q->kind = kind;
	if (!q->user && user)
		q->user = user_ref(user);
	q->n_unfinished++;
	c->n_unfinished++;
	if (user && kind == CLOSER_RECEIVED)
		user_charge_force(user, LIMIT_UNFINISHED, 1);
	list_add(c, q, fd);
	start_worker(q);
}

int offload_close(struct offload *o, struct user *user, int fd)
{
	if (fd >= 0)
		start(offload_get_closer(o), user, CLOSER_RECEIVED, fd);
	return -1;
}

int offload_close_connection(struct offload *o, struct user *user, int fd)
{
	if (fd >= 0)
		start(offload_get_closer(o), user, CLOSER_CONNECTION, fd);
	return -1;
}

unsigned closer_unfinished(const struct closer *c)
{
	return c->n_unfinished;
}

/* As many as there can be; the kernel gives memory once it is used. */
static int allocate_numbers(struct closer *c)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		return -errno;
	c->n_numbers = limit.rlim_cur < NUMBERS_MAX ? limit.rlim_cur : NUMBERS_MAX;
	c->next = mmap(NULL, c->n_numbers * sizeof(*c->next), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (c->next != MAP_FAILED)
		return 0;
	c->next = NULL;
	return -errno;
}

static void on_interrupt(int sig)
{
}

int closer_new(sd_event *event, struct offload *offload, struct closer **ret)
{
	struct sigaction action = {.sa_handler = on_interrupt};
	struct closer *c;
	int r;

	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->offload = offload;
	pthread_mutex_init(&c->lock, NULL);
	TAILQ_INIT(&c->closed);
	r = allocate_numbers(c);
	c->closed_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (r >= 0 && (c->closed_fd < 0 || sigaction(INTERRUPT_SIGNAL, &action, NULL) < 0))
		r = -errno;
	if (r >= 0)
		r = sd_event_add_io(event, &c->source, c->closed_fd, EPOLLIN, on_closed, c);
	if (r < 0) {
		closer_free(c);
		return r;
	}
	*ret = c;
	return 0;
}

void closer_detach(struct closer *c)
{
	if (!c)
		return;
	closer_collect(c);
	c->source = sd_event_source_disable_unref(c->source);
}

void closer_free(struct closer *c)
{
	if (!c)
		return;
	assert(!c->source);
	safe_close(c->closed_fd);
	if (c->next)
		munmap(c->next, c->n_numbers * sizeof(*c->next));
	pthread_mutex_destroy(&c->lock);
	free(c);
}

static _Thread_local timer_t interrupter;
static _Thread_local bool interrupts;

void interrupter_start(void)
{
	struct sigevent event = {
		.sigev_notify = SIGEV_THREAD_ID,
		.sigev_signo = INTERRUPT_SIGNAL,
		.sigev_notify_thread_id = gettid(),
	};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, INTERRUPT_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	interrupts = timer_create(CLOCK_MONOTONIC, &event, &interrupter) == 0;
}

void interrupter_stop(void)
{
	if (interrupts)
		timer_delete(interrupter);
	interrupts = false;
}

/* Only sockets linger; what else waits might not take being interrupted well. */
static bool is_socket(int fd)
{
	socklen_t size = sizeof(int);
	int type;

	return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0;
}

static void set_interrupts(uint64_t usec)
{
	struct timespec ts = {(time_t)(usec / USEC_PER_SEC), (long)(usec % USEC_PER_SEC * 1000)};

	timer_settime(interrupter, 0, &(struct itimerspec){ts, ts}, NULL);
}

bool interrupts_begin(uint64_t usec)
{
	if (interrupts)
		set_interrupts(usec);
	return interrupts;
}

void interrupts_end(void)
{
	set_interrupts(0);
}

void interruptible_close(int fd)
{
	if (!is_socket(fd) || !interrupts_begin(INTERRUPT_USEC)) {
		close(fd);
		return;
	}
	close(fd);
	interrupts_end();
}
