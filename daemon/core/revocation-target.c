/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/revocation.h"

#include <errno.h>
#include <stdlib.h>

#include "daemon/core/broker.h"

/* What a revocation wants gone: stakes in contexts, and their targets, in the order of clients,
 * contexts and pins. Places in it are values, so that whoever goes through them some each turn
 * finds his way again. */

static int compare_stake(const struct stake *a, const struct stake *b)
{
	if (a->client != b->client)
		return a->client < b->client ? -1 : 1;
	return a->id < b->id ? -1 : a->id > b->id;
}

static int compare_target(const struct target *a, const struct target *b)
{
	return a->id < b->id ? -1 : a->id > b->id;
}

TREE_GENERATE(stakes, stake, by_context, compare_stake)
TREE_GENERATE(targets, target, by_pin, compare_target)

struct stake *stake_next(struct revocation *rev, struct place after)
{
	return stakes_RB_NFIND(
		&rev->stakes, &(struct stake){.client = after.client, .id = after.context + 1});
}

struct stake *stake_after(const struct stake *stake)
{
	return stake_next(stake->revocation, (struct place){ .client = stake->client, .context = stake->id });
}

struct target *target_next(struct revocation *rev, struct place after)
{
	const struct stake key = {.client = after.client, .id = after.context};
	struct stake *stake = stakes_RB_FIND(&rev->stakes, (struct stake *)&key);
	struct target *target = stake ? targets_RB_NFIND(&stake->targets,
						&(struct target){.id = after.pin + 1})
				      : NULL;

	if (target)
		return target;
	stake = stake_next(rev, after);
	return stake ? RB_MIN(targets, &stake->targets) : NULL;
}

static bool has_stake(struct revocation *rev, const struct client *client)
{
	const struct stake *stake = stake_next(rev, (struct place){ .client = client->id });

	return stake && stake->client == client->id;
}

static struct stake *stake_get(struct revocation *rev, struct context *context)
{
	const struct stake key = {.client = context->client->id, .id = context->id};
	struct stake *stake = stakes_RB_FIND(&rev->stakes, (struct stake *)&key);

	if (stake)
		return stake;
	stake = malloc(sizeof(*stake));
	if (!stake)
		return NULL;
	*stake = key;
	stake->revocation = rev;
	stake->context = context;
	rev->n_clients += !has_stake(rev, context->client);
	RB_INIT(&stake->targets);
	stakes_RB_INSERT(&rev->stakes, stake);
	return stake;
}

static void stake_collect(struct stake *stake)
{
	if (!RB_EMPTY(&stake->targets))
		return;
	stakes_RB_REMOVE(&stake->revocation->stakes, stake);
	free(stake);
}

int target_new(struct revocation *rev, struct pin *pin)
{
	struct target *target;
	struct stake *stake;

	LIST_FOREACH (target, &pin->targets, of_pin)
		if (target->stake->revocation == rev)
			return 0; /* named twice: once is enough */
	stake = stake_get(rev, pin->context);
	if (!stake)
		return -ENOMEM;
	target = malloc(sizeof(*target));
	if (!target) {
		stake_collect(stake);
		return -ENOMEM;
	}
	*target = (struct target){
		.stake = stake,
		.pin = pin,
		.id = pin->id,
		.on_demand = pin->on_demand,
	};
	targets_RB_INSERT(&stake->targets, target);
	stake->n_awaited += !target->on_demand;
	pin_add_target(pin, target);
	return 1;
}

void target_free(struct target *target)
{
	struct stake *stake = target->stake;

	stake->n_awaited -= !target->on_demand;
	targets_RB_REMOVE(&stake->targets, target);
	free(target);
	stake_collect(stake);
}
