/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol/interface.h"

/*
 * The file lease on the broker's own description of a data file. Nothing else calls F_SETLEASE, and
 * nothing else assigns `state`.
 */

struct lease {
	int fd; /* owned; the description that carries the lease */
	enum access access;
	enum lease_state state;
	uint64_t settled_usec; /* LEASE_SETTLING: when the kernel will have turned it into a read lease */
	uint64_t broken_usec;  /* LEASE_BREAKING: when the break was seen */
	uint64_t looked_usec;  /* it was there then */
	bool unheard;          /* a break was seen, whose signal has not been heard */
};

enum lease_event {
	LEASE_INTACT,
	LEASE_READER, /* a reader waits for a write lease */
	LEASE_WRITER, /* somebody opens for writing or truncates */
	LEASE_GONE,   /* the kernel took it, its lease-break-time being over, or whoever shares it gave it up */
	LEASE_STRIPPED, /* a client that shares the description had given it up; it has been taken again */
};

/* What a client that shares the description has done to it. */
enum lease_tampering {
	LEASE_UNTOUCHED,
	LEASE_RESIGNALLED, /* F_SETSIG */
	LEASE_DISOWNED,    /* F_SETOWN, of which it is not known by whom */
	LEASE_REOWNED,     /* F_SETOWN */
	LEASE_GIVEN_UP,    /* F_SETLEASE: see LEASE_STRIPPED */
};

/* A break is signalled with this and, in si_fd, the lease's descriptor; SIGIO if the queue is full. */
#define LEASE_SIGNAL SIGRTMIN

/* The process group that hears of the breaks of shared ones (sentinel.h), in this process's place; 0: none. */
void lease_set_sentinel(pid_t group);
/* Says again who hears of a break, and by which signal. */
int lease_own(const struct lease *lease);

/* Puts the lease on: F_RDLCK or F_WRLCK as `access` has it. -EAGAIN: others have the file open;
 * -EACCES: it takes CAP_LEASE; -EINVAL: the file system has no leases. On the loop's process only. */
int lease_take(struct lease *lease);

/* Takes up, with fd, access, and what its state was, a lease that the run before had on the description.
 * since_usec: it may have been broken since then, with nobody looking. Returns 0, or 1 if the descriptor
 * that breaks are signalled with is still the one of that run. */
int lease_resume(struct lease *lease, uint64_t since_usec);

/* Looks who hears of a break, and by which signal; what was changed is put right. ret_uid: by whom, if that is
 * LEASE_REOWNED. */
enum lease_tampering lease_inspect(const struct lease *lease, uid_t *ret_uid);

/* Looks (F_GETLEASE) and moves to LEASE_BREAKING if a writer broke it, to LEASE_NONE if it is gone. */
enum lease_event lease_look(struct lease *lease);

/* A signal names the lease: true if it is that of a break, which lease_look() has seen. Once for each. */
bool lease_hear(struct lease *lease);

/* After LEASE_READER: let the kernel's time run out, after which it leaves a read lease. */
void lease_settle(struct lease *lease, uint64_t lease_break_usec);
/* A reader was seen to get in: it has settled. */
void lease_settled(struct lease *lease);

/* Lets it go. Returns -EAGAIN if the kernel had taken it away before, 0 otherwise. */
int lease_give(struct lease *lease);

static inline bool lease_is_held(const struct lease *lease)
{
	return lease->state != LEASE_NONE && lease->state != LEASE_BREAKING;
}

/* Clients have the same description: there can be only one under a write lease. */
static inline bool lease_is_shared(const struct lease *lease)
{
	return lease->access == ACCESS_WRITE;
}

/* What /proc/locks has in the line of this lease: 1, 0 if there is no lease, negative errno. */
struct lease_line {
	pid_t pid;
	uint64_t device, inode; /* btrfs has another device number there than in stat() */
};
int lease_find_line(const struct lease *lease, struct lease_line *ret);

/* /proc/sys/fs/lease-break-time, in microseconds; USEC_INFINITY where it is 0: the kernel then never takes a
 * lease away by itself, nor settles one (6.18). */
uint64_t lease_break_usec(void);
