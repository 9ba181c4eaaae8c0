/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "revocation.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "broker.h"
#include "bus.h"
#include "log.h"
#include "macro.h"
#include "notice.h"

/* The holders of a revocation: which of them is the breaker itself, and whether any is left to turn to. */

static bool is_breaker(const struct client *client, const pid_t *breakers, size_t n_breakers)
{
	for (size_t i = 0; i < n_breakers; i++)
		if (!client->dead && client->process.pid == breakers[i])
			return true;
	return false;
}

/* A holder that waits for itself cannot answer a notice: its own pins go by force, at once. Whoever else
 * holds the file keeps its time. */
static void force_breakers(struct revocation *rev, const pid_t *breakers, size_t n_breakers)
{
	_cleanup_(freep) struct pin **pins = calloc(rev->n_targets + 1, sizeof(*pins));
	size_t n = 0, n_others = 0;
	int r = -ENOMEM;

	for (size_t i = 0; i < rev->n_targets && pins; i++) {
		struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		if (pin && is_breaker(pin->context->client, breakers, n_breakers))
			pins[n++] = pin;
		else
			n_others += pin != NULL;
	}
	if (pins && n > 0 && n_others == 0)
		revocation_event(rev, REVOKE_FORCE);
	else if (pins && n > 0)
		r = revocation_start(rev->broker, pins[0]->use->file, false, &rev->conflict, pins, n, 0,
				     true, NULL);
	if (n_others > 0 && r < 0 && (n > 0 || !pins))
		log_errno(LOG_ERR, r, "Cannot force the pins that the breaker itself has on %s",
			  revocation_path(rev));
}

void revocation_blame(struct revocation *rev, const struct conflict *who, const pid_t *breakers,
		      size_t n_breakers)
{
	struct log_fields fields;
	char size[40] = "";

	if (!revocation_is_running(rev) || rev->conflict.pid != 0)
		return;
	rev->conflict = *who;
	bus_changed(rev->broker->bus, &rev->view);
	fields = revocation_fields(rev);
	if (who->size != INT_NULL)
		snprintf(size, sizeof(size), " to %" PRIi64 " bytes", who->size);
	log_event(LOG_NOTICE, MESSAGE_REVOKE_BLAMED, &fields,
		  "Revocation %" PRIu64 " of %s is on behalf of %s (pid %d) (%s%s).", rev->id,
		  revocation_path(rev), who->comm, who->pid, fields.cause, size);
	notice_send(rev);
	if (rev->state == REVOCATION_NOTIFIED)
		force_breakers(rev, breakers, n_breakers);
}

bool revocation_is_reaping(const struct revocation *rev)
{
	for (size_t i = 0; i < rev->n_targets; i++) {
		const struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		if (pin && pin->context->reaping)
			return true;
	}
	return false;
}

/* Is there anybody left to turn to, by a notice or a signal, as the rung is? */
static bool has_living(const struct revocation *rev)
{
	for (size_t i = 0; i < rev->n_targets; i++) {
		const struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		if (!pin)
			continue;
		if (rev->state == REVOCATION_NOTIFIED ? client_can_answer(pin->context->client)
						      : !pin->context->client->dead)
			return true;
	}
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
		for (size_t i = 0; i < rev->n_targets; i++) {
			const struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

			if (pin && pin->context->client == client) {
				rev->targets[i].asked = 0;
				takes_part = true;
			}
		}
		if (takes_part)
			revocation_repeat(rev);
	}
}

/* Could the end of a reap still tell something? */
static bool has_open_context(const struct revocation *rev)
{
	for (size_t i = 0; i < rev->n_targets; i++) {
		const struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		if (pin && pin->context->fd >= 0)
			return true;
	}
	return false;
}

void revocation_search(struct revocation *rev)
{
	rev->searching = true;
	/* one that is closed already ends its pins, and perhaps the revocation */
	for (size_t i = 0; revocation_is_running(rev) && i < rev->n_targets; i++) {
		struct pin *pin = revocation_awaited_pin(&rev->targets[i]);

		if (pin)
			context_reap(pin->context);
	}
	if (revocation_is_running(rev) && !has_open_context(rev))
		revocation_event(rev, REVOKE_UNREACHABLE);
}

void revocation_check_reachable(struct broker *broker)
{
	uint64_t after = 0;
	struct revocation *rev;

	while ((rev = broker_next_revocation(broker, after))) {
		after = rev->id;
		if (!revocation_is_running(rev) || revocation_is_reaping(rev) ||
		    (has_living(rev) && !rev->searching))
			continue;
		if (rev->state == REVOCATION_NOTIFIED)
			revocation_event(rev, REVOKE_FORCE);
		else
			revocation_event(rev, REVOKE_UNREACHABLE);
	}
}
