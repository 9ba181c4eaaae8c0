/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants the above first */
#include <cmocka.h>
#include <stdbool.h>
#include <sys/types.h>

#include "client/pinbroker.h"

/*
 * What the integration tests stand on: the real daemon, a real private dbus-daemon, real leases, real
 * pins. One world at a time; what goes wrong fails the running test.
 */

#define PAGES     4096
#define PAGE      4096
#define SIZE      ((size_t)PAGES * PAGE)
#define WAIT_MSEC 20000

extern char dir[], mount_point[64], socket_path[80], bus_address[80], file_path[80];
extern pid_t daemon_pid, bus_pid;

uint64_t usec_now(void);
/* How many times as late as on a machine of our own something may be: $PINBROKER_SLOW. */
unsigned slowness(void);
/* How long the kernel keeps the pages of an io_uring's buffer after it was taken away: a second in Linux 6.1. */
unsigned kept_msec(void);
/* Long-term pins of the whole machine, in pages. */
long pinned(void);
void expect_pinned(long value, long base, long pages); /* within 8 */
/* Once the kernel has let go of what was taken away. */
void wait_pinned(long base, long pages);

void run(const char *format, ...) __attribute__((format(printf, 1, 2)));
pid_t start(const char *const argv[]);
/* A server is there once its socket takes connections. */
void wait_for_socket(const char *path);
int finish(pid_t pid, int sig); /* sig 0: just waits; fails if it does not end */

/* A bus and the daemon, with this pinbroker.conf. */
void world_start(const char *config);
/* Ends them, and sees the daemon exit with 0. */
void world_stop(void);
/* /proc/sys/fs/lease-break-time; as before again when the program ends, whatever ends it: it has the machine's
 * lock until then. */
void set_lease_break_time(unsigned seconds);
void restore_lease_break_time(void);
void start_bus(void);
void start_daemon(void);
void mount_fs(const char *fs);
void make_file(void); /* file_path, SIZE bytes */

/* A connection to the broker, and a message, or a part of one, with a descriptor or -1. */
int dial(void);
bool send_with_fd(int s, const void *text, size_t size, int fd);

struct holder_options {
	unsigned channels;   /* 0: the socket's */
	bool opaque;         /* an eventfd for a context: pins nothing */
	bool xdp;            /* an AF_XDP socket's umem instead of an io_uring */
	unsigned ring_flags; /* IORING_SETUP_* */
	bool ignore;         /* does not let go */
	bool extend;         /* asks for EXTEND_MSEC more, and says how long that is after the notice */
	bool in_flight;      /* a fixed read from an empty pipe is under way */
	bool writes;         /* that is a fixed write into a full one */
	bool clone;          /* the buffers are in a second ring, too */
	bool catch_signal;   /* SIGBUS is caught, and says "signal" */
};

/* A process that pins the file. It says, a line each: "holding PIN", "notice CAUSE SIZE PID COMM",
 * "let-go". By itself it lets go on the notice that says who it was, or on an administrator's. */
struct holder {
	pid_t pid;
	int events;
	int commands;
};

struct holder holder_start(const struct holder_options *options);
void holder_expect(struct holder *h, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
/* The number in "WHAT NUMBER". */
unsigned long holder_number(struct holder *h, const char *what);
/* 'r': makes the file as long as it was, and pins it again. 'f': forks a child that keeps all, and says
 * "child PID". 'm': unmaps the file and closes all but the ring, and says "unmapped". 'b': truncates the file itself, in a
 * thread, and says "truncated". 'x': exits. */
#define EXTEND_MSEC 300
void holder_command(struct holder *h, char command);
int holder_stop(struct holder *h, int sig); /* its wait status; sig 0: it is asked to exit */

bool can_clone_buffers(void); /* whether options::clone is possible on this kernel */

struct result {
	int error;
	uint64_t usec; /* that it took */
	long pinned;   /* as it returned */
};

/* A process, named "truncater", that truncates the file to PAGE bytes. */
pid_t truncate_start(int *ret_fd);
struct result truncate_finish(pid_t pid, int fd);
