/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "daemon/context/ops.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

struct context;
struct file;
struct label;
struct target;
struct use;

/*
 * One byte range of a file, pinned through a context. `over`: it has ended without its holder's
 * word, and is kept only to tell him so when he next names it.
 */
struct pin {
	uint64_t id;
	struct use *use;         /* its file's file::pins; NULL once over */
	struct context *context; /* context::pins, which owns it */
	uint64_t offset, length;
	enum access access : 8;
	enum pin_state state : 8;
	bool over : 1;
	bool lost : 1; /* over: by a restart, see use::lost; its handle is the holder's still */
	bool destroyed : 1; /* its handle was, by force, though it has not ended: see Unpin */
	bool torn : 1;      /* pages of its range were taken from the file, which has been dealt with */
	bool on_demand : 1; /* it holds no pages: its holder is told of conflicts, and nobody waits for it */
	uint32_t left_msec; /* leaving: since when, CLOCK_MONOTONIC */
	int64_t handle; /* INT_NULL: not bound */
	struct handle_identity identity;
	struct label *label; /* shared by the pins of one call; NULL: none */
	uint64_t revocation; /* over: the one that ended it, or use::lost; on demand: the last one told of since Bind */
	LIST_HEAD(, target) targets; /* revocation::targets, one for each that wants it gone */

	/* the interval tree's: the furthest end below this node, of all, and of those that are wanted gone */
	uint64_t subtree_end, subtree_wanted_end;
	RB_ENTRY(pin) by_range;   /* file::pins */
	RB_ENTRY(pin) by_id;      /* broker::pins */
	RB_ENTRY(pin) of_context;    /* context::pins */
	TAILQ_ENTRY(pin) of_leaving;  /* context::leaving, while it is leaving and not over */
};

RB_HEAD(pin_ranges, pin);
RB_HEAD(pins_by_id, pin);
TAILQ_HEAD(pin_list, pin);

/* What it counts for in LIMIT_PINNED_BYTES. */
static inline uint64_t pin_pinned_bytes(const struct pin *pin)
{
	return pin->on_demand ? 0 : pin->length;
}

/* Has its holder been told of it by a revocation that has ended? Only who has it on demand may have. */
static inline bool pin_is_told(const struct pin *pin)
{
	return pin->on_demand && pin->use && pin->revocation != 0;
}

static inline uint64_t pin_end_offset(const struct pin *pin)
{
	return pin->offset + pin->length;
}

/*
 * Reserves a range of the use's file. LIMIT_PINS and LIMIT_PINNED_BYTES (pin_pinned_bytes()) have been
 * charged by the caller and go with the pin. -ENOMEM.
 */
int pin_new(struct context *context, struct use *use, const struct msg_range *range,
	    enum access access, bool on_demand, struct label *label, struct pin **ret);

/* What is known of a pin of the run before. */
struct pin_past {
	uint64_t offset, length;
	enum access access;
	enum pin_state state;
	bool on_demand, over, lost, destroyed;
	uint64_t revocation;
	int64_t handle;
	struct handle_identity identity;
};

/* Makes it as it was; use: NULL if it is over. Charges what it needs. */
int pin_resume(struct context *context, struct use *use, const struct pin_past *past,
	       struct label *label);

/* A revocation wants it gone, or does no more. */
void pin_add_target(struct pin *pin, struct target *target);
void pin_remove_target(struct pin *pin, struct target *target);

/* The revocation that told of a pin on demand; 0: none since it was bound. */
void pin_set_told(struct pin *pin, uint64_t revocation);

/* Takes it out of everything, whatever its state, without a word to anybody. */
struct pin *pin_free(struct pin *pin);

/* Its handle is known, or known anew. REFUSED if it is over, or has been let go. */
int pin_bind(struct pin *pin, int64_t handle, const struct handle_identity *identity,
	     struct refusal *ret_refusal);

/* Its holder lets it go. It ends at once unless it is wanted gone, or can be proved to be: then it must be
 * seen to be. */
void pin_leave(struct pin *pin);
/* Is it to be seen to be gone? */
bool pin_is_awaited(const struct pin *pin);
/* It has ended. Frees it if its holder knows, else keeps it as over. */
void pin_end(struct pin *pin, enum proof proof);

void pin_info(const struct pin *pin, struct msg_pin_info *ret);

/* pin-ranges.c: the pins of a file by range */

void pin_ranges_insert(struct pin_ranges *ranges, struct pin *pin);
void pin_ranges_remove(struct pin_ranges *ranges, struct pin *pin);

/* The first pin, by offset, that overlaps [start, end), after `after` if that is not NULL. */
struct pin *pin_ranges_find(struct pin_ranges *ranges, uint64_t start, uint64_t end,
			    struct pin *after);
/* The first pin that ends after start, behind the place that a pin with this offset and identifier has. */
struct pin *pin_ranges_find_after(struct pin_ranges *ranges, uint64_t start, uint64_t offset, uint64_t id);
/* Whether a pin has targets has changed. */
void pin_ranges_update(struct pin *pin);
/* Any pin with targets that overlaps [start, end). */
struct pin *pin_ranges_find_wanted(struct pin_ranges *ranges, uint64_t start, uint64_t end);
/* The furthest end of all, 0 if there are none. */
uint64_t pin_ranges_end(const struct pin_ranges *ranges);
