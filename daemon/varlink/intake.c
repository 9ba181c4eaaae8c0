/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/intake.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>

#include "daemon/core/broker.h"
#include "daemon/util/closer.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

#define RETRY_USEC (10 * USEC_PER_MSEC)

/* A message of which nothing more comes for so long has stopped. */
#define STOPPED_USEC (1 * USEC_PER_SEC)

/* Of one connection: answers, and descriptors in them, that were not read. */
#define UNREAD_MAX     (64U * 1024U)
#define UNREAD_FDS_MAX 16U

/* The least that MaxUnfinishedPerUser= means for closes, and what there is beyond limits where a
 * client is to let go. */
#define CLOSES_MIN          64U
#define RESERVE_CLOSES      64U
#define RESERVE_DESCRIPTORS (2U * CONNECTION_READ_FDS_MAX)
#define RESERVE_BYTES       (4U * 1024U * 1024U)
#define RESERVE_UNREAD      (1024U * 1024U)

/* Is its client to let go of something? */
static bool is_urgent(const struct peer *peer)
{
	const struct client *client = peer->session.client;
	const struct context *context;

	if (!client || client->n_pins == 0 || peer->broker->n_running == 0)
		return false;
	LIST_FOREACH (context, &client->contexts, of_client)
		if (context->n_wanted > 0)
			return true;
	return false;
}

int intake_charge(int64_t bytes, void *userdata)
{
	const struct peer *peer = userdata;

	if (bytes < 0) {
		user_discharge(peer->user, LIMIT_QUEUED_BYTES, (uint64_t)-bytes);
		return 0;
	}
	if (user_charge(peer->user, LIMIT_QUEUED_BYTES, (uint64_t)bytes) >= 0 ||
		(peer->user->parts.over == peer &&
			user_charge_reserve(peer->user, LIMIT_QUEUED_BYTES, (uint64_t)bytes,
				CONNECTION_MESSAGE_MAX) >= 0))
		return 0;
	return is_urgent(peer) ? user_charge_reserve(peer->user, LIMIT_QUEUED_BYTES,
					 (uint64_t)bytes, RESERVE_BYTES)
			       : -EDQUOT;
}

bool intake_is_full(const struct peer *peer)
{
	size_t n = connection_queued(peer->connection);

	return n > UNREAD_MAX && (n > RESERVE_UNREAD || !is_urgent(peer));
}

/* Answers with descriptors that nobody reads keep these open, in the socket as well. */
static bool has_unread_fds(struct peer *peer)
{
	int n;

	if (peer->intake.n_unread_fds < UNREAD_FDS_MAX)
		return false;
	if (connection_queued(peer->connection) > 0 ||
		ioctl(connection_get_fd(peer->connection), SIOCOUTQ, &n) < 0 || n > 0)
		return true;
	peer->intake.n_unread_fds = 0;
	return false;
}

/* As many as can come are charged; those that have not are discharged afterwards. */
static bool charge_descriptors(struct peer *peer)
{
	struct user *user = peer->user;
	bool urgent = is_urgent(peer);
	uint64_t max = user_maximum(user, LIMIT_UNFINISHED);
	unsigned n = user->closers[CLOSER_RECEIVED].n_unfinished;

	if (n >= CLOSES_MIN && n >= max && !(urgent && n - RESERVE_CLOSES < max))
		return false;
	if (has_unread_fds(peer) && !urgent)
		return false;
	return user_charge_reserve(user, LIMIT_DESCRIPTORS, CONNECTION_READ_FDS_MAX,
		       urgent ? RESERVE_DESCRIPTORS : 0) >= 0;
}

static void leave_parts(struct peer *peer)
{
	if (peer->intake.in_part)
		TAILQ_REMOVE(&peer->user->parts.peers, peer, intake.of_parts);
	peer->intake.in_part = false;
}

