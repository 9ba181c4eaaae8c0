/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Who has an open file description, looked for in /proc: in the descriptor table of every thread,
 * and in mappings. The absence of a find is an answer only where everything could be looked into.
 *
 * All functions are for the offload pool: they read /proc at length.
 */

struct process;

struct search {
	/* in */
	int fd;                       /* whose description is looked for; -1: only `unseen` is */
	const struct process *holder; /* whose pins it is about: see `unseen`; NULL: nobody's */
	int (*found)(pid_t pid, void *userdata); /* see search_run() */
	void *userdata;

	/* out: a process that may have it, and could not be looked into; 0: none. Only one that is
	 * of the holder's uid, or was started by it, counts. */
	pid_t unseen;
};

/*
 * Calls found() for each process other than this one that was seen to have the description, once
 * for each way in which it has it, until it returns non-zero, which is then returned. Negative
 * errno if /proc cannot be searched at all. Zombies and kernel threads have nothing.
 */
int search_run(struct search *search);

/* Has the process fd's description? 1, 0, or a negative errno where that cannot be seen. */
int search_process(pid_t pid, int fd);

/* Does that tell of mappings, too? Only of descriptions with an inode of their own: sockets, io_urings. */
bool search_is_sure(int fd);

/* Calls f for each descriptor of the process, 0: of any, whose link in /proc reads `link`, until it
 * returns non-zero, which is then returned. tid: the thread in whose table it is. */
int search_links(
	pid_t pid, const char *link, int (*f)(pid_t tid, int fd, void *userdata), void *userdata);

/* What this process may look into, on this kernel: found out once, at the start. */
struct search_powers {
	bool kcmp; /* descriptors can be compared; else only sockets and io_urings are told apart */
	bool others; /* other users' processes can be looked into */
};

const struct search_powers *search_powers(void);
