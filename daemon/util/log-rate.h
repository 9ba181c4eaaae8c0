/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/*
 * How many lines a uid, or for lines that are nobody's a place in the code, may have in a while: so many that
 * twenty uids together stay below what journald takes of a service before it drops lines, anybody's. What is
 * urgent is counted apart, so that chatter does not keep it out. The rest is counted. Without clock or locks.
 */

#define LOG_RATE_BURST 500U
#define LOG_RATE_USEC  (30 * 1000000ULL)
#define LOG_RATE_KEYS  256U /* counted at a time; with more the one that began first is forgotten */

struct log_rate_count {
	uint64_t key;
	uint64_t n;
};

struct log_rate {
	struct log_rate_entry {
		uint64_t key; /* 0: unused */
		uint64_t since_usec;
		unsigned n_admitted;
		uint64_t n_left_out;
	} entries[LOG_RATE_KEYS];
	unsigned n_entries;
};

/* Whether the line may be written. ret_over: whose count ends here, and how many lines were left out; n is 0 if
 * there is nothing to tell. key is not 0. */
bool log_rate_admit(struct log_rate *rate, uint64_t key, uint64_t now_usec,
	struct log_rate_count *ret_over);

/* A count whose while is over, of lines that were left out; false: there is none. */
bool log_rate_expire(struct log_rate *rate, uint64_t now_usec, struct log_rate_count *ret);
