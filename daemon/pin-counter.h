/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>

/*
 * The kernel's count of pages that long-term pins have let go (nr_foll_pin_released in /proc/vmstat).
 * It is the whole machine's: a hint that what was closed has been freed, never a proof.
 */

struct pin_counter {
	uint64_t released;
};

void pin_counter_start(struct pin_counter *counter);
/* Waits until n_pages have been released since the start, or no more are, or none within begin_usec. (offload) */
void pin_counter_wait(const struct pin_counter *counter, uint64_t n_pages, uint64_t begin_usec);
