/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/manager/notify.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/util/log.h"
#include "protocol/macro.h"

#define STATUS_USEC (10 * USEC_PER_SEC)
/* TimeoutStartSec= of the unit, and how often it is asked for again */
#define START_USEC  (20 * USEC_PER_SEC)
#define EXTEND_USEC (1 * USEC_PER_SEC)
/* How long a manager may not read until nobody waits for it any more. */
#define PATIENCE_USEC (5 * USEC_PER_SEC)
#define DRAIN_USEC    (1 * USEC_PER_SEC)

/* -EAGAIN: once it can be written to, it is tried again. */
static int notifier_write(struct notifier *n, const char *text, int fd)
{
	union {
		struct cmsghdr header;
		char buffer[CMSG_SPACE(sizeof(int))];
	} control = {};
	struct iovec iov = { .iov_base = (char *)text, .iov_len = strlen(text) };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.buffer);
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	}
	/* connected each time: the manager may have made its socket anew */
	if (connect(n->fd, (struct sockaddr *)&n->address, n->address_size) >= 0 &&
	    sendmsg(n->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
		n->failed = false;
		return 0;
	}
	if (errno == EAGAIN) {
		(void)sd_event_source_set_enabled(n->writable, SD_EVENT_ONESHOT);
		return -EAGAIN;
	}
	if (!n->failed) {
		n->failed = true;
		log_errno(LOG_WARNING, errno, "Cannot reach the service manager for the moment");
	}
	return -EIO;
}

static void message_free(struct notifier_message *m)
{
	safe_close(m->fd);
	free(m);
}

static int send_status(struct notifier *n)
{
	char status[200], state[256];
	int r;

	n->describe(status, sizeof(status), n->userdata);
	snprintf(state, sizeof(state), "%s%s%sSTATUS=%s", n->ready ? "READY=1\n" : "",
		 n->stopping ? "STOPPING=1\n" : "", n->alive ? "WATCHDOG=1\n" : "", status);
	r = notifier_write(n, state, -1);
	if (r >= 0)
		n->ready = n->stopping = n->alive = false;
	return r;
}

static void wake_waiters(struct notifier *n)
{
	const struct notifier_message *m = STAILQ_FIRST(&n->messages);
	struct notifier_waiter *waiter;

	while ((waiter = TAILQ_FIRST(&n->waiters)) &&
		(n->hangs || !m || m->serial > waiter->serial)) {
		notifier_forget(n, waiter);
		waiter->told(waiter);
	}
	if (TAILQ_EMPTY(&n->waiters))
		(void)sd_event_source_set_enabled(n->patience, SD_EVENT_OFF);
}

static int on_notifier_patience(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct notifier *n = userdata;

	n->hangs = true;
	log_warning("The service manager has not heard for %llu s what it is told: what is pinned "
		    "meanwhile "
		    "would not outlive a crash of this process.",
		PATIENCE_USEC / USEC_PER_SEC);
	wake_waiters(n);
	return 0;
}

bool notifier_wait(struct notifier *n, struct notifier_waiter *waiter)
{
	if (STAILQ_EMPTY(&n->messages) || n->hangs || waiter->serial != 0)
		return waiter->serial != 0;
	if (TAILQ_EMPTY(&n->waiters) &&
		(sd_event_source_set_time(n->patience, now_usec() + PATIENCE_USEC) < 0 ||
			sd_event_source_set_enabled(n->patience, SD_EVENT_ONESHOT) < 0))
		return false;
	waiter->serial = n->n_messages;
	TAILQ_INSERT_TAIL(&n->waiters, waiter, of_notifier);
	return true;
}

void notifier_forget(struct notifier *n, struct notifier_waiter *waiter)
{
	if (waiter->serial != 0)
		TAILQ_REMOVE(&n->waiters, waiter, of_notifier);
	waiter->serial = 0;
}

static void send_messages(struct notifier *n)
{
	struct notifier_message *m;

	while ((m = STAILQ_FIRST(&n->messages)) && notifier_write(n, m->text, m->fd) >= 0) {
		STAILQ_REMOVE_HEAD(&n->messages, of_notifier);
		message_free(m);
	}
	n->hangs &= m != NULL;
	wake_waiters(n);
}

int notifier_post(struct notifier *n, const char *text, int fd)
{
	size_t size = strlen(text) + 1;
	struct notifier_message *m;

	if (STAILQ_EMPTY(&n->messages)) {
		int r = notifier_write(n, text, fd);

		if (r != -EAGAIN)
			return r;
	}
	m = malloc(sizeof(*m) + size);
	if (!m)
		return -ENOMEM;
	memcpy(m->text, text, size);
	m->fd = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
	if (fd >= 0 && m->fd < 0) {
		free(m);
		return -errno;
	}
	m->serial = ++n->n_messages;
	STAILQ_INSERT_TAIL(&n->messages, m, of_notifier);
	return 0;
}

bool notifier_cancel(struct notifier *n, const char *text)
{
	struct notifier_message *m;

	STAILQ_FOREACH(m, &n->messages, of_notifier)
		if (strcmp(m->text, text) == 0) {
			STAILQ_REMOVE(&n->messages, m, notifier_message, of_notifier);
			message_free(m);
			wake_waiters(n);
			return true;
		}
	return false;
}

