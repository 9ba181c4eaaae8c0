/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * The process at the other end of a connection: who it was when it connected, and whether it still
 * is. Functions marked (scan) read /proc at length: on the offload pool only.
 */

struct process {
	int pidfd; /* owned */
	pid_t pid;
	uid_t uid;
	gid_t gid;
	gid_t *groups; /* owned */
	size_t n_groups;
	uint64_t start_time; /* clock ticks since boot; 0: not known */
	char comm[16];
	char *unit; /* owned; NULL: in none */
};

/* Supplementary groups of a client. The kernel allows 65,536, but they are kept and recorded for each. */
#define PROCESS_GROUPS_MAX 4096U

/* Who connected, from SO_PEERCRED, SO_PEERPIDFD (pidfd_open before Linux 6.5) and SO_PEERGROUPS. */
int process_from_socket(int fd, struct process *ret);
int process_copy(const struct process *p, struct process *ret);
void process_clear(struct process *p);

/* Fills in start time, comm and unit, reading /proc/PID; -ESRCH if it ended meanwhile. (scan) */
int process_describe(struct process *p);
/* Whether /proc tells of the processes of our own pid namespace, by the numbers that they have there. */
bool process_has_own_proc(void);

/* Another process, of the same user wholly, that goes on in p's place: -ESRCH, -EPERM. (scan) */
int process_succeed(const struct process *p, pid_t pid, struct process *ret);

/* Finds a process again by its number and start time; if there is none any more, p becomes one that has ended.
 * (scan) */
int process_reopen(struct process *p);

bool process_is_alive(const struct process *p);

struct uids {
	uid_t real, effective, saved, fs;
};
/* -ESRCH: it has ended. (scan) */
int process_uids(pid_t pid, struct uids *ret);

/* True if the process is alive, has the same start time, and all its uids are still those of the
 * connect: it has not become a setuid program. (scan) */
bool process_is_same(const struct process *p);

/* The service manager, of the system or of a user, is never stopped or sent a signal, whatever it holds: it
 * stores descriptors for others, and connects for them (OpenFile=). */
bool process_is_manager(pid_t pid);

/* search.c: true if the process is seen to have the same open file description as our fd, in whatever way:
 * see search_process(). (scan) */
bool process_holds(pid_t pid, int fd);

/* What /proc/PID/stat says of it, or of one of its threads; tid 0: of it. -ESRCH: it has ended. (scan) */
struct process_stat {
	char state; /* its letter there */
	pid_t parent, group, session;
	bool kernel_thread;
	uint64_t start_time;
};
int process_read_stat(pid_t pid, pid_t tid, struct process_stat *ret);

/* Returns 1 if every thread is stopped (or ending), 0 if not yet, negative errno. (scan) */
int process_is_stopped(pid_t pid);
/* Waits until it is: 0, -ETIMEDOUT, or -ESRCH if it has ended. (scan) */
int process_wait_stopped(pid_t pid, uint64_t end_usec);

/* Reads a whole file of /proc (at most 4 MiB) into a NUL-terminated buffer; returns its length. -EFBIG */
int proc_read(char **ret, const char *format, ...) __attribute__((format(printf, 2, 3)));