static void join_parts(struct peer *peer)
{
	struct parts *parts = &peer->user->parts;

	leave_parts(peer);
	if (!parts->peers.tqh_last)
		TAILQ_INIT(&parts->peers);
	TAILQ_INSERT_TAIL(&parts->peers, peer, intake.of_parts);
	peer->intake.in_part = true;
	peer->intake.part_usec = now_usec();
}

static void leave(struct peer *peer)
{
	leave_parts(peer);
	if (peer->user->parts.over == peer)
		peer->user->parts.over = NULL;
}

/* Something has been read. */
static void note(struct peer *peer)
{
	if (connection_kept_of_part(peer->connection) > 0)
		join_parts(peer);
	else
		leave(peer);
}

static bool has_stopped(const struct peer *peer)
{
	int n;

	return now_usec() - peer->intake.part_usec >= STOPPED_USEC &&
	       ioctl(peer->fd, SIOCINQ, &n) >= 0 && n == 0;
}

/* It has more to send, for which there is no room. */
static void want_room(struct peer *peer)
{
	struct peer *first;

	leave_parts(peer);
	first = TAILQ_FIRST(&peer->user->parts.peers);
	if (first && has_stopped(first))
		peer_give_way(first);
	else if (first && now_usec() - first->intake.part_usec >= STOPPED_USEC)
		join_parts(first); /* it was not read for a while: the next one may have stopped */
}

static void read_run(struct job *job)
{
	struct intake *intake = container_of(job, struct intake, job);

	intake->result = connection_read(intake->connection);
}

static void read_done(struct job *job)
{
	struct peer *peer = container_of(job, struct peer, intake.job);
	struct intake *intake = &peer->intake;

	user_discharge(peer->user, LIMIT_DESCRIPTORS,
		CONNECTION_READ_FDS_MAX - connection_received(intake->connection));
	intake->reading = false;
	peer->pending = false;
	if (intake->orphaned) {
		connection_free(intake->connection);
	} else {
		note(peer);
		peer_read(peer, intake->result);
	}
	peer_unref(peer);
}

static int on_retry(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct peer *peer = userdata;

	peer->intake.stalled = false;
	peer_set_events(peer);
	return 0;
}

static int stall(struct peer *peer)
{
	struct intake *intake = &peer->intake;
	int r;

	if (!intake->retry)
		r = sd_event_add_time_relative(peer->broker->event, &intake->retry, CLOCK_MONOTONIC,
			RETRY_USEC, 0, on_retry, peer);
	else
		r = sd_event_source_set_time_relative(intake->retry, RETRY_USEC);
	if (r >= 0)
		r = sd_event_source_set_enabled(intake->retry, SD_EVENT_ONESHOT);
	if (r < 0)
		return r;
	intake->stalled = true;
	return -EAGAIN;
}

int intake_read(struct peer *peer)
{
	struct intake *intake = &peer->intake;
	int r = connection_read_bytes(peer->connection);

	if (r == -EDQUOT && !peer->user->parts.over) {
		peer->user->parts.over = peer;
		r = connection_read_bytes(peer->connection);
	}
	if (r == -EDQUOT)
		want_room(peer);
	else if (r == 1)
		note(peer);
	if (r == -EDQUOT || (r == CONNECTION_DESCRIPTORS && !charge_descriptors(peer)))
		return stall(peer);
	if (r != CONNECTION_DESCRIPTORS)
		return r;
	intake->job.run = read_run;
	intake->job.done = read_done;
	intake->result = -ECANCELED;
	intake->connection = peer->connection;
	intake->reading = true;
	peer->pending = true;
	peer_ref(peer);
	offload_submit_uncharged(
		peer->broker->offload, OFFLOAD_CONNECTIONS, peer->user, &intake->job);
	return -EAGAIN;
}

bool intake_close(struct peer *peer)
{
	struct intake *intake = &peer->intake;

	intake->retry = sd_event_source_disable_unref(intake->retry);
	leave(peer);
	if (!intake->reading)
		return false;
	intake->orphaned = true;
	peer->connection = NULL;
	return true;
}
