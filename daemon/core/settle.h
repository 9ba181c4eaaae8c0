/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct file;
struct settle_job;

/*
 * Opening a file as a reader would: it provokes the break that settles a write lease, and later shows that
 * it has settled. Where a program decides on opens (fanotify), this one waits for it, and it for the
 * lease, as it is given the file open: until it has settled, nobody could open anything there.
 */

/* How often one that runs is looked at, and how often it is done to find such a program. */
#define SETTLE_LOOK_USEC  (50 * USEC_PER_MSEC)
#define SETTLE_PROBE_USEC (5 * USEC_PER_SEC)

/* Does it on the pool, as file::settle, and calls file_settle_done(). -ENOMEM, -EMFILE. */
int settle_start(struct file *file);
/* Whether the one that runs has been let through to the lease, or not: it stands still before. */
bool settle_is_held(const struct settle_job *job);

/* The file systems where that was seen, the last few of them, for a while. */
#define LISTENED_MAX 16

struct listened {
	struct {
		uint64_t device, until_usec;
	} places[LISTENED_MAX];
	unsigned next;
};

/* Until when settling is not to be tried there; 0: it may be. */
uint64_t listened_until(const struct listened *listened, uint64_t device);
void listened_note(struct listened *listened, uint64_t device);
