/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/util/offload.h"

/*
 * What is read from a connection, and whether it may be. Bytes are read on the loop. What comes
 * with descriptors is read on the pool: whatever the kernel drops then, for want of a number or on
 * a security module's word, is closed by the thread that reads.
 *
 * A connection that would bring its user over a limit is not read for a moment, and then tried
 * again. One whose client has a running revocation has a reserve: Unpin comes through. Of a user's connections
 * one at a time may have its message past the limit, as none of many that have all a part could be complete
 * otherwise. And one that has stopped in the middle of a message gives way to those that have more to send.
 */

struct connection;
struct peer;

/* Embedded in struct peer, all zero to begin with. */
struct intake {
	struct job job;                /* holds a reference to the peer */
	bool reading;                  /* the job is under way; peer::pending is set */
	struct connection *connection; /* whose input the job has */
	bool orphaned;                 /* … and that is to be freed then: the peer was closed */
	int result;
	sd_event_source *retry;
	bool stalled;          /* not to be read until then */
	unsigned n_unread_fds; /* went out with answers that may not have been read */
	bool in_part;          /* is in parts::peers */
	uint64_t part_usec;    /* when the last of its message came */
	TAILQ_ENTRY(peer) of_parts;
};

/* Returns what connection_read() does: -EAGAIN also if it goes on later, with peer_read(). */
int intake_read(struct peer *peer);
/* Charges bytes that its connection keeps. */
int intake_charge(int64_t bytes, void *userdata);
/* Are too many of its answers unread to do anything that has more? */
bool intake_is_full(const struct peer *peer);
/* Its connection is being closed. Returns true if that is done later. */
bool intake_close(struct peer *peer);