static int on_notifier_writable(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	if (send_status(userdata) >= 0)
		send_messages(userdata);
	return 0;
}

static void tell_watchdog(struct notifier *n)
{
	char text[64];

	snprintf(text, sizeof(text), "WATCHDOG_USEC=%" PRIu64, n->watchdog.usec);
	(void)notifier_post(n, text, -1);
}

static int on_notifier_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct notifier *n = userdata;
	int r;

	if (watchdog_look(&n->watchdog, true))
		tell_watchdog(n);
	watchdog_feed(&n->watchdog, true);
	n->alive = n->watchdog.usec > 0;
	if (send_status(n) >= 0)
		send_messages(n);
	r = sd_event_source_set_time(
		source, now_usec() + (n->watchdog.usec > 0 ? n->watchdog.usec / 2 : STATUS_USEC));
	return r < 0 ? r : sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
}

static bool notifier_parse_address(struct notifier *n, const char *name)
{
	size_t length = strlen(name);

	if ((name[0] != '/' && name[0] != '@') || length >= sizeof(n->address.sun_path))
		return false;
	n->address.sun_family = AF_UNIX;
	memcpy(n->address.sun_path, name, length);
	n->address_size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
	if (name[0] == '@')
		n->address.sun_path[0] = 0;
	else
		n->address_size++;
	return true;
}

int notifier_open(struct notifier *n, sd_event *event,
		  void (*describe)(char *ret, size_t size, void *userdata), void *userdata)
{
	const char *name = getenv("NOTIFY_SOCKET");
	int r;

	if (!name)
		return 0;
	if (!notifier_parse_address(n, name)) {
		log_warning("NOTIFY_SOCKET=%s is no address of a socket; the service manager is told "
			    "nothing.", name);
		return 0;
	}
	n->describe = describe;
	n->userdata = userdata;
	STAILQ_INIT(&n->messages);
	TAILQ_INIT(&n->waiters);
	n->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (n->fd < 0)
		return -errno;
	n->event = sd_event_ref(event);
	r = sd_event_add_io(event, &n->writable, n->fd, EPOLLOUT, on_notifier_writable, n);
	if (r >= 0)
		r = sd_event_source_set_enabled(n->writable, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_time(event, &n->patience, CLOCK_MONOTONIC, 0, 0,
			on_notifier_patience, n);
	return r < 0 ? r : sd_event_source_set_enabled(n->patience, SD_EVENT_OFF);
}

void notifier_tell_progress(struct notifier *n)
{
	uint64_t now = now_usec();
	char text[64];

	watchdog_feed(&n->watchdog, false);
	if (now - n->extended_usec < EXTEND_USEC)
		return;
	n->extended_usec = now;
	snprintf(text, sizeof(text), "EXTEND_TIMEOUT_USEC=%llu", START_USEC);
	/* of no use any more when there is room for it */
	(void)notifier_write(n, text, -1);
}

int notifier_start(struct notifier *n)
{
	int r;

	if (!notifier_is_open(n))
		return 0;
	if (n->watchdog.usec != n->watchdog.asked_usec)
		tell_watchdog(n);
	r = sd_event_add_time(n->event, &n->timer, CLOCK_MONOTONIC, now_usec(),
			      n->watchdog.usec / 4, on_notifier_timer, n);
	if (r < 0)
		return r;
	n->ready = true;
	return on_notifier_timer(n->timer, 0, n);
}

/* Not as a part of the status, which may overtake what waits. */
void notifier_tell_reloading(struct notifier *n)
{
	char text[64];

	snprintf(text, sizeof(text), "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, now_usec());
	if (notifier_is_open(n))
		(void)notifier_post(n, text, -1);
}

void notifier_tell_ready(struct notifier *n)
{
	if (notifier_is_open(n))
		(void)notifier_post(n, "READY=1", -1);
}

void notifier_tell_stopping(struct notifier *n)
{
	n->stopping = true;
	if (notifier_is_open(n))
		(void)send_status(n);
}

static void drain(struct notifier *n)
{
	uint64_t now = now_usec(), until = now + DRAIN_USEC;
	struct pollfd pfd = {.fd = n->fd, .events = POLLOUT};

	for (send_messages(n); !STAILQ_EMPTY(&n->messages) && now < until; now = now_usec()) {
		if (n->hangs || poll(&pfd, 1, (int)((until - now) / 1000) + 1) <= 0)
			return;
		send_messages(n);
	}
}

void notifier_stop(struct notifier *n)
{
	struct notifier_message *m;

	if (!notifier_is_open(n))
		return;
	drain(n);
	while ((m = STAILQ_FIRST(&n->messages))) {
		STAILQ_REMOVE_HEAD(&n->messages, of_notifier);
		message_free(m);
	}
	sd_event_source_disable_unref(n->writable);
	sd_event_source_disable_unref(n->timer);
	sd_event_source_disable_unref(n->patience);
	n->event = sd_event_unref(n->event);
	n->fd = safe_close(n->fd);
}
