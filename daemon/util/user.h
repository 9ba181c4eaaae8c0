/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <uthash.h>

#include "daemon/util/closer.h"
#include "daemon/util/offload.h"
#include "daemon/util/schedule.h"

/*
 * What one uid uses of the broker. Everything that a client causes to be kept or done is charged to
 * its uid before it is allocated, and discharged when it is gone.
 */

enum limit {
	LIMIT_CLIENTS, /* connections and clients */
	LIMIT_FILES,   /* (client, file) pairs */
	LIMIT_CONTEXTS,
	LIMIT_PINS,
	LIMIT_PINNED_BYTES,
	LIMIT_UNFINISHED, /* jobs on the offload pool: opens, closes, look-ups */
	LIMIT_DESCRIPTORS, /* that were sent, or are being sent, until they are closed */
	LIMIT_QUEUED_BYTES, /* half messages, and answers that were not read */
	LIMIT_COUNT,
};

struct users; /* all of them, and the maximum of each limit */

TAILQ_HEAD(peer_queue, peer);

/* Messages of which a part has come: the server's, all zero to begin with. */
struct parts {
	struct peer_queue peers; /* that keep a message in part, and do not wait for room; by when the last came */
	struct peer *over;       /* the one that may go past the limit */
};

struct user {
	uid_t uid;
	unsigned n_refs;
	uint64_t used[LIMIT_COUNT];
	struct users *users;
	struct offload_queue queues[OFFLOAD_LANES];   /* offload's */
	struct closer_queue closers[CLOSER_KINDS]; /* closer's */
	struct waiting waiting;                    /* schedule's */
	struct parts parts;                        /* intake's */
	uint64_t spent_usec;   /* of the loop's CPU time; halved every 50 ms, … */
	uint64_t halved_usec;  /* … the last time then */
	UT_hash_handle hh;          /* users */
};

/* The key in pinbroker.conf, e.g. "MaxPinsPerUser". */
const char *limit_name(enum limit limit);

/* maxima: LIMIT_COUNT values, UINT64_MAX for none; copied. */
int users_new(const uint64_t maxima[LIMIT_COUNT], struct users **ret);
struct users *users_free(struct users *users); /* asserts that no user is left */

/* The user for a uid, made at need, with one reference for the caller. -ENOMEM. */
int user_get(struct users *users, uid_t uid, struct user **ret);
struct user *user_ref(struct user *user);
struct user *user_unref(struct user *user); /* accepts NULL, returns NULL; frees with the last one,
					       asserting that nothing is charged any more */

/* Other maxima. Whoever is over one of them already keeps what there is. */
void users_set_maxima(struct users *users, const uint64_t maxima[LIMIT_COUNT]);

/* The loop has spent so much of its CPU time (turn_cpu_usec()) on the user. */
void user_spend(struct user *user, uint64_t usec);
/* Has it been little, lately? */
bool user_is_light(struct user *user);

/* While they are not enforced, every charge goes through. */
void users_enforce(struct users *users, bool on);

/*
 * How many descriptors there may be in all, for clients, files and what they send. No user has more than an
 * eighth of LIMIT_DESCRIPTORS, whatever its maximum. Without it there is no such limit.
 */
void users_set_capacity(struct users *users, uint64_t n_descriptors);
/* Is there room for so many more? */
bool users_have_room(const struct users *users, uint64_t n_descriptors);

/* Returns 0, or -EDQUOT and charges nothing. */
int user_charge(struct user *user, enum limit limit, uint64_t amount);
/* The same, up to so much past the maximum. */
int user_charge_reserve(struct user *user, enum limit limit, uint64_t amount, uint64_t reserve);
/* Charges past the maximum, for what must be done (closing a descriptor that is already there). */
void user_charge_force(struct user *user, enum limit limit, uint64_t amount);
void user_discharge(struct user *user, enum limit limit, uint64_t amount); /* asserts used >= amount */
uint64_t user_maximum(const struct user *user, enum limit limit);
