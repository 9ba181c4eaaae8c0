/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define SD_JOURNAL_SUPPRESS_LOCATION
#include "daemon/util/log.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <systemd/sd-journal.h>

#include "daemon/util/log-rate.h"
#include "protocol/macro.h"
#include "protocol/utf8.h"

#define JOURNAL_SOCKET "/run/systemd/journal/socket"
#define STACK_SIZE     (256U * 1024)
#define MESSAGE_MAX    2048U
#define TEXT_MAX       (MESSAGE_MAX + 3U * 2048)
#define IOVECS_MAX     32U
#define WAKE_LATER_USEC (2 * USEC_PER_MSEC)

/* Lines KEY=value, MESSAGE first. The values are UTF-8 without control characters. */
struct text {
	size_t n;
	char s[TEXT_MAX];
};

struct entry {
	STAILQ_ENTRY(entry) link;
	int priority;
	char text[];
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t work, ended;
	STAILQ_HEAD(, entry) entries;
	unsigned n_entries;
	uint64_t n_dropped;
	bool running;
	bool closing;
	bool journal;     /* set before the thread starts */
	int max_priority; /* likewise */
	sd_event_source *wake; /* the loop's; NULL: the thread is woken at once */
	sd_event_source
		*tell; /* the loop's, enabled while lines are left out that are not told of yet */
	struct log_rate rate;
	pthread_t loop;
} state = {
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.work = PTHREAD_COND_INITIALIZER,
	.ended = PTHREAD_COND_INITIALIZER,
	.entries = STAILQ_HEAD_INITIALIZER(state.entries),
	.max_priority = LOG_INFO,
};

static void replace_control_characters(char *s)
{
	for (; *s; s++) {
		unsigned char c = (unsigned char)s[0], next = (unsigned char)s[1];

		if (c < 0x20 || c == 0x7f)
			s[0] = '?';
		else if (c == 0xc2 && next < 0xa0) /* U+0080 to U+009F */
			s[0] = s[1] = '?';
	}
}

static void text_add(struct text *t, const char *key, const char *value)
{
	size_t n, room = sizeof(t->s) - t->n;
	char *copy;

	if (!value || room < strlen(key) + sizeof("=\n"))
		return;
	copy = stpcpy(stpcpy(t->s + t->n, key), "=");
	room -= strlen(key) + sizeof("=\n");
	n = strnlen(value, room);
	*(char *)mempcpy(copy, value, n) = '\0';
	utf8_sanitize(copy);
	replace_control_characters(copy);
	strcpy(copy + n, "\n");
	t->n = (size_t)(copy + n + 1 - t->s);
}

static void text_add_number(struct text *t, const char *key, uint64_t value)
{
	char s[32];

	if (value == 0)
		return;
	snprintf(s, sizeof(s), "%" PRIu64, value);
	text_add(t, key, s);
}

static void text_add_fields(struct text *t, const struct log_fields *f)
{
	char uid[16];

	text_add_number(t, "PINBROKER_CLIENT", f->client);
	text_add_number(t, "PINBROKER_FILE", f->file);
	text_add_number(t, "PINBROKER_REVOCATION", f->revocation);
	text_add_number(t, "PINBROKER_CLIENT_PID", (uint64_t)f->pid);
	if (f->uid) {
		snprintf(uid, sizeof(uid), "%u", *f->uid);
		text_add(t, "PINBROKER_CLIENT_UID", uid);
	}
	text_add(t, "PINBROKER_CLIENT_UNIT", f->unit);
	text_add_number(t, "PINBROKER_BREAKER_PID", (uint64_t)f->breaker_pid);
	text_add(t, "PINBROKER_BREAKER_COMM", f->breaker_comm);
	text_add(t, "PINBROKER_CAUSE", f->cause);
	text_add(t, "PINBROKER_PROOF", f->proof);
	text_add(t, "PINBROKER_OUTCOME", f->outcome);
	text_add_number(t, "ERRNO", (uint64_t)f->error);
	text_add(t, "PINBROKER_PATH", f->path); /* last: it can be so long that it is cut */
}

static int write_journal(int priority, const char *text)
{
	char priority_field[] = "PRIORITY=0";
	struct iovec iov[IOVECS_MAX] = {
		{priority_field, strlen(priority_field)},
		{(char *)"SYSLOG_IDENTIFIER=pinbrokerd", strlen("SYSLOG_IDENTIFIER=pinbrokerd")},
	};
	int n = 2;

	priority_field[strlen("PRIORITY=")] = (char)('0' + LOG_PRI(priority));
	while (*text) {
		size_t length = strcspn(text, "\n");

		assert(n < (int)IOVECS_MAX);
		iov[n++] = (struct iovec){(char *)text, length};
		text += length + 1;
	}
	return sd_journal_sendv(iov, n);
}

