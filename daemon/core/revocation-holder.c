/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/revocation.h"

#include <inttypes.h>
#include <stdio.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

/* The holders of a revocation: which of them is the breaker itself, and whether any is left to turn to. */

static bool is_breaker(const struct client *client, const pid_t *breakers, size_t n_breakers)
{
	for (size_t i = 0; i < n_breakers; i++)
		if (!client->dead && client->process.pid == breakers[i])
			return true;
	return false;
}

static void force_holder(struct revocation *rev, uint64_t client)
{
	struct file *file = broker_find_file(rev->broker, rev->file);
	struct selection selection;
	int r;

	if (!file)
		return;
	selection = selection_of_file(file, 0);
	selection.client = client;
	selection.pinning = true;
	r = revocation_start(rev->broker, file, false, &rev->conflict, &selection, 0, true, NULL);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot force the pins that the breaker itself has on %s",
			  revocation_path(rev));
}

/* A holder that waits for itself cannot answer a notice: its own pins go by force, at once. Whoever else
 * holds the file keeps its time. */
static void force_breakers(struct revocation *rev, const pid_t *breakers, size_t n_breakers)
{
	uint64_t holders[BREAKERS_MAX];
	bool others = rev->finding;
	size_t n = 0;

	for (struct stake *stake = stake_next(rev, (struct place){}); stake; stake = stake_after(stake)) {
		if (stake->n_awaited == 0)
			continue;
		if (!is_breaker(stake->context->client, breakers, n_breakers))
			others = true;
		else if (n < BREAKERS_MAX && (n == 0 || holders[n - 1] != stake->client))
			holders[n++] = stake->client;
	}
	if (n > 0 && !others)
		revocation_event(rev, REVOKE_FORCE);
	for (size_t i = 0; others && i < n; i++)
		force_holder(rev, holders[i]);
}

void revocation_blame(struct revocation *rev, const struct conflict *who, const pid_t *breakers,
		      size_t n_breakers)
{
	struct log_fields fields;
	char size[40] = "";

	if (!revocation_is_running(rev) || rev->conflict.pid != 0)
		return;
	rev->conflict = *who;
	observe_revocation(rev, OBSERVED_CHANGED);
	fields = revocation_fields(rev);
	if (who->size != INT_NULL)
		snprintf(size, sizeof(size), " to %" PRIi64 " byte%s", who->size, PLURAL(who->size));
	log_event(LOG_NOTICE, MESSAGE_REVOKE_BLAMED, &fields,
		  "Revocation %" PRIu64 " of %s is on behalf of %s (pid %d) (%s%s).", rev->id,
		  revocation_path(rev), who->comm, who->pid, fields.cause, size);
	rev->tell_after = (struct place){};
	rev->telling = true;
	revocation_go_on(rev);
	if (rev->state == REVOCATION_NOTIFIED)
		force_breakers(rev, breakers, n_breakers);
}

bool revocation_is_reaping(struct revocation *rev)
{
	for (struct stake *stake = stake_next(rev, (struct place){}); stake; stake = stake_after(stake))
		if (stake->n_awaited > 0 && stake->context->reaping)
			return true;
	return false;
}

bool revocation_has_living(struct revocation *rev)
{
	for (struct stake *stake = stake_next(rev, (struct place){}); stake; stake = stake_after(stake))
		if (stake->n_awaited > 0 &&
		    (rev->state == REVOCATION_NOTIFIED ? client_can_answer(stake->context->client)
						       : !stake->context->client->dead))
			return true;
	return false;
}

void revocation_inherited(const struct client *client)
{
	struct broker *broker = client->broker;
	uint64_t after = 0;
	struct revocation *rev;

	while ((rev = broker_next_revocation(broker, after))) {
		bool takes_part = false;

		after = rev->id;
		if (rev->state != REVOCATION_SIGNALLED && rev->state != REVOCATION_KILLED)
			continue;
		for (struct stake *stake = stake_next(rev, (struct place){ .client = client->id });
		     stake && stake->client == client->id; stake = stake_after(stake))
			takes_part |= stake->n_awaited > 0;
		if (takes_part)
			revocation_repeat(rev, client->id);
	}
}

/* Could the end of a reap still tell something? */
static bool has_open_context(struct revocation *rev)
{
	for (struct stake *stake = stake_next(rev, (struct place){}); stake; stake = stake_after(stake))
		if (stake->n_awaited > 0 && (stake->context->fd >= 0 || stake->context->reaping))
			return true;
	return false;
}

void revocation_search(struct revocation *rev)
{
	rev->searching = rev->looking = true;
	rev->look_after = (struct place){};
	revocation_go_on(rev);
}

/* One that is closed already ends its pins, and perhaps the revocation. */
void revocation_look(struct revocation *rev, const struct slice *slice)
{
	struct stake *stake;

	while (rev->looking && (stake = stake_next(rev, rev->look_after))) {
		rev->look_after = (struct place){ .client = stake->client, .context = stake->id };
		if (stake->n_awaited > 0)
			context_reap(stake->context);
		if (slice_is_over(slice))
			return;
	}
	if (!rev->looking)
		return;
	rev->looking = false;
	if (!has_open_context(rev))
		revocation_event(rev, REVOKE_UNREACHABLE);
}

void revocation_check_reachable(struct broker *broker)
{
	uint64_t after = 0;
	struct revocation *rev;

	while ((rev = broker_next_revocation(broker, after))) {
		after = rev->id;
		if (!revocation_is_running(rev) || rev->finding || rev->looking || revocation_is_reaping(rev) ||
		    (revocation_has_living(rev) && !rev->searching))
			continue;
		if (rev->state == REVOCATION_NOTIFIED)
			revocation_event(rev, REVOKE_FORCE);
		else
			revocation_event(rev, REVOKE_UNREACHABLE);
	}
}
