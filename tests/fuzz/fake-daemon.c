/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "daemon/core/blame.h"
#include "daemon/core/broker.h"
#include "daemon/core/hearing.h"
#include "daemon/core/notice.h"
#include "daemon/core/observer.h"
#include "daemon/kernel/freeze.h"
#include "daemon/kernel/inotify.h"
#include "daemon/kernel/pin-counter.h"
#include "daemon/kernel/udev.h"
#include "daemon/manager/notify.h"
#include "daemon/util/log.h"
#include "fake-kernel.h"
#include "protocol/macro.h"

/* The modules that hear of something, or tell somebody else of it: whoever runs the fuzzer does
 * that by hand, or nobody does. */

/* ---- The log: written, as a sanitizer is to see what is told, to nowhere ---- */

__attribute__((format(printf, 1, 0))) static void say(const char *format, va_list ap)
{
	char line[1024];

	vsnprintf(line, sizeof(line), format, ap);
}

void log_event(int priority, const char *message_id, const struct log_fields *fields,
	const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	say(format, ap);
	va_end(ap);
	if (!fields)
		return;
	for (size_t i = 0; i < 6; i++) {
		const char *text[] = {fields->path, fields->unit, fields->breaker_comm,
			fields->cause, fields->proof, fields->outcome};

		if (text[i] && strlen(text[i]) > 65536)
			abort();
	}
	if ((fields->uid && *fields->uid == 0) ||
		(fields->charged_uid && *fields->charged_uid == 0))
		abort(); /* there is no such user here */
}

int log_errno(int priority, int error, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	say(format, ap);
	va_end(ap);
	return error < 0 ? error : -error;
}

int log_errno_limit(int priority, int error, enum log_resource resource, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	say(format, ap);
	va_end(ap);
	return error < 0 ? error : -error;
}

/* ---- What hears of breaks: the fuzzer tells; a sweep comes at once ---- */

struct hearing {
	struct broker *broker;
	sd_event_source *sweep;
};

static int on_sweep(sd_event_source *source, void *userdata)
{
	struct hearing *h = userdata;
	struct file *file;

	for (uint64_t after = 0; (file = broker_next_file(h->broker, after)); after = file->id)
		file_update(file);
	for (uint64_t after = 0; (file = broker_next_file(h->broker, after));) {
		after = file->id;
		sharing_look(file);
	}
	return 0;
}

int hearing_new(struct broker *broker, struct hearing **ret)
{
	struct hearing *h = calloc(1, sizeof(*h));

	if (!h || sd_event_add_defer(broker->event, &h->sweep, on_sweep, h) < 0 ||
		sd_event_source_set_enabled(h->sweep, SD_EVENT_OFF) < 0)
		abort();
	h->broker = broker;
	*ret = h;
	return 0;
}

struct hearing *hearing_free(struct hearing *h)
{
	if (h)
		sd_event_source_disable_unref(h->sweep);
	free(h);
	return NULL;
}

void hearing_sweep(struct hearing *h)
{
	if (sd_event_source_set_enabled(h->sweep, SD_EVENT_ONESHOT) < 0)
		abort();
}

int blame_new(struct broker *broker, struct blame **ret)
{
	*ret = NULL;
	return 0;
}

struct blame *blame_free(struct blame *blame)
{
	return NULL;
}

void blame_request(struct blame *blame, const struct file *file)
{
}

int watch_new(
	sd_event *event, const struct watch_ops *ops, void *userdata, struct watch **ret)
{
	*ret = NULL;
	return 0;
}

struct watch *watch_free(struct watch *watch)
{
	return NULL;
}

void watch_add(struct watch *watch, struct watched *watched, int fd, const char *path,
	uint32_t mask)
{
}

void watch_remove(struct watch *watch, struct watched *watched)
{
}

bool watch_was_incomplete(struct watch *watch)
{
	return false;
}

int device_monitor_new(sd_event *event, void (*removed)(dev_t number, void *userdata),
	void *userdata, struct device_monitor **ret)
{
	*ret = NULL;
	return 0;
}