/* What would make a name in it look like a further field is escaped. */
static char *append_escaped(char *to, const char *from, size_t length, const char *escape)
{
	for (size_t i = 0; i < length; i++)
		if (strchr(escape, from[i]))
			to += sprintf(to, "\\x%02x", (unsigned)from[i]);
		else
			*to++ = from[i];
	return to;
}

static int write_stderr(const char *text)
{
	char line[64 + 4 * TEXT_MAX], *end = stpcpy(line, "pinbrokerd: ");
	size_t length = strcspn(text, "\n");

	text += strlen("MESSAGE=");
	length -= strlen("MESSAGE=");
	end = append_escaped(end, text, length, "[");
	text += length + 1;
	for (const char *separator = " ["; *text; separator = " ") {
		length = strcspn(text, "\n");
		end = append_escaped(stpcpy(end, separator), text, length, " []\\");
		text += length + 1;
		if (!*text)
			*end++ = ']';
	}
	*end++ = '\n';

	for (const char *p = line; p < end;) {
		ssize_t n = write(STDERR_FILENO, p, (size_t)(end - p));

		if (n < 0 && errno != EINTR)
			return -errno;
		p += n > 0 ? n : 0;
	}
	return 0;
}

static int write_text(int priority, const char *text)
{
	return state.journal ? write_journal(priority, text) : write_stderr(text);
}

static int write_dropped(uint64_t n_dropped)
{
	char text[128];

	snprintf(text, sizeof(text), "MESSAGE=%" PRIu64 " log message%s lost.\n", n_dropped,
		PLURAL(n_dropped));
	return write_text(LOG_WARNING, text);
}

static void *log_main(void *unused)
{
	struct entry *entry;
	uint64_t n_dropped;

	pthread_mutex_lock(&state.lock);
	for (;;) {
		uint64_t n_lost = 0;

		while (!(entry = STAILQ_FIRST(&state.entries)) && !state.closing)
			pthread_cond_wait(&state.work, &state.lock);
		n_dropped = state.n_dropped;
		if (!entry && n_dropped == 0)
			break;
		state.n_dropped = 0;
		if (entry) {
			STAILQ_REMOVE_HEAD(&state.entries, link);
			state.n_entries--;
		}
		pthread_mutex_unlock(&state.lock);

		if (n_dropped > 0 && write_dropped(n_dropped) < 0)
			n_lost = n_dropped;
		if (entry && write_text(entry->priority, entry->text) < 0)
			n_lost++;

		pthread_mutex_lock(&state.lock);
		state.n_dropped += n_lost;
		if (!entry && n_lost > 0)
			break; /* nothing gets through any more */
		free(entry);
	}
	state.running = false;
	pthread_cond_signal(&state.ended);
	pthread_mutex_unlock(&state.lock);
	return NULL;
}

static bool stderr_is_journal(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	unsigned long long dev, ino;
	struct stat st;

	if (fstat(STDERR_FILENO, &st) < 0)
		return access(JOURNAL_SOCKET, F_OK) == 0;
	return stream && sscanf(stream, "%llu:%llu", &dev, &ino) == 2 && st.st_dev == dev &&
	       st.st_ino == ino;
}

static int thread_start(void)
{
	pthread_attr_t attributes;
	pthread_t id;
	sigset_t all;
	int r;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	r = pthread_attr_setsigmask_np(&attributes, &all);
	if (r == 0)
		r = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (r == 0)
		r = pthread_attr_setstacksize(&attributes, STACK_SIZE);
	if (r == 0)
		r = pthread_create(&id, &attributes, log_main, NULL);
	pthread_attr_destroy(&attributes);
	return -r;
}

int log_open(int max_priority)
{
	int r;

	assert(!state.running);
	state.journal = stderr_is_journal();
	state.max_priority = max_priority;
	state.closing = false;
	state.running = true;
	r = thread_start();
	if (r < 0)
		state.running = false;
	return r;
}

static int on_wake(sd_event_source *source, uint64_t usec, void *userdata)
{
	pthread_mutex_lock(&state.lock);
	pthread_cond_signal(&state.work);
	pthread_mutex_unlock(&state.lock);
	return 0;
}

