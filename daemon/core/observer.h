/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>
#include <sys/queue.h>

/*
 * What happens to the objects of the broker, for whoever shows or records them: the bus, the streams, the state.
 * An observer is told in the middle of what happens: it looks, notes or sends, and changes nothing.
 */

struct client;
struct context;
struct file;
struct msg_notice;
struct pin;
struct revocation;
struct use;

enum observed {
	OBSERVED_ADDED,    /* it can be found by its identifier */
	OBSERVED_CHANGED,  /* what is shown of it may differ */
	OBSERVED_RECORDED, /* what the next instance has to know of it differs */
	OBSERVED_STARTED,  /* a revocation: its holders have been told */
	OBSERVED_ENDED,    /* a revocation: it has an outcome */
	OBSERVED_REMOVED,  /* it can still be found, and is about to be freed */
};

/* A subscriber has this in it. What is NULL is not told to it. */
struct observer {
	void (*client)(struct observer *observer, struct client *client, enum observed what);
	void (*file)(struct observer *observer, struct file *file, enum observed what);
	void (*use)(struct observer *observer, struct use *use, enum observed what);
	void (*context)(struct observer *observer, struct context *context, enum observed what);
	void (*pin)(struct observer *observer, struct pin *pin, enum observed what);
	void (*revocation)(struct observer *observer, struct revocation *revocation, enum observed what);
	/* The client is told of this. It is the observer's only as long as the call. */
	void (*notice)(struct observer *observer, struct client *client, const struct msg_notice *notice);
	/* Identifiers up to this one may have been given out from now on. */
	void (*ids)(struct observer *observer, uint64_t reserved);
	STAILQ_ENTRY(observer) observers; /* broker::observers */
};

STAILQ_HEAD(observers, observer);

/* They are told in the order in which they were added. */
void observer_add(struct observers *observers, struct observer *observer);
void observer_remove(struct observers *observers, struct observer *observer);

void observe_client(struct client *client, enum observed what);
void observe_file(struct file *file, enum observed what);
void observe_use(struct use *use, enum observed what);
void observe_context(struct context *context, enum observed what);
void observe_pin(struct pin *pin, enum observed what);
void observe_revocation(struct revocation *revocation, enum observed what);
void observe_notice(struct client *client, const struct msg_notice *notice);
void observe_ids(struct observers *observers, uint64_t reserved);
