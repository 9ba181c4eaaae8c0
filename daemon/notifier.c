/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "notifier.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include "broker.h"
#include "log.h"
#include "macro.h"

#define STATUS_USEC (10 * USEC_PER_SEC)

static void notifier_send(struct notifier *n)
{
	const struct broker *broker = n->broker;
	char state[256];
	int length;

	length = snprintf(state, sizeof(state),
			  "%s%s%sSTATUS=%s%u pins of %u files by %u clients, %u revocations running",
			  n->ready ? "READY=1\n" : "", n->stopping ? "STOPPING=1\n" : "",
			  n->alive ? "WATCHDOG=1\n" : "", broker->stopping ? "Ending: " : "",
			  broker->n_pins, broker->n_files, broker->n_clients, broker->n_running);
	/* connected each time: the manager may have made its socket anew */
	if (connect(n->fd, (struct sockaddr *)&n->address, n->address_size) >= 0 &&
	    send(n->fd, state, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
		n->ready = n->stopping = n->alive = n->failed = false;
	} else if (errno == EAGAIN) {
		(void)sd_event_source_set_enabled(n->writable, SD_EVENT_ONESHOT);
	} else if (!n->failed) {
		n->failed = true;
		log_errno(LOG_WARNING, errno, "Cannot reach the service manager for the moment");
	}
}

static int on_notifier_writable(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	notifier_send(userdata);
	return 0;
}

static int on_notifier_timer(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct notifier *n = userdata;
	int r;

	n->alive = n->watchdog_usec > 0;
	notifier_send(n);
	r = sd_event_source_set_time(
		source, now_usec() + (n->watchdog_usec > 0 ? n->watchdog_usec / 2 : STATUS_USEC));
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

int notifier_start(struct notifier *n, struct broker *broker)
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
	n->broker = broker;
	n->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (n->fd < 0)
		return -errno;
	if (sd_watchdog_enabled(false, &n->watchdog_usec) <= 0)
		n->watchdog_usec = 0;
	r = sd_event_add_io(broker->event, &n->writable, n->fd, EPOLLOUT, on_notifier_writable, n);
	if (r >= 0)
		r = sd_event_source_set_enabled(n->writable, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_time(broker->event, &n->timer, CLOCK_MONOTONIC, now_usec(),
				      n->watchdog_usec / 4, on_notifier_timer, n);
	if (r < 0)
		return r;
	n->ready = true;
	return on_notifier_timer(n->timer, 0, n);
}

void notifier_tell_stopping(struct notifier *n)
{
	n->stopping = true;
	if (n->fd >= 0)
		notifier_send(n);
}

void notifier_stop(struct notifier *n)
{
	sd_event_source_disable_unref(n->writable);
	sd_event_source_disable_unref(n->timer);
	n->fd = safe_close(n->fd);
}
