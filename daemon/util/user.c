/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define HASH_NONFATAL_OOM 1
#define HASH_FUNCTION     HASH_OAT /* HASH_JEN falls through cases, which clang warns of */
#include "daemon/util/user.h"

#include <assert.h>
#include <string.h>

#include "protocol/macro.h"

/* What two reads can bring, and some more */
#define SHARE_MIN 640U

/* Of the CPU time spent on a user: how soon half of it is forgotten, and what is little. */
#define HALF_USEC  50000U
#define LIGHT_USEC 2000U

struct users {
	uint64_t maxima[LIMIT_COUNT];
	uint64_t capacity, share; /* descriptors: of all users, of one */
	uint64_t n_descriptors;
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
	[LIMIT_DESCRIPTORS] = "MaxDescriptorsPerUser",
	[LIMIT_QUEUED_BYTES] = "MaxQueuedBytesPerUser",
};

/* How many descriptors go with each that is charged: a connection and its process, a file. */
static const unsigned n_descriptors_of[LIMIT_COUNT] = {
	[LIMIT_CLIENTS] = 2,
	[LIMIT_FILES] = 1,
	[LIMIT_DESCRIPTORS] = 1,
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
	users->capacity = users->share = UINT64_MAX;
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
	const struct users *users = user->users;

	assert(limit < LIMIT_COUNT);
	if (limit == LIMIT_DESCRIPTORS && users->share < users->maxima[limit])
		return users->share;
	return users->maxima[limit];
}

void users_set_capacity(struct users *users, uint64_t n_descriptors)
{
	uint64_t share = n_descriptors / 8 > SHARE_MIN ? n_descriptors / 8 : SHARE_MIN;

	users->capacity = n_descriptors;
	users->share = share < n_descriptors ? share : n_descriptors;
}

bool users_have_room(const struct users *users, uint64_t n)
{
	return users->n_descriptors <= users->capacity && n <= users->capacity - users->n_descriptors;
}

static void halve_spent(struct user *user)
{
	uint64_t now = now_usec(), n = (now - user->halved_usec) / HALF_USEC;

	if (n == 0)
		return;
	user->spent_usec = n < 64 ? user->spent_usec >> n : 0;
	user->halved_usec = n < 64 ? user->halved_usec + n * HALF_USEC : now;
}

void user_spend(struct user *user, uint64_t usec)
{
	halve_spent(user);
	user->spent_usec += usec;
}

bool user_is_light(struct user *user)
{
	halve_spent(user);
	return user->spent_usec < LIGHT_USEC;
}

void users_enforce(struct users *users, bool on)
{
	users->lax = !on;
}

int user_charge_reserve(struct user *user, enum limit limit, uint64_t amount, uint64_t reserve)
{
	uint64_t maximum = user_maximum(user, limit), n = n_descriptors_of[limit] * amount;

	if (__builtin_add_overflow(maximum, reserve, &maximum))
		maximum = UINT64_MAX;
	/* Forced charges may have gone past it; sums of bytes must not wrap. */
	if (!user->users->lax && (user->used[limit] > maximum || amount > maximum - user->used[limit] ||
				  (n > 0 && !users_have_room(user->users, n))))
		return -EDQUOT;
	user_charge_force(user, limit, amount);
	return 0;
}

int user_charge(struct user *user, enum limit limit, uint64_t amount)
{
	return user_charge_reserve(user, limit, amount, 0);
}

void user_charge_force(struct user *user, enum limit limit, uint64_t amount)
{
	assert(limit < LIMIT_COUNT);
	assert(amount <= UINT64_MAX - user->used[limit]);
	user->used[limit] += amount;
	user->users->n_descriptors += n_descriptors_of[limit] * amount;
}

void user_discharge(struct user *user, enum limit limit, uint64_t amount)
{
	assert(limit < LIMIT_COUNT);
	assert(user->used[limit] >= amount);
	user->used[limit] -= amount;
	user->users->n_descriptors -= n_descriptors_of[limit] * amount;
}
