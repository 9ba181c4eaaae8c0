/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>
#include <time.h>

#include "daemon/core/selection.h"

/*
 * What is done to a pinned file where no lease holds it up: while it is exposed, past its lease (through an
 * overlay), or through a descriptor that the broker handed out. It is seen afterwards. A file that has become
 * shorter, or pages that are not in it any more though they are pinned, are an emergency: the pins there are
 * revoked by force at once. What holders write is none. Whoever opened it for writing while it was exposed, and
 * wrote, may have done anything: the pins are revoked as for a break.
 */

struct file;
struct page_search;

/* A file as it was last looked at. */
struct change {
	uint64_t size, blocks;
	struct timespec modified;
	uint64_t emergency_size; /* a shrink to this has been dealt with already */
	bool known;
	bool resumed;            /* it has not been looked at since the run before */
	bool touched;            /* while it is, or was last, exposed */
	bool lost_some, written; /* so that pages have to be looked for */
	struct page_search *search;   /* owned, but for its job; does so; NULL: none does */
	uint64_t search_usec;    /* not before: it takes a small part of the time only */
	sd_event_source *timer;  /* NULL: it was always early enough */
	bool cut;                /* it has become shorter, and its pins beyond the end are being marked: */
	struct selection beyond;    /* those that are left, … */
	size_t n_beyond, n_pinning; /* … how many have been, and how many of these hold pages */
	sd_event_source *work; /* goes on with what takes several turns of the loop; NULL: nothing has yet */
};

/* Something is pinned up to `end` from now on: the file is as it is now. */
void change_begin(struct file *file, uint64_t end);
/* Looks at the file, and does what follows. Cheap. */
void change_check(struct file *file);
/* inotify saw something, and change_check() has looked: what somebody else has written is a conflict, if a late
 * one. */
void change_event(struct file *file, uint32_t mask);
void change_clear(struct change *change);
