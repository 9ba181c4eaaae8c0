/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define HASH_NONFATAL_OOM 1
#define HASH_FUNCTION     HASH_OAT /* HASH_JEN falls through cases, which clang warns of */
#include "user.h"

#include <assert.h>
#include <string.h>

#include "macro.h"

struct users {
	uint64_t maxima[LIMIT_COUNT];
	bool lax; /* not enforced */
	struct user *by_uid;
};

static const char *const limit_names[LIMIT_COUNT] = {
	[LIMIT_CLIENTS] = "MaxClientsPerUser",
	[LIMIT_FILES] = "MaxFilesPerUser",
	[LIMIT_CONTEXTS] = "MaxContextsPerUser",
	[LIMIT_PINS] = "MaxPinsPerUser",
	[LIMIT_PINNED_BYTES] = "MaxPinnedBytesPerUser",
	[LIMIT_UNFINISHED] = "MaxUnfinishedPerUser",
};

const char *limit_name(enum limit limit)
{
	assert(limit < LIMIT_COUNT);
	return limit_names[limit];
}

int users_new(const uint64_t maxima[LIMIT_COUNT], struct users **ret)
{
	struct users *users = calloc(1, sizeof(*users));

	if (!users)
		return -ENOMEM;
	memcpy(users->maxima, maxima, sizeof(users->maxima));
	*ret = users;
	return 0;
}

void users_set_maxima(struct users *users, const uint64_t maxima[LIMIT_COUNT])
{
	memcpy(users->maxima, maxima, sizeof(users->maxima));
}

struct users *users_free(struct users *users)
{
	if (users)
		assert(!users->by_uid);
	free(users);
	return NULL;
}

int user_get(struct users *users, uid_t uid, struct user **ret)
{
	struct user *user;

	HASH_FIND(hh, users->by_uid, &uid, sizeof(uid), user);
	if (user) {
		*ret = user_ref(user);
		return 0;
	}

	user = calloc(1, sizeof(*user));
	if (!user)
		return -ENOMEM;
	user->uid = uid;
	user->n_refs = 1;
	user->users = users;
	HASH_ADD(hh, users->by_uid, uid, sizeof(user->uid), user);
	if (!user->hh.tbl) { /* how uthash tells of missing memory */
		free(user);
		return -ENOMEM;
	}
	*ret = user;
	return 0;
}

struct user *user_ref(struct user *user)
{
	assert(user->n_refs > 0);
	user->n_refs++;
	return user;
}

struct user *user_unref(struct user *user)
{
	if (!user)
		return NULL;
	assert(user->n_refs > 0);
	if (--user->n_refs > 0)
		return NULL;
	for (size_t i = 0; i < LIMIT_COUNT; i++)
		assert(user->used[i] == 0);
	HASH_DEL(user->users->by_uid, user);
	free(user);
	return NULL;
}

uint64_t user_maximum(const struct user *user, enum limit limit)
{
	assert(limit < LIMIT_COUNT);
	return user->users->maxima[limit];
}

void users_enforce(struct users *users, bool on)
{
	users->lax = !on;
}

int user_charge(struct user *user, enum limit limit, uint64_t amount)
{
	uint64_t maximum = user_maximum(user, limit);

	/* Forced charges may have gone past it; sums of bytes must not wrap. */
	if (user->users->lax) {
		user_charge_force(user, limit, amount);
		return 0;
	}
	if (user->used[limit] > maximum || amount > maximum - user->used[limit])
		return -EDQUOT;
	user->used[limit] += amount;
	return 0;
}

void user_charge_force(struct user *user, enum limit limit, uint64_t amount)
{
	assert(limit < LIMIT_COUNT);
	assert(amount <= UINT64_MAX - user->used[limit]);
	user->used[limit] += amount;
}

void user_discharge(struct user *user, enum limit limit, uint64_t amount)
{
	assert(limit < LIMIT_COUNT);
	assert(user->used[limit] >= amount);
	user->used[limit] -= amount;
}