static bool wake_later(int priority)
{
	if (priority <= LOG_ERR || state.n_entries > LOG_QUEUE_MAX / 2 || !state.wake ||
	    !pthread_equal(pthread_self(), state.loop))
		return false;
	if (sd_event_source_get_enabled(state.wake, NULL) > 0)
		return true;
	return sd_event_source_set_time_relative(state.wake, WAKE_LATER_USEC) >= 0 &&
	       sd_event_source_set_enabled(state.wake, SD_EVENT_ONESHOT) >= 0;
}

/* Returns false if there is no thread: before log_open(), and after a complete log_close(). */
static bool entry_push(int priority, const struct text *t)
{
	struct entry *entry = malloc(sizeof(*entry) + t->n + 1);
	bool running;

	if (entry) {
		entry->priority = priority;
		memcpy(entry->text, t->s, t->n + 1);
	}
	pthread_mutex_lock(&state.lock);
	running = state.running;
	if (running && entry && state.n_entries < LOG_QUEUE_MAX) {
		STAILQ_INSERT_TAIL(&state.entries, entry, link);
		entry = NULL;
		state.n_entries++;
		if (!wake_later(priority))
			pthread_cond_signal(&state.work);
	} else if (running) {
		state.n_dropped++;
	}
	pthread_mutex_unlock(&state.lock);
	free(entry);
	return running;
}

static void write_line(
	int priority, const char *message_id, const struct log_fields *fields, const char *message)
{
	struct text t; /* not cleared: it is large */

	t.n = 0;
	text_add(&t, "MESSAGE", message);
	text_add(&t, "MESSAGE_ID", message_id);
	if (fields)
		text_add_fields(&t, fields);
	if (!entry_push(priority, &t))
		(void)write_text(priority, t.s);
}

/* Of a uid, or of the place in the code, which the format stands for. */
static uint64_t rate_key(int priority, const struct log_fields *fields, const char *format)
{
	const uid_t *uid = fields ? fields->uid ?: fields->charged_uid : NULL;

	return uid ? (uint64_t)*uid << 2 | (uint64_t)(priority <= LOG_ERR) << 1 | 1
		   : (uint64_t)(uintptr_t)format << 1;
}

static void tell_left_out(const struct log_rate_count *count)
{
	char message[MESSAGE_MAX];
	uid_t uid = (uid_t)(count->key >> 2);
	bool of_uid = count->key & 1;

	if (count->n == 0)
		return;
	if (of_uid)
		snprintf(message, sizeof(message), "Left out %" PRIu64 " message%s about uid %u.",
			count->n, PLURAL(count->n), uid);
	else
		snprintf(message, sizeof(message), "Left out %" PRIu64 " message%s like: %s",
			count->n, PLURAL(count->n), (const char *)(uintptr_t)(count->key >> 1));
	write_line(LOG_WARNING, NULL, of_uid ? &(struct log_fields){.uid = &uid} : NULL, message);
}

static void tell_all_left_out(uint64_t now)
{
	struct log_rate_count count;
	bool found;

	do {
		pthread_mutex_lock(&state.lock);
		found = log_rate_expire(&state.rate, now, &count);
		pthread_mutex_unlock(&state.lock);
		if (found)
			tell_left_out(&count);
	} while (found);
}

static int on_tell(sd_event_source *source, uint64_t usec, void *userdata)
{
	tell_all_left_out(now_usec());
	return 0;
}

static void tell_later(void)
{
	if (!state.tell || !pthread_equal(pthread_self(), state.loop) ||
		sd_event_source_get_enabled(state.tell, NULL) > 0)
		return;
	(void)sd_event_source_set_time_relative(state.tell, LOG_RATE_USEC + USEC_PER_SEC);
	(void)sd_event_source_set_enabled(state.tell, SD_EVENT_ONESHOT);
}

int log_attach(sd_event *event)
{
	int r = sd_event_add_time(
		event, &state.wake, CLOCK_MONOTONIC, 0, USEC_PER_MSEC, on_wake, NULL);

	if (r >= 0)
		r = sd_event_source_set_enabled(state.wake, SD_EVENT_OFF);
	if (r >= 0)
		r = sd_event_add_time(
			event, &state.tell, CLOCK_MONOTONIC, 0, USEC_PER_SEC, on_tell, NULL);
	state.loop = pthread_self();
	return r < 0 ? r : sd_event_source_set_enabled(state.tell, SD_EVENT_OFF);
}

void log_detach(void)
{
	state.wake = sd_event_source_disable_unref(state.wake);
	state.tell = sd_event_source_disable_unref(state.tell);
}

