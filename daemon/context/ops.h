/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/kernel/process.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

struct config;

/*
 * What holds page pins, known by a descriptor. One kind, one file, one table of operations. All
 * operations run on the offload pool and touch nothing but their arguments.
 */

/* What a pin's handle was seen to be when it was bound; see struct handle. */
struct handle_identity {
	uint64_t address;
	uint64_t length;
	uint64_t key; /* RDMA: lkey and rkey, which is 0 without remote access; else 0 */
};

static inline bool handle_identity_equal(const struct handle_identity *a,
					 const struct handle_identity *b)
{
	return a->address == b->address && a->length == b->length && a->key == b->key;
}

struct handle {
	uint64_t pin;
	int64_t handle;
	struct handle_identity identity;
	uint64_t length; /* of the pin */
	bool keep; /* detach: not to be touched, and known to be there */
	bool ask;  /* check: in ways, too, that can get in the way of its holder, should he be at it now */
	bool left; /* detach: its holder has let go of it */
	bool gone; /* out: it was seen not to be there any more */
	bool destroyed; /* out, detach: by us */
};

struct context_description {
	char device[64]; /* empty: none */
	dev_t number;    /* of the device's node; 0: none */
	bool forcible;
	enum proof proof;
};

struct page_count {
	uint64_t least, most; /* 0: not known */
};

struct context_ops {
	const char *kind;

	/* Is the descriptor, whose /proc/self/fd link reads `link` ("" for sockets), of this kind? */
	bool (*identify)(int fd, const char *link);

	/* Finds out, doing no harm, what can be done through it. Default: nothing, and its holder is
	 * believed (PROOF_CLAIMED). */
	int (*describe)(int fd, const struct config *config, struct context_description *ret);

	/* What the handle is at present; -ENOENT: there is none. Default: -EOPNOTSUPP, no handle is
	 * ever checked. */
	int (*read_handle)(int fd, int64_t handle, struct handle_identity *ret);

	/* Detaches what the handles name by force, where they are still what they were, and sets `gone`
	 * on those that are seen to be gone with the proof of the kind; all that are bound are given,
	 * those of other pins to keep. An error says that not all are gone: `gone` and `destroyed` of the
	 * others count all the same. Default: -EOPNOTSUPP. */
	int (*detach)(int fd, const struct process *holder, struct handle *handles,
		      size_t n_handles);

	/* Sets `gone` on the handles that are no longer there, after their holder said so. -EBUSY: what was let go
	 * of lives on in a copy. Default: the holder is believed. */
	int (*check)(int fd, const struct process *holder, struct handle *handles, size_t n_handles);

	/* How many pages are pinned through it: those that the kernel's counter has to show at least when they
	 * are let go of, and at most (a huge page may count as one). n_bound: so many have pins that were
	 * bound. Default: not known. */
	void (*count)(int fd, uint64_t n_bound, struct page_count *ret);

	/* Lets everything go that is pinned through it, also for those who have it where nobody can see
	 * it. Default: cannot be done. */
	void (*clear)(int fd);

	/* Is nothing pinned through it (any more), whoever has it? Where it can be asked, that nobody is found
	 * with the descriptor is not enough. Default: cannot be asked. */
	bool (*is_empty)(int fd);

	/* The pages stay pinned until the last close: after Unpin nobody else may hold it, and our own
	 * copy has to be closed. Default: the holder lets go of single pins. */
	bool until_close;

	/* How long after the last close, or after a detach, the kernel begins to free the pages, at most.
	 * Default: at once. */
	uint64_t frees_usec, detach_frees_usec;
};

extern const struct context_ops context_io_uring;
extern const struct context_ops context_af_xdp;
extern const struct context_ops context_rdma;
extern const struct context_ops context_vfio;
extern const struct context_ops context_opaque;

/* The names of the kinds that there are, NULL after the last. */
const char *context_kind(size_t i);
const struct context_ops *context_find_kind(const char *kind); /* NULL: none of that name */

/* The kind of a descriptor, and what can be done through it. REFUSED if it cannot be a context.
 * context_identify() can wait (offload); context_identify_at_once() is -EAGAIN where it would. */
int context_identify(int fd, const struct config *config, const struct context_ops **ret,
		     struct context_description *ret_description, struct refusal *ret_refusal);
int context_identify_at_once(int fd, const struct context_ops **ret,
			     struct context_description *ret_description,
			     struct refusal *ret_refusal);

/* For identify(): the number of the character device that it is; 0: it is none. */
dev_t context_device_number(int fd);

/* Can the last close of such a descriptor keep nobody waiting? The service manager must not hang in that of
 * a lingering socket, or of whatever else is not known. */
bool context_may_be_kept(int fd, const struct context_ops *ops);

/* Is the descriptor, whose holder may have put another in its place, of this kind? */
bool context_is_of_kind(int fd, const struct context_ops *ops);
