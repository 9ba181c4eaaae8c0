/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/context/ops.h"
#include "daemon/core/pin.h"
#include "daemon/kernel/pin-counter.h"
#include "daemon/kernel/process.h"
#include "daemon/manager/fd-store.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

struct broker;
struct client;
struct revocation;
struct user;

/* Wants to know when it has been looked whether leaving pins are gone. */
struct context_waiter {
	void (*looked)(struct context_waiter *waiter);
	LIST_ENTRY(context_waiter) of_context;
};

LIST_HEAD(context_waiters, context_waiter);

/* Why pins are not taken for gone though nobody was found with the context. */
struct context_doubt {
	struct pin_counter counter; /* as it was before our copy was closed */
	uint64_t n_pages;           /* nothing that was pinned was let go of then: so many at most; 0: it was */
	pid_t unseen;               /* may have it, and cannot be looked into; 0: nobody */
	uint64_t closed_usec;       /* when that was */
	bool told;                  /* the log says so */
};

struct context {
	uint64_t id;
	struct client *client; /* client::contexts; NULL: removed, and kept for a job's sake */
	struct user *user;     /* reference; one LIMIT_CONTEXTS */
	const struct context_ops *ops;
	int fd; /* owned, with one LIMIT_DESCRIPTORS; closed by offload; -1: closed already, by a reap */
	char *label;
	struct context_description description;
	struct pins_by_id pins; /* owned; of the client's */
	unsigned n_pins;        /* those that are not over */
	uint64_t n_pages;       /* that these hold */
	struct pin_list leaving; /* of its pins, those that are leaving and not over, … */
	unsigned n_leaving, n_leaving_wanted; /* … and of these, those that somebody waits for */
	unsigned n_wanted; /* the same, leaving or not */
	unsigned n_unchecked; /* of those that are awaited, in the present round of checks */
	unsigned n_jobs;       /* jobs on the pool that use fd: it stays open meanwhile */
	unsigned n_detaching;  /* of them, those that destroy handles */
	int remote;            /* its number in the client, for kinds that cannot be sent; -1: it was sent */
	struct store_copy copy; /* the service manager's */
	bool checking;         /* a job looks whether leaving pins are gone */
	bool check_again;
	bool ask; /* the next look may get in the way of the holder, who says that he is done */
	bool orphaned; /* its client has died, and it has been looked at for that */
	bool reaping; /* a job looks who else holds it, or waits for the others to come back */
	bool looking; /* a job looks whether its client has it still */
	bool copied;  /* what was let go of is seen to live on in a copy */
	struct context_doubt doubt;
	pid_t other_holder; /* who was last found with it, beside us; or negative errno */
	uint64_t searched_usec; /* when all were last looked through for that */
	uint64_t withdrawn;       /* the revocation with which its device goes, or 0 */
	uint64_t detached_by;     /* the revocation that last had its pins detached */
	uint64_t reap_revocation; /* the one that waits for it, or 0 */
	uint64_t check_usec;      /* the back-off of the next look */
	sd_event_source *recheck; /* its timer */
	struct context_waiters waiters; /* for the end of `checking` */
	struct context_waiters unpins;  /* … of `n_detaching` */
	LIST_ENTRY(context) of_client;
	RB_ENTRY(context) by_id; /* broker::contexts */
};

/* Takes the descriptor over on success. REFUSED if LIMIT_CONTEXTS is reached. */
int context_new(struct client *client, const struct context_ops *ops,
		const struct context_description *description, int fd, const char *label,
		struct context **ret, struct refusal *ret_refusal);
/* It was taken from the client, by its number there. */
void context_set_remote(struct context *context, int number);
/* Takes a descriptor of this kind from the client, by its number there, and charges it. */
bool context_fetch(const struct client *client, int number, const struct context_ops *ops, int *ret_fd);
/* Has the service manager keep a copy of its descriptor, if that may be. */
void context_keep(struct context *context);
/* Frees its pins, too, without a word: see that it has none that live. */
struct context *context_free(struct context *context);

/*
 * Its device is going away: nothing more is pinned through it, and our own copy is closed once the last
 * pin has ended. To be called when the revocation of its pins has been started.
 */
void context_withdraw(struct context *context, uint64_t revocation);
/* Closes it if that is to be done now. */
void context_close_withdrawn(struct context *context);

/* Keeps its descriptor open, for a job; release returns false if the context is no more. */
struct context *context_hold(struct context *context);
bool context_release(struct context *context, struct broker *broker);

/* The next pin by identifier, over or not; NULL: none. */
struct pin *context_next_pin(struct context *context, uint64_t after);
void context_add_pin(struct context *context, struct pin *pin);
void context_remove_pin(struct context *context, struct pin *pin);
/* How many have to be seen to be gone: pin_is_awaited(). */
unsigned context_n_awaited(const struct context *context);

/* The same as context_check(), a moment later, once for however many ask. */
void context_check_soon(struct context *context);
/* Looks whether the pins that are leaving are gone, and goes on looking until they are. */
void context_check(struct context *context);
/* The same, and tells the waiter when it is known. False: there is nothing to look for. */
bool context_look(struct context *context, struct context_waiter *waiter);
/* Tells the waiter when nothing is being detached by force any more. False: nothing is. */
bool context_wait_detached(struct context *context, struct context_waiter *waiter);

/*
 * Looks whether any other process holds it. If none does, our own copy is closed, and its pins end, with
 * PROOF_PRESUMED if the holder has not said itself that they have. Otherwise they stay, as they do if
 * something contradicts: see struct context_doubt.
 */
void context_reap(struct context *context);
/* Reaps it if its living client, who has pins on it and is not connected, or is to let go, is seen not to have it
 * any more. */
void context_look_for_holder(struct context *context);
/* The same in a while, if its client is to let go then. */
void context_look_later(struct context *context, uint64_t usec);
static inline bool context_is_doubtful(const struct context *context)
{
	return context->doubt.n_pages > 0 || context->doubt.unseen > 0;
}
/* Why, in words for people. */
void context_say_doubt(const struct context *context, char *ret, size_t size);

/* Detaches the revocation's pins by force, or, where that cannot be done, reaps the context; calls
 * revocation_job_done() afterwards. */
int context_detach(struct context *context, struct revocation *revocation);

void context_info(const struct context *context, struct msg_context_info *ret);