void log_close(unsigned timeout_msec)
{
	struct timespec until;
	int r = 0;

	tell_all_left_out(UINT64_MAX);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_msec / 1000;
	until.tv_nsec += (long)(timeout_msec % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}

	pthread_mutex_lock(&state.lock);
	state.closing = true;
	pthread_cond_signal(&state.work);
	while (state.running && r == 0)
		r = pthread_cond_clockwait(&state.ended, &state.lock, CLOCK_MONOTONIC, &until);
	pthread_mutex_unlock(&state.lock);
}

static bool rate_admits(uint64_t key)
{
	struct log_rate_count over;
	bool admitted;

	pthread_mutex_lock(&state.lock);
	admitted = log_rate_admit(&state.rate, key, now_usec(), &over);
	pthread_mutex_unlock(&state.lock);
	tell_left_out(&over);
	if (!admitted)
		tell_later();
	return admitted;
}

void log_event(int priority, const char *message_id, const struct log_fields *fields,
	const char *format, ...)
{
	char message[MESSAGE_MAX];
	int e = errno;
	va_list ap;

	if (priority > state.max_priority || !rate_admits(rate_key(priority, fields, format)))
		return;
	va_start(ap, format);
	vsnprintf(message, sizeof(message), format, ap);
	va_end(ap);
	write_line(priority, message_id, fields, message);
	errno = e;
}

static void add_sysctl(char *text, size_t size, const char *name)
{
	_cleanup_(close_fdp) int fd = -1;
	char path[64], value[32] = "";
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/sys/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = fd >= 0 ? read(fd, value, sizeof(value) - 1) : 0;
	value[n > 0 ? strcspn(value, " \t\n") : 0] = 0;
	snprintf(text, size, " (the limit is %s%s%s)", path, *value ? ": " : "", value);
}

static void add_rlimit(char *text, size_t size, int resource, const char *name)
{
	struct rlimit limit;

	if (getrlimit(resource, &limit) >= 0 && limit.rlim_cur != RLIM_INFINITY)
		snprintf(text, size, " (the limit is RLIMIT_%s, Limit%s=: %ju)", name, name,
			(uintmax_t)limit.rlim_cur);
}

/* inotify_init1() says EMFILE for both. */
static bool may_open_more(void)
{
	_cleanup_(close_fdp) int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);

	return fd >= 0 || errno == EBADF;
}

/* The limit that an error comes from, for people; "": it says enough by itself. */
static void find_limit(int error, enum log_resource resource, char *text, size_t size)
{
	*text = 0;
	if (error == EMFILE && resource == LOG_RESOURCE_INOTIFY && may_open_more())
		add_sysctl(text, size, "fs/inotify/max_user_instances");
	else if (error == EMFILE)
		add_rlimit(text, size, RLIMIT_NOFILE, "NOFILE");
	else if (error == ENFILE)
		add_sysctl(text, size, "fs/file-max");
	else if (error == EFBIG)
		add_rlimit(text, size, RLIMIT_FSIZE, "FSIZE");
	else if (error == ENOSPC && resource == LOG_RESOURCE_INOTIFY)
		add_sysctl(text, size, "fs/inotify/max_user_watches");
	else if (error == ENOSPC && resource == LOG_RESOURCE_EVENT)
		add_sysctl(text, size, "fs/epoll/max_user_watches");
	else if (error == EAGAIN && resource == LOG_RESOURCE_THREAD)
		snprintf(text, size,
			" (the limit is TasksMax=, RLIMIT_NPROC or /proc/sys/kernel/threads-max)");
}

static void __attribute__((format(printf, 4, 0)))
log_errnov(int priority, int error, enum log_resource resource, const char *format, va_list ap)
{
	char message[MESSAGE_MAX], reason[128], limit[128];
	size_t n;

	if (priority > state.max_priority || !rate_admits(rate_key(priority, NULL, format)))
		return;
	vsnprintf(message, sizeof(message), format, ap);
	find_limit(error, resource, limit, sizeof(limit));
	n = strlen(message);
	snprintf(message + n, sizeof(message) - n, ": %s%s",
		strerror_r(error, reason, sizeof(reason)), limit);
	write_line(priority, NULL, &(struct log_fields){.error = error}, message);
}

int log_errno(int priority, int error, const char *format, ...)
{
	va_list ap;

	error = abs(error);
	va_start(ap, format);
	log_errnov(priority, error, LOG_RESOURCE_OTHER, format, ap);
	va_end(ap);
	return -error;
}

int log_errno_limit(int priority, int error, enum log_resource resource, const char *format, ...)
{
	va_list ap;

	error = abs(error);
	va_start(ap, format);
	log_errnov(priority, error, resource, format, ap);
	va_end(ap);
	return -error;
}
