/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

static bool backoff_due(const struct backoff *b)
{
	return b->at != USEC_INFINITY && b->at <= now_usec();
}

static void timer_arm(pinbroker *pb)
{
	const uint64_t times[] = {
		pb->watch_retry.at, pb->request_retry.at, pb->bus_retry.at, pb->bus_wake_at};
	struct itimerspec its = {};
	uint64_t at = USEC_INFINITY;

	for (size_t i = 0; i < ELEMENTS(times); i++)
		at = times[i] < at ? times[i] : at;
	if (at != USEC_INFINITY) {
		/* 0 would turn the timer off. */
		at = at > 0 ? at : 1;
		its.it_value.tv_sec = (time_t)(at / USEC_PER_SEC);
		its.it_value.tv_nsec = (long)(at % USEC_PER_SEC * 1000);
	}
	timerfd_settime(pb->timer_fd, TFD_TIMER_ABSTIME, &its, NULL);
}

static bool bus_name_is_due(const pinbroker *pb)
{
	return pb->bus_ready && pb->bus_owner_known &&
	       (!pb->bus_name_said || strcmp(pb->bus_name_said, pb->bus_name) != 0);
}

/* A refusal to take the bus name changes nothing: only a broken connection is a failure. */
static int request_attend_locked(pinbroker *pb, uint64_t until_usec)
{
	int r;

	if (request_is_broken(pb)) {
		r = request_restore(pb, until_usec);
		if (r < 0)
			return r;
	}
	if (bus_name_is_due(pb)) {
		r = request_hello(pb, pb->bus_name, until_usec);
		if (!pb->request)
			return r;
	}
	return 0;
}

static void request_attend(pinbroker *pb)
{
	struct backoff *retry = &pb->request_retry;

	if (retry->at != USEC_INFINITY && !backoff_due(retry))
		return;
	if (!call_trylock(pb))
		return;
	atomic_store(&pb->attention, false);
	if (request_attend_locked(pb, now_usec() + PATIENCE_USEC) < 0)
		backoff_down(retry);
	else if (retry->at != USEC_INFINITY)
		backoff_up(retry);
	pthread_mutex_unlock(&pb->call_lock);
}

static void dispatch_events(pinbroker *pb)
{
	struct epoll_event events[8];
	uint64_t value;
	int n;

	n = epoll_wait(pb->epoll_fd, events, ELEMENTS(events), 0);
	for (int i = 0; i < n; i++)
		switch (events[i].data.u32) {
		case SOURCE_WATCH:
			watch_dispatch(pb);
			break;
		case SOURCE_BUS:
			bus_dispatch(pb);
			break;
		case SOURCE_TIMER:
			if (read(pb->timer_fd, &value, sizeof(value)) < 0)
				continue;
			break;
		default:
			break;
		}
}

static void dispatch_timers(pinbroker *pb)
{
	if (pb->bus_wake_at <= now_usec())
		bus_dispatch(pb);
	if (backoff_due(&pb->bus_retry))
		bus_start(pb);
	if (backoff_due(&pb->watch_retry))
		watch_start(pb);
}

/* Nothing can be restored any more. */
static void dispatch_lost(pinbroker *pb)
{
	watch_stop(pb);
	bus_stop(pb);
	pb->watch_retry.at = pb->request_retry.at = USEC_INFINITY;
	call_lock(pb);
	request_drop(pb);
	pthread_mutex_unlock(&pb->call_lock);
}

/* The other channel broke when the broker went, and waits for it to come back. */
static void watch_attend(pinbroker *pb)
{
	if (!atomic_exchange(&pb->resumed, false))
		return;
	backoff_reset(&pb->watch_retry);
	if (backoff_due(&pb->watch_retry))
		watch_start(pb);
}

static int dispatch_locked(pinbroker *pb)
{
	eventfd_t value;
	bool lost;
	int n = 0;

	if (!atomic_load(&pb->lost)) {
		dispatch_events(pb);
		/* Somebody waits for this; the rest can wait. */
		n = notices_deliver(pb);
		dispatch_timers(pb);
		request_attend(pb);
		watch_attend(pb);
	}
	eventfd_read(pb->wake_fd, &value);
	lost = atomic_load(&pb->lost);
	if (lost)
		dispatch_lost(pb);
	timer_arm(pb);

	n += notices_deliver(pb);
	if (lost && !pb->lost_told && is_held(pb)) {
		pb->lost_told = true;
		if (pb->lost_callback)
			pb->lost_callback(pb, pb->lost_userdata);
	}
	return lost ? -ENOTRECOVERABLE : n;
}

