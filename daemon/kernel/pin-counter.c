/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/pin-counter.h"

#include <fcntl.h>
#include <string.h>

#include "daemon/kernel/process.h"
#include "protocol/macro.h"

/* Once the pages have begun to be freed: on a busy machine the kernel's worker may have to wait for a CPU. */
#define STILL_USEC (250 * USEC_PER_MSEC)
#define WAIT_USEC  (1800 * USEC_PER_MSEC)

static uint64_t read_value(const char *vmstat, const char *key)
{
	const char *p = strstr(vmstat, key);

	return p ? strtoull(p + strlen(key), NULL, 10) : 0;
}

void pin_counter_start(struct pin_counter *counter)
{
	_cleanup_(freep) char *refresh = NULL;
	_cleanup_(freep) char *vmstat = NULL;
	static const char released[] = "\nnr_foll_pin_released ";

	*counter = (struct pin_counter){};
	/* Reading this folds the counters of all CPUs; only root may. */
	counter->exact = proc_read(&refresh, "/proc/sys/vm/stat_refresh") >= 0;
	if (proc_read(&vmstat, "/proc/vmstat") < 0 || !strstr(vmstat, released)) {
		counter->exact = false;
		return;
	}
	counter->acquired = read_value(vmstat, "\nnr_foll_pin_acquired ");
	counter->released = read_value(vmstat, released);
}

bool pin_counter_fell(const struct pin_counter *counter, uint64_t n_pages)
{
	struct pin_counter now;

	pin_counter_start(&now);
	if (!now.exact)
		return false;
	/* both only ever rise: as differences they cannot be mistaken */
	return now.released - counter->released + PIN_COUNTER_NOISE >=
	       now.acquired - counter->acquired + n_pages;
}

uint64_t pin_counter_wait(struct pin_counter *counter, uint64_t n_pages, uint64_t begin_usec)
{
	uint64_t start = now_usec(), changed = start, last = counter->released;

	for (;;) {
		struct pin_counter present;
		uint64_t now, released;
		bool still;

		pin_counter_start(&present);
		counter->exact &= present.exact;
		released = present.released < last ? last : present.released;
		if (released - counter->released >= n_pages)
			return released - counter->released;
		now = now_usec();
		if (released != last) {
			last = released;
			changed = now;
		}
		/* What others release says nothing of when ours begin to be. */
		still = changed == start || now - changed >= STILL_USEC;
		if ((still && now - start >= begin_usec) || now - start >= WAIT_USEC)
			return released - counter->released;
		usleep(USEC_PER_MSEC);
	}
}
