/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>
#include <systemd/sd-bus.h>

#include "pinbroker.h"
#include "protocol/connection.h"
#include "protocol/interface.h"
#include "protocol/macro.h"

#define EXPORT __attribute__((visibility("default")))

/* How long pinbroker_dispatch() and the bus in pinbroker_connect() may wait. */
#define PATIENCE_USEC (2 * USEC_PER_SEC)

/* For an answer, without $PINBROKER_TIMEOUT: longer than WatchdogSec= and a restart. */
#define ANSWER_USEC (30 * USEC_PER_SEC)

/* Until the next attempt to restore something: doubled from first to last; back to first once it
 * has stayed up for longer than last. */
struct backoff {
	uint64_t first, last, next, up_since;
	uint64_t at; /* when the attempt is due, USEC_INFINITY: none is */
};

/* Notices that were passed on, so that the other channel's are known again. */
#define NOTICE_MEMORY 1024U

struct notice_trace {
	uint64_t revocation, file;
	uint64_t *pins; /* owned, sorted */
	size_t n_pins;
	bool who; /* the process behind it was known, */
	bool why; /* and an administrator's reason */
};

struct notice_memory {
	struct notice_trace traces[NOTICE_MEMORY]; /* a ring */
	size_t next;
};

struct notice {
	struct pinbroker_notice public; /* owns its strings and pins */
	STAILQ_ENTRY(notice) link;      /* pinbroker::notices */
};

/* In place of the last reference. While one thread waits for a callback to end, the calls in that
 * come and go with references of their own on top. */
#define REFS_ENDING (1U << 31)

struct pinbroker {
	atomic_uint n_refs;
	uint64_t serial; /* unlike the address it is never another handle's */
	pid_t pid;
	char *name;
	char *socket_path;
	char *bus_address;
	unsigned channels;
	bool use_thread;
	pinbroker_revoke_callback callback;
	void *userdata;
	pinbroker_lost_callback lost_callback;
	void *lost_userdata;

	uint64_t answer_usec; /* how long an answer may take, see call_deadline() */

	int epoll_fd; /* what the caller polls */
	int timer_fd;
	int wake_fd; /* raised by other threads for pinbroker_dispatch() */

	/* One call at a time. */
	pthread_mutex_t call_lock;
	struct connection *request; /* NULL while broken */
	uint64_t client;            /* 0: never connected */
	char *token;
	char *version;
	char **features;
	size_t n_features;
	atomic_bool connected; /* once, and for good */
	atomic_bool lost;      /* the broker has forgotten the client */
	atomic_bool resumed; /* the broker is there again: what waits to try again may do so now */
	_Atomic int64_t clock_usec; /* what our CLOCK_MONOTONIC is ahead of the broker's */
	atomic_bool attention; /* the dispatcher wants the lock, or there is something for it */

	/* Touched by the dispatcher (and pinbroker_connect()) only. */
	pthread_mutex_t dispatch_lock;
	struct connection *watch;
	struct backoff watch_retry;
	struct backoff request_retry;
	struct backoff bus_retry;
	sd_bus *bus;
	int bus_fd;           /* as registered with epoll_fd, the bus owns it */
	uint64_t bus_wake_at; /* the bus's own timeouts */
	int bus_error;        /* what sd-bus does not pass on: a signal could not be taken in */
	bool bus_ready;
	bool bus_owner_known;
	char *bus_name;      /* ours */
	char *bus_name_said; /* the one that the broker has been told */
	char *bus_owner;     /* the broker's unique name, "" while it has none */
	bool lost_told;

	pthread_mutex_t notice_lock;
	struct notice_memory memory;
	STAILQ_HEAD(, notice) notices; /* owned */

	pthread_t thread;
	bool thread_running;
	bool thread_frees; /* the last reference went in a callback in it */
	int thread_stop_fd;
};

/* What an epoll event is about. */
enum source { SOURCE_REQUEST, SOURCE_WATCH, SOURCE_BUS, SOURCE_TIMER, SOURCE_WAKE };

/* libpinbroker.c */
int check_usable(pinbroker *pb); /* connected, not lost, same process; sets the error */
int check_process(pinbroker *pb);
bool is_held(pinbroker *pb); /* somebody has a reference besides the dispatcher */
void pinbroker_free(pinbroker *pb);
int poll_add(pinbroker *pb, int fd, uint32_t events, enum source source);
void poll_change(pinbroker *pb, int fd, uint32_t events, enum source source);
void poll_remove(pinbroker *pb, int fd);
void wake(pinbroker *pb);
void mark_lost(pinbroker *pb);
void call_lock(pinbroker *pb);
bool call_trylock(pinbroker *pb);
void call_unlock(pinbroker *pb);
void backoff_down(struct backoff *b); /* it broke or could not be restored: plan the next attempt */
void backoff_up(struct backoff *b);
void backoff_reset(struct backoff *b); /* an attempt that is planned is due now */

