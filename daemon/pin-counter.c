/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pin-counter.h"

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>

#include "macro.h"
#include "process.h"

/* Once the pages have begun to be freed: on a busy machine the kernel's worker may have to wait for a CPU. */
#define STILL_USEC (250 * USEC_PER_MSEC)
#define WAIT_USEC  (1800 * USEC_PER_MSEC)

static uint64_t read_released(void)
{
	_cleanup_(freep) char *refresh = NULL;
	_cleanup_(freep) char *vmstat = NULL;
	static const char key[] = "\nnr_foll_pin_released ";
	char *p;

	/* Reading this folds the counters of all CPUs; only root may. */
	(void)proc_read(&refresh, "/proc/sys/vm/stat_refresh");
	if (proc_read(&vmstat, "/proc/vmstat") < 0)
		return 0;
	p = strstr(vmstat, key);
	return p ? strtoull(p + sizeof(key) - 1, NULL, 10) : 0;
}

void pin_counter_start(struct pin_counter *counter)
{
	counter->released = read_released();
}

void pin_counter_wait(const struct pin_counter *counter, uint64_t n_pages, uint64_t begin_usec)
{
	uint64_t start = now_usec(), changed = start, last = counter->released;

	for (;;) {
		uint64_t now, released = read_released();
		bool still;

		if (released - counter->released >= n_pages)
			return;
		now = now_usec();
		if (released != last) {
			last = released;
			changed = now;
		}
		/* What others release says nothing of when ours begin to be. */
		still = changed == start || now - changed >= STILL_USEC;
		if ((still && now - start >= begin_usec) || now - start >= WAIT_USEC)
			return;
		usleep(USEC_PER_MSEC);
	}
}
