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

/* -ESRCH: it has ended. (scan) */
struct uids {
	uid_t real, effective, saved, fs;
};
int process_uids(pid_t pid, struct uids *ret);

/* True if the process is alive, has the same start time, and all its uids are still those of the
 * connect: it has not become a setuid program. (scan) */
bool process_is_same(const struct process *p);

/* The service manager, of the system or of a user, is never stopped or sent a signal, whatever it holds: it
 * stores descriptors for others, and connects for them (OpenFile=). */
bool process_is_manager(pid_t pid);

/* True if one of the process's descriptors is the same open file description as our fd (kcmp).
 * (scan) */
bool process_holds(pid_t pid, int fd);

/* Calls f for each process other than this one that holds fd's description, once for each descriptor of
 * it, until it returns more than 0, which is then returned. (scan) */
int process_for_each_holder(int fd, int (*f)(pid_t pid, void *userdata), void *userdata);

/* Returns the pid of a process other than this one that holds fd's description, 0 if none was found,
 * negative errno if /proc could not be searched. One descriptor of the process `keeper` does not count; 0: there
 * is none. (scan) */
pid_t process_find_holder(int fd, pid_t keeper);

/* Calls f for each descriptor, of any process of that uid, whose /proc/PID/fd link reads `link`, until
 * it returns non-zero, which is then returned. (scan) */
int process_for_each_fd(uid_t uid, const char *link, int (*f)(pid_t pid, int fd, void *userdata),
			void *userdata);

/* Returns 1 if every thread is stopped (or ending), 0 if not yet, negative errno. (scan) */
int process_is_stopped(pid_t pid);
/* Waits until it is: 0, -ETIMEDOUT, or -ESRCH if it has ended. (scan) */
int process_wait_stopped(pid_t pid, uint64_t end_usec);

/* Reads a whole file of /proc (at most 64 KiB) into a NUL-terminated buffer; returns its length. */
int proc_read(char **ret, const char *format, ...) __attribute__((format(printf, 2, 3)));
