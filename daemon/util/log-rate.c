/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/log-rate.h"

#include <stddef.h>

static struct log_rate_entry *find(struct log_rate *rate, uint64_t key)
{
	for (unsigned i = 0; i < rate->n_entries; i++)
		if (rate->entries[i].key == key)
			return &rate->entries[i];
	return NULL;
}

static struct log_rate_entry *make_room(struct log_rate *rate)
{
	struct log_rate_entry *oldest = &rate->entries[0];

	if (rate->n_entries < LOG_RATE_KEYS)
		return &rate->entries[rate->n_entries++];
	for (unsigned i = 1; i < LOG_RATE_KEYS; i++)
		if (rate->entries[i].since_usec < oldest->since_usec)
			oldest = &rate->entries[i];
	return oldest;
}

static bool is_over(const struct log_rate_entry *entry, uint64_t now_usec)
{
	return now_usec - entry->since_usec >= LOG_RATE_USEC;
}

bool log_rate_admit(struct log_rate *rate, uint64_t key, uint64_t now_usec,
	struct log_rate_count *ret_over)
{
	struct log_rate_entry *entry = find(rate, key);

	*ret_over = (struct log_rate_count){};
	if (!entry || is_over(entry, now_usec)) {
		if (!entry)
			entry = make_room(rate);
		*ret_over = (struct log_rate_count){entry->key, entry->n_left_out};
		*entry = (struct log_rate_entry){.key = key, .since_usec = now_usec};
	}
	if (entry->n_admitted < LOG_RATE_BURST) {
		entry->n_admitted++;
		return true;
	}
	entry->n_left_out++;
	return false;
}

bool log_rate_expire(struct log_rate *rate, uint64_t now_usec, struct log_rate_count *ret)
{
	for (unsigned i = 0; i < rate->n_entries; i++) {
		struct log_rate_entry *entry = &rate->entries[i];

		if (entry->n_left_out == 0 || !is_over(entry, now_usec))
			continue;
		*ret = (struct log_rate_count){entry->key, entry->n_left_out};
		entry->n_left_out = 0;
		return true;
	}
	return false;
}
