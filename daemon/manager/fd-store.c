/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/manager/fd-store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/kcmp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "daemon/manager/notify.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* FileDescriptorStoreMax= of the unit */
#define DESCRIPTORS_MAX 16384U
/* The names come back in one environment string, of which the kernel takes 128 KiB; some of it is for the
 * name of the socket, and of the variable. */
#define NAMES_MAX (127U * 1024U)

/* How long the manager may take to close something, most of the time. */
#define BUSY_USEC (1 * USEC_PER_SEC)

#define BASE      36U
#define NAME_SIZE 16 /* a letter, 13 digits, and a NUL */
#define REQUEST_SIZE 64

static void make_name(char name[static NAME_SIZE], char kind, uint64_t id)
{
	char digits[NAME_SIZE], *p = digits + sizeof(digits);

	*--p = 0;
	do {
		*--p = "0123456789abcdefghijklmnopqrstuvwxyz"[id % BASE];
		id /= BASE;
	} while (id > 0);
	snprintf(name, NAME_SIZE, "%c%s", kind, p);
}

bool store_parse_name(const char *name, char *ret_kind, uint64_t *ret_id)
{
	char *end;

	if ((name[0] != STORE_FILE && name[0] != STORE_CONTEXT) || !name[1] ||
	    strspn(name + 1, "0123456789abcdefghijklmnopqrstuvwxyz") != strlen(name + 1))
		return false;
	errno = 0;
	*ret_id = strtoull(name + 1, &end, BASE);
	*ret_kind = name[0];
	return errno == 0 && *ret_id > 0;
}

static void make_request(char text[static REQUEST_SIZE], const char *name)
{
	snprintf(text, REQUEST_SIZE, "FDSTORE=1\nFDPOLL=0\nFDNAME=%s", name);
}

/* What the manager has of one description. */
struct kept {
	LIST_HEAD(, store_copy) copies; /* ours */
	uint64_t id;                    /* in its name */
	char kind;
	RB_ENTRY(kept) by_description; /* store::kept */
};

/* As the manager compares them, too. Where the kernel does not let us they count as different. */
static int compare_kept(const struct kept *a, const struct kept *b)
{
	long r = syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, LIST_FIRST(&a->copies)->fd,
			 LIST_FIRST(&b->copies)->fd);

	if (r >= 0 && r <= 2)
		return r == 2 ? 1 : -(int)r;
	return a->id < b->id ? -1 : a->id > b->id;
}

TREE_GENERATE(kept_tree, kept, by_description, compare_kept)

/* Joins what is kept of the same description; false: it is the first. -ENOMEM. */
static int kept_join(struct store *store, struct store_copy *copy, char kind, uint64_t id, int fd)
{
	struct kept *kept, *other;

	kept = calloc(1, sizeof(*kept));
	if (!kept)
		return -ENOMEM;
	kept->id = id;
	kept->kind = kind;
	LIST_INIT(&kept->copies);
	copy->fd = fd;
	LIST_INSERT_HEAD(&kept->copies, copy, of_kept);
	other = kept_tree_RB_INSERT(&store->kept, kept);
	if (other) {
		LIST_REMOVE(copy, of_kept);
		LIST_INSERT_HEAD(&other->copies, copy, of_kept);
		free(kept);
	}
	copy->kept = other ? other : kept;
	return other != NULL;
}

/* Returns what is kept no more, to be freed, or NULL if there are other copies. */
static struct kept *kept_leave(struct store *store, struct store_copy *copy)
{
	struct kept *kept = copy->kept;

	copy->kept = NULL;
	if (LIST_NEXT(LIST_FIRST(&kept->copies), of_kept)) {
		LIST_REMOVE(copy, of_kept);
		return NULL;
	}
	kept_tree_RB_REMOVE(&store->kept, kept);
	LIST_REMOVE(copy, of_kept);
	return kept;
}

uint64_t store_name(const struct store_copy *copy)
{
	return copy->kept->id;
}

static size_t maximum(void)
{
	const char *given = getenv("FDSTORE"); /* systemd 254 */
	unsigned long n = given ? strtoul(given, NULL, 10) : DESCRIPTORS_MAX;

	return n < DESCRIPTORS_MAX ? n : DESCRIPTORS_MAX;
}

static void count(struct store *store, const char *name)
{
	store->n_descriptors++;
	store->n_bytes += strlen(name) + 1;
}

static bool has_room(struct store *store)
{
	if (store->n_descriptors < maximum() && store->n_bytes + NAME_SIZE <= NAMES_MAX)
		return true;
	if (!store->full)
		log_warning("The service manager's store is full with %zu descriptor%s: what else is "
			    "pinned will not outlive a crash of this process.",
			    store->n_descriptors, PLURAL(store->n_descriptors));
	store->full = store->refused = true;
	return false;
}

bool store_has_room_again(struct store *store)
{
	bool again = store->refused && !store->full;

	store->refused &= store->full;
	return again;
}

void store_keep(struct store *store, struct store_copy *copy, char kind, uint64_t id, int fd)
{
	char name[NAME_SIZE], text[REQUEST_SIZE];
	int r;

	if (!store->notifier)
		return;
	r = kept_join(store, copy, kind, id, fd);
	if (r == 0) {
		make_name(name, kind, id);
		make_request(text, name);
		r = has_room(store) ? notifier_post(store->notifier, text, fd) : 1;
		if (r == 0)
			count(store, name);
		else
			free(kept_leave(store, copy));
	}
	if (r < 0)
		log_errno(LOG_WARNING, r, "Cannot have a descriptor kept by the service manager");
}

void store_kept(struct store *store, struct store_copy *copy, char kind, uint64_t id, int fd)
{
	char name[NAME_SIZE];

	if (kept_join(store, copy, kind, id, fd) != 0)
		return;
	make_name(name, kind, id);
	count(store, name);
}

bool store_is_busy(const struct store *store)
{
	return store->dropped_usec != 0 && now_usec() - store->dropped_usec < BUSY_USEC;
}

void store_drop_name(struct store *store, const char *name)
{
	char text[320];
	int r;

	if (!store->notifier)
		return;
	store->dropped_usec = now_usec();
	snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s", name);
	r = notifier_post(store->notifier, text, -1);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot have %s removed from the service manager's store",
			  name);
}

void store_drop(struct store *store, struct store_copy *copy)
{
	char name[NAME_SIZE], request[REQUEST_SIZE];
	struct kept *kept = copy->kept ? kept_leave(store, copy) : NULL;

	if (!kept)
		return;
	make_name(name, kept->kind, kept->id);
	free(kept);
	make_request(request, name);
	if (!notifier_cancel(store->notifier, request))
		store_drop_name(store, name);
	store->n_descriptors--;
	store->n_bytes -= strlen(name) + 1;
	store->full = false;
}

int store_barrier(struct store *store)
{
	int fds[2], r;

	if (!store->notifier || pipe2(fds, O_CLOEXEC) < 0)
		return -1;
	r = notifier_post(store->notifier, "BARRIER=1", fds[1]);
	safe_close(fds[1]);
	if (r < 0)
		fds[0] = safe_close(fds[0]);
	return fds[0];
}
