/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>
#include <sys/types.h>
#include <syslog.h>
#include <systemd/sd-event.h>

/*
 * The log: to the journal where the process's stderr is connected to it (or it cannot be told where
 * stderr leads and the journal's socket exists), to stderr otherwise. Either can block when the
 * other side doesn't read, so a thread of its own writes; a line that finds the queue of
 * LOG_QUEUE_MAX full is dropped, and the next that gets through says how many were. Nobody can fill
 * the journal: what a uid, or a place in the code, has over the rate of log-rate.h is counted, and
 * told once.
 *
 * On stderr an entry is one line: the message, then the fields that are set as KEY=VALUE in
 * brackets, e.g.
 *     pinbrokerd: Lease of /srv/a broken. [MESSAGE_ID=… PINBROKER_FILE=3 PINBROKER_PATH=/srv/a]
 */

#define LOG_QUEUE_MAX 4096U

/* What the journal can be searched by. 0 or NULL: not set. */
struct log_fields {
	uint64_t client;        /* PINBROKER_CLIENT= */
	uint64_t file;          /* PINBROKER_FILE= */
	uint64_t revocation;    /* PINBROKER_REVOCATION= */
	const char *path;       /* PINBROKER_PATH= */
	pid_t pid;              /* PINBROKER_CLIENT_PID=: the holder */
	const uid_t *uid;       /* PINBROKER_CLIENT_UID= */
	const uid_t *charged_uid; /* no field: whose doing the line is, where .uid is not set, see
				     log-rate.h */
	const char *unit;       /* PINBROKER_CLIENT_UNIT= */
	pid_t breaker_pid;      /* PINBROKER_BREAKER_PID= */
	const char *breaker_comm; /* PINBROKER_BREAKER_COMM= */
	const char *cause;      /* PINBROKER_CAUSE= */
	const char *proof;      /* PINBROKER_PROOF= */
	const char *outcome;    /* PINBROKER_OUTCOME= */
	int error;              /* ERRNO=, positive */
};

/* The MESSAGE_ID=s, as in systemd/pinbroker.catalog. */
#define MESSAGE_LEASE_TAKEN    "0c91603bd762469289810107b9706294"
#define MESSAGE_LEASE_SETTLED  "af4cd4d753274a07921a6d0fe18ecb00"
#define MESSAGE_LEASE_EXPOSED  "6f0768e8626044db9ffbd5a1aadf2d34"
#define MESSAGE_LEASE_BROKEN   "6af09075dc994bc99e41d4d164911787"
#define MESSAGE_LEASE_RELEASED "03f229365d944dafb6a01a85e31dfac2"
#define MESSAGE_LEASE_TAMPERED "1ada5c7d15e7426eac9d55380febc9a3"
#define MESSAGE_LEASE_LOST     "80503b3b5efe466a9aa0b2136eb34f8e"
#define MESSAGE_REVOKE_STARTED "a0b368f6f0474853a3944ecc6589f2bd"
#define MESSAGE_REVOKE_BLAMED  "356eb555324246cfb034c775de530a15"
#define MESSAGE_REVOKE_ESCALATED "439f41f0657240a984f827bdd968ad39"
#define MESSAGE_REVOKE_ENDED   "ddd658d4b707420189d2c9eccada93a6"
#define MESSAGE_STATE_RESTORED "2a3b39ba769741c59113ba71fbfdf26e"
#define MESSAGE_BAD_INPUT      "debce7fd5fb643ef83001ef8aa8b93d6"

/* max_priority: LOG_DEBUG … LOG_ERR, what is less urgent is dropped. Starts the thread. */
int log_open(int max_priority);
/* Lets the loop wake the thread a moment later, from where nobody is held up by it; to be detached before
 * the loop goes. What is urgent (LOG_ERR and above) is written at once all the same. */
int log_attach(sd_event *event);
void log_detach(void);
/* Waits for the queue to be written out, at most timeout_msec. */
void log_close(unsigned timeout_msec);

/* message_id and fields may be NULL. */
void log_event(int priority, const char *message_id, const struct log_fields *fields,
	       const char *format, ...) __attribute__((format(printf, 4, 5)));

#define log_debug(...)   log_event(LOG_DEBUG, NULL, NULL, __VA_ARGS__)
#define log_info(...)    log_event(LOG_INFO, NULL, NULL, __VA_ARGS__)
#define log_notice(...)  log_event(LOG_NOTICE, NULL, NULL, __VA_ARGS__)
#define log_warning(...) log_event(LOG_WARNING, NULL, NULL, __VA_ARGS__)
#define log_error(...)   log_event(LOG_ERR, NULL, NULL, __VA_ARGS__)
/* Adds ": strerror(error)", and the limit of the process that it comes from, and returns
 * -abs(error). */
int log_errno(int priority, int error, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* What was wanted of the kernel, where the error alone does not tell which limit was in the way. */
enum log_resource {
	LOG_RESOURCE_OTHER,
	LOG_RESOURCE_EVENT,   /* a descriptor to wait for, in epoll */
	LOG_RESOURCE_INOTIFY, /* an instance of inotify, or a watch */
	LOG_RESOURCE_THREAD,
};

/* As log_errno(). */
int log_errno_limit(int priority, int error, enum log_resource resource, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