struct device_monitor *device_monitor_free(struct device_monitor *monitor)
{
	return NULL;
}

void pin_counter_start(struct pin_counter *counter)
{
	*counter = (struct pin_counter){};
}

uint64_t pin_counter_wait(struct pin_counter *counter, uint64_t n_pages, uint64_t begin_usec)
{
	return 0;
}

bool pin_counter_fell(const struct pin_counter *counter, uint64_t n_pages)
{
	return true;
}

int holders_stop(int fd, const struct process *client, bool client_alive, uint64_t timeout_usec,
	struct holders *ret)
{
	*ret = (struct holders){.fd = fd};
	return kernel.cannot_stop ? -EPERM : 0;
}

void holders_continue(struct holders *holders)
{
}

/* ---- The service manager ---- */

bool notifier_wait(struct notifier *n, struct notifier_waiter *waiter)
{
	if (!kernel.manager_hangs || waiter->serial != 0)
		return waiter->serial != 0;
	waiter->serial = 1;
	TAILQ_INSERT_TAIL(&n->waiters, waiter, of_notifier);
	return true;
}

void notifier_forget(struct notifier *n, struct notifier_waiter *waiter)
{
	if (waiter->serial != 0)
		TAILQ_REMOVE(&n->waiters, waiter, of_notifier);
	waiter->serial = 0;
}

int notifier_post(struct notifier *notifier, const char *text, int fd)
{
	return 0;
}

bool notifier_cancel(struct notifier *notifier, const char *text)
{
	return kernel.manager_hangs;
}

void manager_answer(struct broker *broker)
{
	struct notifier *n = broker->store.notifier;
	struct notifier_waiter *waiter;

	while ((waiter = TAILQ_FIRST(&n->waiters))) {
		notifier_forget(n, waiter);
		waiter->told(waiter);
	}
}

/* ---- The bus ---- */

static struct question {
	uint64_t client;
	void (*done)(int r, struct refusal *refusal, void *userdata);
	void *userdata;
} questions[64];
static size_t n_questions;

static int verify(struct name_authority *names, struct client *client,
	void (*done)(int r, struct refusal *refusal, void *userdata), void *userdata)
{
	if (n_questions == ELEMENTS(questions))
		return -ENOTCONN;
	questions[n_questions++] = (struct question){client->id, done, userdata};
	return 0;
}

static int check_notice(const struct msg_notice *notice, void *userdata)
{
	if (!notice->path || (notice->pins.n_items > 0 && notice->pins.items[0] <= 0))
		abort();
	return 0;
}

static void on_notice(
	struct observer *observer, struct client *client, const struct msg_notice *notice)
{
	(void)check_notice(notice, NULL);
}

static struct name_authority names = {.verify = verify};
static struct observer notices = {.notice = on_notice};

void bus_begin(struct broker *broker)
{
	broker->names = &names;
	observer_add(&broker->observers, &notices);
}

void bus_end(struct broker *broker)
{
	bus_answer(broker);
	broker->names = NULL;
	observer_remove(&broker->observers, &notices);
}

static void answer(struct broker *broker, const struct question *q)
{
	struct client *client = broker_find_client(broker, q->client);
	struct refusal refusal;

	if (kernel.bus_answer == REFUSED)
		refuse(&refusal, REFUSAL_NOT_ALLOWED, "busName", "It is not yours.");
	if (client && kernel.bus_answer == REFUSED)
		free(TAKE_PTR(client->bus_name));
	if (client && kernel.bus_answer == 0 && client->bus_name)
		client->bus_name_verified = true;
	q->done(kernel.bus_answer, &refusal, q->userdata);
	client = broker_find_client(broker, q->client);
	if (client && client->bus_name_verified) {
		struct notice_place place = {};

		while (notice_catch_up(client, &place, check_notice, NULL) > 0)
			;
	}
}

void bus_answer(struct broker *broker)
{
	struct question asked[ELEMENTS(questions)];
	size_t n = n_questions;

	memcpy(asked, questions, n * sizeof(asked[0]));
	n_questions = 0;
	for (size_t i = 0; i < n; i++)
		answer(broker, &asked[i]);
}
