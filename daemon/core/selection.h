/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Which pins a revocation is of. They are looked for some each turn of the loop. The position is a
 * value, so that the search goes on whatever ends meanwhile; what is pinned after it began is not
 * among them.
 */

struct broker;
struct context;
struct file;
struct pin;
struct selection;
struct use;

/* A file system, but for what was opened through certain mounts of it. */
struct mounts {
	uint64_t device; /* where mounts are listed */
	const uint64_t *others; /* not meant */
	size_t n_others;
};

/* What is meant, where it is neither a file nor a list. Either may be NULL: none. */
struct selection_filter {
	/* use: what one client has of it, as clients may have opened it in several ways; NULL: the broker's own */
	bool (*file)(const struct file *file, const struct use *use, const struct selection *selection);
	bool (*context)(const struct context *context, const struct selection *selection);
};

struct selection {
	struct broker *broker;
	uint64_t file, start; /* the pins of this file that end after start; 0: other ones */
	uint64_t *ids;        /* owned; these pins; NULL: other ones */
	size_t n_ids;
	const struct selection_filter *filter; /* the pins of what it names */

	/* for the filter; client and pinning also with a file */
	uint64_t client; /* 0: any */
	bool pinning;    /* only pins that hold pages */

	/* with a file */
	bool unwanted; /* only pins that no revocation wants gone already */
	bool untold;   /* of those on demand, only pins that none has told of */
	bool of_uid;   /* only those of this uid */
	uid_t uid;

	/* for the filter */
	char *name; /* owned */
	dev_t number;
	struct mounts mounts; /* owned */

	/* the position */
	uint64_t last; /* identifier that is looked at */
	uint64_t after, after_offset;
	size_t i;
};

struct selection selection_of_file(const struct file *file, uint64_t start);
/* -ENOMEM */
int selection_of_pins(
	struct broker *broker, const uint64_t *ids, size_t n_ids, struct selection *ret);
struct selection selection_of(struct broker *broker, const struct selection_filter *filter);
/* With copies of what it owns. -ENOMEM */
int selection_copy(const struct selection *selection, struct selection *ret);
void selection_clear(struct selection *selection);

/* Takes one step: 0 at the end, else 1, with a pin that is not over, or NULL. */
int selection_next(struct selection *selection, struct pin **ret);
/* Takes back the last step, which found this pin. */
void selection_retry(struct selection *selection, const struct pin *pin);
