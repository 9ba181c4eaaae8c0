/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#define DEFAULT_SOCKET "/run/pinbroker/org.pinbroker"

/* ---- What the caller polls ---- */

int poll_add(pinbroker *pb, int fd, uint32_t events, enum source source)
{
	struct epoll_event e = {.events = events, .data.u32 = source};

	return epoll_ctl(pb->epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

void poll_change(pinbroker *pb, int fd, uint32_t events, enum source source)
{
	struct epoll_event e = {.events = events, .data.u32 = source};

	epoll_ctl(pb->epoll_fd, EPOLL_CTL_MOD, fd, &e);
}

/* Not left to close(): a forked child may have the descriptor too, and would keep it registered. */
void poll_remove(pinbroker *pb, int fd)
{
	epoll_ctl(pb->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

void wake(pinbroker *pb)
{
	eventfd_write(pb->wake_fd, 1);
}

void mark_lost(pinbroker *pb)
{
	atomic_store(&pb->lost, true);
	wake(pb);
}

/* ---- The call lock ---- */

void call_lock(pinbroker *pb)
{
	pthread_mutex_lock(&pb->call_lock);
}

/* The dispatcher does not wait for a call in progress: that may itself wait for what a callback is
 * going to do. Whoever has the lock wakes the dispatcher when it is done. */
bool call_trylock(pinbroker *pb)
{
	if (pthread_mutex_trylock(&pb->call_lock) == 0)
		return true;
	atomic_store(&pb->attention, true);
	return pthread_mutex_trylock(&pb->call_lock) == 0;
}

void call_unlock(pinbroker *pb)
{
	bool broken = !pb->request;

	pthread_mutex_unlock(&pb->call_lock);
	if (atomic_load(&pb->attention) || atomic_load(&pb->resumed) || broken)
		wake(pb);
}

/* ---- Back-off ---- */

void backoff_up(struct backoff *b)
{
	b->up_since = now_usec();
	b->at = USEC_INFINITY;
}

void backoff_down(struct backoff *b)
{
	uint64_t now = now_usec();

	if (b->next == 0 || (b->up_since > 0 && now - b->up_since > b->last))
		b->next = b->first;
	b->up_since = 0;
	b->at = now + b->next;
	b->next = b->next * 2 < b->last ? b->next * 2 : b->last;
}

void backoff_reset(struct backoff *b)
{
	b->next = 0;
	if (b->at != USEC_INFINITY)
		b->at = 0;
}

/* ---- The handle ---- */

int check_process(pinbroker *pb)
{
	if (pb->pid != getpid())
		return error_set(pb, -ECHILD,
			"This handle was made by process %d. A child has to make its own.",
			(int)pb->pid);
	return 0;
}

int check_usable(pinbroker *pb)
{
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	if (!atomic_load(&pb->connected))
		return error_set(pb, -ENOTCONN, "Call pinbroker_connect() first.");
	if (atomic_load(&pb->lost))
		return error_set(pb, -ENOTRECOVERABLE,
			"The broker at %s has forgotten this client and no longer protects "
			"its pins. Let go of them, and open the files anew.",
			pb->socket_path);
	return 0;
}

static int check_unconnected(pinbroker *pb)
{
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	if (atomic_load(&pb->connected))
		return error_set(pb, -EISCONN, "The handle is connected already.");
	return 0;
}

static int replace_string(char **s, const char *value)
{
	char *copy = NULL;

	if (value) {
		copy = strdup(value);
		if (!copy)
			return -ENOMEM;
	}
	free(*s);
	*s = copy;
	return 0;
}

static void close_descriptors(pinbroker *pb)
{
	safe_close(pb->epoll_fd);
	safe_close(pb->timer_fd);
	safe_close(pb->wake_fd);
	safe_close(pb->thread_stop_fd);
}

static bool is_unlocked(pthread_mutex_t *lock)
{
	return pthread_mutex_trylock(lock) == 0 && pthread_mutex_unlock(lock) == 0;
}

/* In a forked child. Whether no other thread was at anything when the process forked. */
static bool is_whole(pinbroker *pb)
{
	return is_unlocked(&pb->dispatch_lock) && is_unlocked(&pb->call_lock) &&
	       is_unlocked(&pb->notice_lock);
}

/* The epoll set is the parent's too, and sd-bus refuses to be used by a child. */
static void release_copies(pinbroker *pb)
{
	connection_free(pb->watch);
	pb->request = connection_free(pb->request);
	safe_close(pb->bus_fd);
	request_forget(pb);
	free(pb->bus_name);
	free(pb->bus_owner);
}

void pinbroker_free(pinbroker *pb)
{
	if (pb->pid == getpid()) {
		watch_stop(pb);
		bus_stop(pb);
		request_forget(pb);
	} else if (is_whole(pb)) {
		release_copies(pb);
	} else {
		close_descriptors(pb);
		return;
	}
	close_descriptors(pb);
	notices_done(pb);
	free(pb->bus_name_said);
	free(pb->bus_address);
	free(pb->socket_path);
	free(pb->name);
	pthread_mutex_destroy(&pb->notice_lock);
	pthread_mutex_destroy(&pb->dispatch_lock);
	pthread_mutex_destroy(&pb->call_lock);
	free(pb);
}

static void pinbroker_unrefp(pinbroker **pb)
{
	pinbroker_unref(*pb);
}

static int pinbroker_open_descriptors(pinbroker *pb)
{
	int r;

	pb->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (pb->epoll_fd < 0)
		return -errno;
	pb->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (pb->timer_fd < 0)
		return -errno;
	pb->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pb->wake_fd < 0)
		return -errno;
	r = poll_add(pb, pb->timer_fd, EPOLLIN, SOURCE_TIMER);
	if (r < 0)
		return r;
	return poll_add(pb, pb->wake_fd, EPOLLIN, SOURCE_WAKE);
}

static uint64_t answer_usec(void)
{
	const char *value = secure_getenv("PINBROKER_TIMEOUT");
	double seconds = value ? strtod(value, NULL) : 0;

	return seconds > 0 && seconds < 1e6 ? (uint64_t)(seconds * USEC_PER_SEC) : ANSWER_USEC;
}

EXPORT int pinbroker_new(const char *name, const char *socket_path, pinbroker **ret)
{
	static atomic_uint_fast64_t n_made;
	_cleanup_(pinbroker_unrefp) pinbroker *pb = NULL;
	int r;

	socket_path = socket_path ?: environment("PINBROKER_SOCKET") ?: DEFAULT_SOCKET;
	if (strlen(socket_path) >= sizeof(((struct sockaddr_un *)NULL)->sun_path))
		return -ENAMETOOLONG;

	pb = malloc(sizeof(*pb));
	if (!pb)
		return -ENOMEM;
	*pb = (pinbroker){
		.n_refs = 1,
		.serial = atomic_fetch_add(&n_made, 1) + 1,
		.pid = getpid(),
		.channels = PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS,
		.answer_usec = answer_usec(),
		.epoll_fd = -1,
		.timer_fd = -1,
		.wake_fd = -1,
		.thread_stop_fd = -1,
		.bus_fd = -1,
		.bus_wake_at = USEC_INFINITY,
		.call_lock = PTHREAD_MUTEX_INITIALIZER,
		.dispatch_lock = PTHREAD_MUTEX_INITIALIZER,
		.notice_lock = PTHREAD_MUTEX_INITIALIZER,
		/* a notice that waits for these uses up the grace, which may be short */
		.watch_retry = {100 * USEC_PER_MSEC, USEC_PER_SEC, .at = USEC_INFINITY},
		.request_retry = {100 * USEC_PER_MSEC, USEC_PER_SEC, .at = USEC_INFINITY},
		.bus_retry = {USEC_PER_SEC / 2, 30 * USEC_PER_SEC, .at = USEC_INFINITY},
	};
	STAILQ_INIT(&pb->notices);

	r = replace_string(&pb->name, name);
	if (r >= 0)
		r = replace_string(&pb->socket_path, socket_path);
	if (r >= 0)
		r = pinbroker_open_descriptors(pb);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(pb);
	return 0;
}

EXPORT pinbroker *pinbroker_ref(pinbroker *pb)
{
	if (pb)
		atomic_fetch_add(&pb->n_refs, 1);
	return pb;
}

EXPORT pinbroker *pinbroker_unref(pinbroker *pb)
{
	unsigned n;

	if (!pb)
		return NULL;
	n = atomic_load(&pb->n_refs);
	while (!atomic_compare_exchange_weak(&pb->n_refs, &n, n == 1 ? REFS_ENDING : n - 1))
		;
	if (n == 1 && thread_stop(pb))
		pinbroker_free(pb);
	return NULL;
}

/* pinbroker_dispatch() has a reference of its own, the library's thread has none. */
bool is_held(pinbroker *pb)
{
	unsigned n = atomic_load(&pb->n_refs);

	return n < REFS_ENDING && n > (pb->use_thread ? 0 : 1);
}

EXPORT int pinbroker_set_channels(pinbroker *pb, unsigned channels)
{
	int r;

	r = check_unconnected(pb);
	if (r < 0)
		return r;
	if (channels & ~(unsigned)(PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS))
		return error_set(pb, -EINVAL, "There is no such channel.");
	pb->channels = channels;
	return 0;
}

EXPORT int pinbroker_set_bus_address(pinbroker *pb, const char *address)
{
	int r;

	r = check_unconnected(pb);
	if (r < 0)
		return r;
	r = replace_string(&pb->bus_address, address);
	return r < 0 ? error_set(pb, r, "Out of memory.") : 0;
}

EXPORT int pinbroker_set_thread(pinbroker *pb, bool thread)
{
	int r;

	r = check_unconnected(pb);
	if (r < 0)
		return r;
	pb->use_thread = thread;
	return 0;
}

EXPORT int pinbroker_set_revoke_callback(
	pinbroker *pb, pinbroker_revoke_callback callback, void *userdata)
{
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	pb->callback = callback;
	pb->userdata = userdata;
	return 0;
}

EXPORT int pinbroker_set_lost_callback(
	pinbroker *pb, pinbroker_lost_callback callback, void *userdata)
{
	int r;

	r = check_unconnected(pb);
	if (r < 0)
		return r;
	pb->lost_callback = callback;
	pb->lost_userdata = userdata;
	return 0;
}

EXPORT int pinbroker_get_fd(pinbroker *pb)
{
	int r;

	r = check_process(pb);
	return r < 0 ? r : pb->epoll_fd;
}

EXPORT int pinbroker_get_client(pinbroker *pb, uint64_t *ret)
{
	int r;

	r = check_usable(pb);
	if (r < 0)
		return r;
	*ret = pb->client;
	return 0;
}

EXPORT const char *pinbroker_get_version(pinbroker *pb)
{
	if (check_process(pb) < 0 || !atomic_load(&pb->connected))
		return NULL;
	return pb->version;
}

EXPORT int pinbroker_has_feature(pinbroker *pb, const char *feature)
{
	int r;

	r = check_usable(pb);
	if (r < 0)
		return r;
	for (size_t i = 0; i < pb->n_features; i++)
		if (strcmp(pb->features[i], feature) == 0)
			return 1;
	return 0;
}

EXPORT int pinbroker_list_features(
	pinbroker *pb, int (*callback)(const char *feature, void *userdata), void *userdata)
{
	int r;

	r = check_usable(pb);
	for (size_t i = 0; r == 0 && i < pb->n_features; i++)
		r = callback(pb->features[i], userdata);
	return r;
}
