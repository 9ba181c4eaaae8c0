/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <json-c/json.h>
#include <stdbool.h>
#include <sys/types.h>
#include <systemd/sd-bus.h>

/*
 * What the integration tests stand on: the real daemon, a real private dbus-daemon, real leases, real
 * pins. Every wait is for an event and has a deadline (WAIT_MSEC), at which the test fails with what it
 * was waiting for and the daemon's log.
 */

#define WAIT_MSEC 20000

/* --- the world of one test: a scratch directory, a bus, a daemon --- */

struct world {
	char dir[64];      /* scratch, on the test's file system; mode 0777 */
	char run[64];      /* sockets, logs, configuration; mode 0755 */
	char socket[96];
	char bus_address[128];
	pid_t daemon, bus; /* 0: not running */
	int log_fd;        /* the daemon's stderr, read end */
	char *log;         /* all of it so far */
	size_t log_size;
	unsigned n_fds;    /* the test process's own, before */
};

enum fs { FS_TMPFS, FS_EXT4, FS_XFS };

/* Makes the world: mounts (ext4 and xfs on a loop device, tmpfs), bus, daemon with this pinbroker.conf
 * text (NULL: empty), under this uid (0: root). Lowers nothing by itself. */
struct world *world_new(enum fs fs, const char *config, uid_t daemon_uid);
/* Ends the daemon by SIGTERM and asserts that it exits with 0, sanitizers silent; unmounts; asserts
 * that the test process has as many descriptors as before. */
void world_free(struct world *w);

void world_start_bus(struct world *w);
void world_kill_bus(struct world *w); /* SIGKILL, reaped */
void world_start_daemon(struct world *w, const char *config, uid_t uid);
/* Waits until the daemon has logged a line that contains text, since the given offset into the log;
 * returns the offset after that line. */
size_t world_wait_log(struct world *w, size_t from, const char *text);
bool world_has_logged(struct world *w, const char *text);
unsigned world_daemon_fds(struct world *w); /* entries of /proc/PID/fd */
long world_daemon_rss_kib(struct world *w);

/* A file of that size in w->dir, filled with a known pattern; owner and mode set. Returns its path
 * (static per world; valid until the next call). */
const char *world_file(struct world *w, const char *name, size_t size, uid_t owner, mode_t mode);

/* Sets /proc/sys/fs/lease-break-time, remembering the old value, which is restored at exit, even on a
 * failed assertion or a signal. */
void lease_break_time_set(unsigned seconds);

/* --- one connection to the socket, spoken by hand: JSON and descriptors --- */

struct wire {
	int fd;
	char *buffer;
	size_t size;
};

struct wire *wire_open(struct world *w);
struct wire *wire_free(struct wire *wire);
/* parameters: JSON text, or NULL. Sends; fds may be none. more: with "more". */
void wire_send(struct wire *wire, const char *method, const char *parameters, bool more,
	       const int *fds, size_t n_fds);
/* The next reply; a descriptor that came with it in *ret_fd (-1: none; NULL: none is expected). NULL at
 * the end of the stream. Fails after WAIT_MSEC. */
json_object *wire_receive(struct wire *wire, int *ret_fd);
/* Send and receive; asserts that it is no error, and returns "parameters" (the caller's reference). */
json_object *wire_call(struct wire *wire, const char *method, const char *parameters,
		       const int *fds, size_t n_fds, int *ret_fd);
/* Asserts that the error's name is this ("org.pinbroker.Busy") and returns its parameters. */
json_object *wire_refused(struct wire *wire, const char *method, const char *parameters,
			  const int *fds, size_t n_fds, const char *error);
int64_t json_int(json_object *o, const char *key);
const char *json_text(json_object *o, const char *key);

/* --- a holder: a forked process, told what to do over a pipe --- */

/* How its pins are held. */
enum holding {
	HOLD_IO_URING,               /* one fixed buffer a range */
	HOLD_IO_URING_SINGLE_ISSUER, /* cannot be detached by another process */
	HOLD_AF_XDP,
	HOLD_OPAQUE, /* an eventfd: no pages are pinned */
};

enum channel { CHANNEL_WATCH = 1, CHANNEL_BUS = 2 };

struct holder {
	pid_t pid;
	uid_t uid;
	int command, event; /* pipes */
	uint64_t client, file, context;
	uint64_t pins[16];
	unsigned n_pins;
};

struct holder_options {
	uid_t uid;
	enum holding holding;
	unsigned channels; /* of notices; 0: CHANNEL_WATCH */
	bool write;        /* OpenFile(write) */
	bool ignore;       /* does nothing on a notice: a real one, its thread looks away */
	bool keep_open;    /* after letting go, keeps file and context */
	unsigned n_pins;   /* ranges of the whole file divided evenly; 0: one */
};

/* Forks; the child opens `path`, pins, binds, and reports. On a notice it writes an event, unregisters
 * the buffers, unpins, and writes another. Returns once everything is pinned. */
struct holder *holder_new(struct world *w, const char *path, const struct holder_options *options);
/* The next event of the holder: its text, e.g. "notice REVOCATION CAUSE OFFSET PID COMM CHANNEL", "let-go
 * REVOCATION", "ended PIN…", "error TEXT". Static buffer. */
const char *holder_wait(struct holder *h, const char *prefix);
/* Commands that any holder understands and answers with "ok …" or "error …": "repin" (opens and pins
 * again), "munmap", "close-file", "close-all-but-ring", "fork" (the child keeps the ring; answers "ok
 * PID"), "exit", "exec PATH", "inflight" (a fixed read from an empty pipe), "clone" (the buffers into a
 * second ring; answers "ok" or "error ERRNO"), "truncate SIZE" (of the pinned file, in this very
 * process), "write OFFSET BYTE", "read OFFSET" (answers "ok BYTE"), "extend REVOCATION USEC". */
const char *holder_command(struct holder *h, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
struct holder *holder_free(struct holder *h); /* kills it if need be, reaps it */

/* --- a breaker: a forked process that does one thing to a file, and how long that took --- */

struct breaker {
	pid_t pid;
	int result; /* pipe */
};

enum breaking { BREAK_TRUNCATE, BREAK_O_TRUNC, BREAK_O_RDWR, BREAK_O_RDONLY };

struct break_result {
	int error;          /* 0 or errno */
	uint64_t usec;      /* that the call took */
	int64_t pinned;     /* nr_foll_pin_acquired - nr_foll_pin_released as the call returned */
	int64_t size;       /* of the file then */
};

/* nonblock: O_NONBLOCK for the opens. thread: the call is made by a second thread of the process. */
struct breaker *breaker_new(const char *path, enum breaking what, int64_t size, bool nonblock,
			    bool thread, uid_t uid);
bool breaker_is_blocked(struct breaker *b); /* seen in /proc/locks or its syscall, waits till it is */
struct break_result breaker_wait(struct breaker *b); /* reaps and frees it */

/* --- pins as the kernel counts them --- */

int64_t pinned_pages(void); /* after /proc/sys/vm/stat_refresh */
#define assert_pinned(base, pages)                                                                 \
	assert_in_range((uint64_t)(pinned_pages() - (base) + 1000000),                             \
			(uint64_t)((pages) + 1000000 - 8), (uint64_t)((pages) + 1000000 + 8))

uint64_t usec_now(void);
