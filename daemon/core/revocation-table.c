/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/revocation-table.h"

#define TO_DETACHING                                                                               \
	{                                                                                          \
		REVOCATION_DETACHING, REVOKE_DETACH | REVOKE_ARM_DETACH                            \
	}
#define TO_SIGNALLED                                                                               \
	{                                                                                          \
		REVOCATION_SIGNALLED, REVOKE_SIGNAL | REVOKE_ARM_SIGNAL                            \
	}
#define TO_KILLED                                                                                  \
	{                                                                                          \
		REVOCATION_KILLED, REVOKE_KILL | REVOKE_ARM_KILL                                   \
	}
#define TO_RELEASED                                                                                \
	{                                                                                          \
		REVOCATION_RELEASED, REVOKE_DISARM | REVOKE_RELEASE | REVOKE_END                   \
	}
#define TO_LOST                                                                                    \
	{                                                                                          \
		REVOCATION_LOST, REVOKE_DISARM | REVOKE_REPORT | REVOKE_RELEASE | REVOKE_END       \
	}

struct revocation_step revocation_begin(bool forced)
{
	if (forced)
		return (struct revocation_step){
			REVOCATION_DETACHING,
			REVOKE_NOTIFY | REVOKE_DETACH | REVOKE_ARM_DETACH,
		};
	return (struct revocation_step){ REVOCATION_NOTIFIED, REVOKE_NOTIFY | REVOKE_ARM_GRACE };
}

struct revocation_step revocation_next(enum revocation_state state, enum revocation_event event)
{
	/* A rung that is not listed for an event stays where it is. */
	static const struct revocation_step table[REVOCATION_KILLED + 1][REVOCATION_EVENT_COUNT] = {
		[REVOCATION_NOTIFIED] = {
			[REVOKE_FORCE] = TO_DETACHING,
			[REVOKE_GONE] = TO_RELEASED,
			[REVOKE_TIMEOUT] = TO_DETACHING,
			[REVOKE_EXTENDED] = { REVOCATION_NOTIFIED, REVOKE_ARM_GRACE },
		},
		[REVOCATION_DETACHING] = {
			[REVOKE_GONE] = TO_RELEASED,
			[REVOKE_TIMEOUT] = TO_SIGNALLED,
			[REVOKE_DETACHED] = TO_SIGNALLED,
		},
		[REVOCATION_SIGNALLED] = {
			[REVOKE_GONE] = TO_RELEASED,
			[REVOKE_TIMEOUT] = TO_KILLED,
			[REVOKE_UNREACHABLE] = TO_KILLED,
		},
		[REVOCATION_KILLED] = {
			[REVOKE_GONE] = TO_RELEASED,
			[REVOKE_TIMEOUT] = TO_LOST,
			/* that there is nobody to turn to is no reason to give the pages away sooner */
		},
	};
	struct revocation_step none = { state, 0 };

	if (revocation_state_is_end(state) || table[state][event].actions == 0)
		return none;
	return table[state][event];
}
