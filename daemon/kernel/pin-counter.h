/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/*
 * The kernel's count of pages that long-term pins have got and let go (nr_foll_pin_acquired, _released in
 * /proc/vmstat). It is the whole machine's, and others pin and unpin meanwhile. So what it shows is never
 * a proof that pages were let go of; but if it did not rise, none were.
 */

/* By so many pages the counter is off where nothing happens. */
#define PIN_COUNTER_NOISE 8U

struct pin_counter {
	uint64_t acquired, released;
	bool exact; /* else it lags behind by a second or two */
};

void pin_counter_start(struct pin_counter *counter);
/* Waits until n_pages have been released since the start, or no more are, or none within begin_usec. Returns
 * how many were. (offload) */
uint64_t pin_counter_wait(struct pin_counter *counter, uint64_t n_pages, uint64_t begin_usec);
/* Are n_pages fewer pinned than at the start, whatever came and went meanwhile? (offload) */
bool pin_counter_fell(const struct pin_counter *counter, uint64_t n_pages);