static int dispatch(pinbroker *pb)
{
	int r;

	if (pthread_mutex_trylock(&pb->dispatch_lock) != 0)
		return error_set(pb, -EBUSY,
			"pinbroker_dispatch() is running already, in this thread or another.");
	r = dispatch_locked(pb);
	pthread_mutex_unlock(&pb->dispatch_lock);
	return r == -ENOTRECOVERABLE ? check_usable(pb) : r;
}

EXPORT int pinbroker_dispatch(pinbroker *pb)
{
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	if (!atomic_load(&pb->connected))
		return error_set(pb, -ENOTCONN, "Call pinbroker_connect() first.");
	if (pb->use_thread)
		return error_set(pb, -EBUSY, "This handle has a thread that dispatches.");
	/* A callback may let the handle go. */
	pinbroker_ref(pb);
	r = dispatch(pb);
	pinbroker_unref(pb);
	return r;
}

/* ---- A thread of the library's own ---- */

/* Without a reference: the last unref, by another thread, waits for this one to end. */
static void *thread_main(void *p)
{
	pinbroker *pb = p;
	struct pollfd pfds[] = {
		{.fd = pb->thread_stop_fd, .events = POLLIN},
		{.fd = pb->epoll_fd, .events = POLLIN},
	};

	for (;;) {
		if (poll(pfds, ELEMENTS(pfds), -1) < 0)
			continue;
		if (pfds[0].revents)
			return NULL;
		if (dispatch(pb) == -ENOTRECOVERABLE)
			pfds[1].fd = -1;
		if (pb->thread_frees) {
			pinbroker_free(pb);
			return NULL;
		}
	}
}

static int thread_start(pinbroker *pb)
{
	sigset_t all, old;
	int r;

	pb->thread_stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pb->thread_stop_fd < 0)
		return -errno;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = -pthread_create(&pb->thread, NULL, thread_main, pb);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r < 0)
		pb->thread_stop_fd = safe_close(pb->thread_stop_fd);
	pb->thread_running = r >= 0;
	return r;
}

bool thread_stop(pinbroker *pb)
{
	if (!pb->thread_running || pb->pid != getpid())
		return true;
	if (pthread_equal(pb->thread, pthread_self())) {
		pthread_detach(pb->thread);
		pb->thread_frees = true;
		return false;
	}
	eventfd_write(pb->thread_stop_fd, 1);
	pthread_join(pb->thread, NULL);
	pb->thread_running = false;
	return true;
}

/* ---- Connecting ---- */

static int connect_locked(pinbroker *pb)
{
	int r;

	if (pb->channels & PINBROKER_CHANNEL_BUS) {
		bus_start(pb);
		bus_await(pb, now_usec() + PATIENCE_USEC);
	}
	call_lock(pb);
	r = request_connect(pb);
	pthread_mutex_unlock(&pb->call_lock);
	if (r < 0)
		return r;
	backoff_up(&pb->request_retry);
	if (pb->channels & PINBROKER_CHANNEL_WATCH)
		watch_start(pb);
	timer_arm(pb);
	atomic_store(&pb->connected, true);
	if (!pb->use_thread)
		return 0;
	r = thread_start(pb);
	return r < 0 ? error_set(pb, r, "Cannot make a thread: %s.", strerror(-r)) : 0;
}

EXPORT int pinbroker_connect(pinbroker *pb)
{
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	if (pthread_mutex_trylock(&pb->dispatch_lock) != 0)
		return error_set(pb, -EBUSY, "Another thread is using this handle.");
	if (atomic_load(&pb->connected))
		r = error_set(pb, -EISCONN, "The handle is connected already.");
	else
		r = connect_locked(pb);
	if (r < 0 && r != -EISCONN) {
		atomic_store(&pb->connected, false);
		watch_stop(pb);
		bus_stop(pb);
		pb->watch_retry.at = USEC_INFINITY;
		request_forget(pb);
	}
	pthread_mutex_unlock(&pb->dispatch_lock);
	return r;
}