/* dispatch.c */
bool thread_stop(pinbroker *pb); /* false: this is the thread, which will free the handle */

/* call.c and request.c */
struct reply {
	json_object *message;
	struct fds fds;
	const struct schema *schema; /* of *out, NULL if nothing is in it */
	void *out;
};

void reply_done(struct reply *reply);

/*
 * Sends a request and waits for the answer, on the client's request connection or, for
 * transient_call(), on one of its own. out: the method's msg_…_out, valid until reply_done(). On
 * failure the error is set.
 */
int broker_call(pinbroker *pb, int method, const void *in, const int *fds, size_t n_fds, void *out,
	struct reply *reply);
int transient_call(pinbroker *pb, int method, const void *in, const int *fds, size_t n_fds,
	void *out, struct reply *reply);
/* Calls each() for every reply of a stream; its non-zero value ends it and is returned. */
int transient_stream(pinbroker *pb, int method, const void *in, void *out,
	int (*each)(const void *out, void *userdata), void *userdata);
/* With the call lock held. */
int request_connect(pinbroker *pb);
void request_forget(pinbroker *pb); /* undoes it */
int request_restore(pinbroker *pb, uint64_t until_usec); /* USEC_INFINITY: as long as any call */
int request_hello(pinbroker *pb, const char *bus_name, uint64_t until_usec);
void request_drop(pinbroker *pb);
bool request_is_broken(pinbroker *pb);
/* A broker that hangs is ended by its watchdog: its next run, or nobody, answers by then. */
uint64_t call_deadline(const pinbroker *pb, int method);
/* Connects to the socket; patient: waits while its backlog is full. */
int broker_dial(pinbroker *pb, bool patient, struct connection **ret);
int request_message(int method, const void *in, bool more, json_object **ret);
/* The name of an error reply, NULL if the message is a proper reply; -EPROTO if it is neither. */
int reply_error(json_object *message, const char **ret_name, json_object **ret_parameters);

/* error.c */
int error_from_reply(const pinbroker *pb, const char *name, json_object *parameters);
/* Says before the message of the last error what it is about; r as given. */
int error_about(int r, const char *what, const char *name);
int error_set(const pinbroker *pb, int error, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* The errno for a Varlink error, without setting anything. */
int error_number(const char *name);

/* notice.c */
void notice_memory_done(struct notice_memory *memory);
/* Whether there is something new in a notice: 1, with *ret_update as told in pinbroker.h, or 0. */
int notice_memory_admit(
	struct notice_memory *memory, const struct pinbroker_notice *notice, bool *ret_update);
/* Queues a notice for the callback, if it is new. */
int notice_offer(pinbroker *pb, const struct pinbroker_notice *notice);
int notice_offer_message(pinbroker *pb, const struct msg_notice *message);
/* Makes notices readable that have a cause that this library does not know. */
void notice_soften(json_object *notice);
int notices_deliver(pinbroker *pb);
void notices_done(pinbroker *pb);

/* watch.c: all by the dispatcher. */
void watch_start(pinbroker *pb);
void watch_stop(pinbroker *pb);
void watch_dispatch(pinbroker *pb);

/* bus.c: all by the dispatcher. */
void bus_start(pinbroker *pb);
void bus_stop(pinbroker *pb);
void bus_await(pinbroker *pb, uint64_t until_usec);
void bus_dispatch(pinbroker *pb);
void bus_close(pinbroker *pb); /* without a new attempt */

/* convert.c */
/* false: out of memory, with *ret NULL */
bool text_copy(const char *text, const char **ret);
uint64_t known(int64_t value);  /* PINBROKER_UNKNOWN for null */
pid_t known_pid(int64_t value); /* 0 for null */
uid_t known_uid(int64_t value); /* PINBROKER_NO_UID for null */
void convert_file_info(const struct msg_file_info *m, struct pinbroker_file_info *ret);
/* A time of the broker's as ours. */
static inline uint64_t clock_convert(const pinbroker *pb, uint64_t usec)
{
	return usec + (uint64_t)atomic_load(&pb->clock_usec);
}

void convert_notice(const struct msg_notice *m, struct pinbroker_notice *ret);
