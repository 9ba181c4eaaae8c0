/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/core/context.h"
#include "daemon/kernel/lease.h"

/*
 * What the daemon's modules ask of the kernel, answered from a table: the clock and the timers that
 * go by it, processes, who has a descriptor, data files and what is done to their leases, contexts.
 * There are no threads: jobs of the pool wait until they are run by hand.
 */

struct broker;
struct offload;
struct sd_event;

#define N_PROCESSES 3
#define N_FILES     4

/* /proc/PID has room for none of these */
#define FIRST_PID 5000000
#define FIRST_UID 1000

struct fake_process {
	pid_t pid;
	uid_t uid;
	int pipe[2];        /* its pidfd, readable once it is dead; and the end that makes it so */
	uint64_t inode;     /* of the first */
	bool dead, changed; /* changed: it is another user's by now */
	bool holds;         /* the contexts that it sent, or was left */
};

struct fake_file {
	int fd; /* owned; a memfd */
	uint64_t inode;
	bool elsewhere;                 /* open, in the way of a lease */
	enum lease_event event;         /* that lease_look() is to see */
	enum lease_tampering tampering; /* … and lease_inspect() */
	uid_t culprit;
};

struct fake_kernel {
	uint64_t now_usec, tick_usec; /* each look at the clock takes so long */
	uint64_t break_usec;
	struct fake_process processes[N_PROCESSES];
	struct fake_file files[N_FILES];
	bool cannot_search; /* /proc, for holders */
	bool cannot_stop;   /* somebody who has a context */
	bool detach_fails, detach_unproved, handles_stay;
	struct handle destroyed[64]; /* by force: the first so many */
	size_t n_destroyed;
	bool manager_hangs; /* what waits for it waits */
	bool bus_hangs;
	int bus_answer; /* to who has a name: 0, REFUSED, -errno */
};

extern struct fake_kernel kernel;

void kernel_start(void);
/* Closes what it has. */
void kernel_stop(void);
/* What is due by then is so in the next turns of the loop. */
void kernel_pass_time(uint64_t usec);
void kernel_kill(struct fake_process *process);
/* A writer, or a reader, opens the file. */
void kernel_open(struct fake_file *file, bool to_write);

/* The connection that is accepted next is of this process; takes it over. */
void kernel_connect(int fd, struct fake_process *process);
/* … and none at all. */
void kernel_close_backlog(void);
/* Readable while there is any. */
int kernel_listen(void);

/* fake-context.c: a descriptor of a kind, which the caller owns; -1: there is none such. */
int kernel_descriptor(char kind);

/* fake-offload.c: has the first job in the queue run, or a job that has run come back. False: there
 * is none. */
bool offload_run_next(struct offload *offload);
bool offload_finish_next(struct offload *offload);
/* … the one that was run last. */
bool offload_finish_last(struct offload *offload);

/* fake-daemon.c: the service manager, and the bus, have done what they were asked. */
void manager_answer(struct broker *broker);
void bus_begin(struct broker *broker);
void bus_end(struct broker *broker);
void bus_answer(struct broker *broker);
