/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/interface.h"

/*
 * What a revocation does next: a pure table from (state, event) to (state, actions). No clock and no
 * I/O; the driver in revocation.c carries the actions out.
 *
 * REVOCATION_NOTIFIED .. REVOCATION_KILLED are the rungs of the ladder; REVOCATION_RELEASED and
 * REVOCATION_LOST are the ends.
 */

enum revocation_event {
	REVOKE_FORCE,        /* waiting makes no sense: the breaker is the holder, the holder is dead,
				the kernel took the lease */
	REVOKE_GONE,         /* every pin has ended with proof */
	REVOKE_TIMEOUT,      /* the timer fired */
	REVOKE_EXTENDED,     /* a holder was given more time */
	REVOKE_DETACHED,     /* every forced detach has come back, and pins remain */
	REVOKE_UNREACHABLE,  /* there is nobody (left) to signal or kill, and pins remain */
	REVOCATION_EVENT_COUNT,
};

enum revocation_action {
	/* which timer runs from now on; none of them: it goes on as it is */
	REVOKE_ARM_GRACE = 1 << 0,
	REVOKE_ARM_DETACH = 1 << 1,
	REVOKE_ARM_SIGNAL = 1 << 2,
	REVOKE_ARM_KILL = 1 << 3,
	REVOKE_DISARM = 1 << 4,

	REVOKE_NOTIFY = 1 << 5,  /* tell the holders */
	REVOKE_DETACH = 1 << 6,  /* detach what remains, by force */
	REVOKE_SIGNAL = 1 << 7,  /* send SignalOnTimeout= to the holders that remain */
	REVOKE_KILL = 1 << 8,    /* send SIGKILL to them */
	REVOKE_RELEASE = 1 << 9, /* let the lease go, if nothing else keeps it */
	REVOKE_REPORT = 1 << 10, /* pins are alive under hardware and the pages are being taken */
	REVOKE_END = 1 << 11,    /* tell everybody that it is over */
};

#define REVOKE_ARM (REVOKE_ARM_GRACE | REVOKE_ARM_DETACH | REVOKE_ARM_SIGNAL | REVOKE_ARM_KILL)

struct revocation_step {
	enum revocation_state state;
	unsigned actions;
};

/* The first step. forced: without grace. */
struct revocation_step revocation_begin(bool forced);
/* Every later one. An event that means nothing in a state leaves it as it is, with no actions. */
struct revocation_step revocation_next(enum revocation_state state, enum revocation_event event);

static inline bool revocation_state_is_end(enum revocation_state state)
{
	return state >= REVOCATION_RELEASED;
}
