/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "notice.h"

#include <errno.h>
#include <inttypes.h>

#include "broker.h"
#include "bus.h"
#include "log.h"
#include "macro.h"
#include "rpc.h"

/* The targets are ordered by client and file: fills in the notice for those from *i on that have both
 * in common, and moves *i past them. Returns 0 if none is left. */
static int next_notice(const struct revocation *rev, size_t *i, int64_t *ids,
		       struct client **ret_client, struct msg_notice *ret)
{
	const struct pin *first = NULL;
	size_t n = 0;

	for (; rev->targets && *i < rev->n_targets; (*i)++) {
		const struct pin *pin = rev->targets[*i].pin;

		if (!pin)
			continue;
		if (first && (pin->context->client != first->context->client ||
			      pin->use->file != first->use->file))
			break;
		if (!first)
			first = pin;
		ids[n++] = (int64_t)pin->id;
	}
	if (!first)
		return 0;
	*ret_client = first->context->client;
	*ret = (struct msg_notice){
		.revocation = (int64_t)rev->id,
		.client = (int64_t)first->context->client->id,
		.file = (int64_t)first->use->file->id,
		.path = first->use->file->path,
		.pins = { ids, n },
		.deadlineUSec = (int64_t)rev->deadline_usec,
	};
	conflict_message(&rev->conflict, &ret->conflict);
	return 1;
}

void notice_send(const struct revocation *rev)
{
	_cleanup_(freep) int64_t *ids = calloc(rev->n_targets + 1, sizeof(int64_t));
	struct msg_notice notice;
	struct client *client;
	size_t i = 0;

	if (!ids) {
		/* The ladder goes on; a holder that asks (Resume, Watch) is told. */
		log_errno(LOG_ERR, ENOMEM, "Cannot tell the holders of revocation %" PRIu64,
			  rev->id);
		return;
	}
	while (next_notice(rev, &i, ids, &client, &notice)) {
		rpc_send_notice(client, &notice);
		if (rev->broker->bus)
			bus_send_notice(rev->broker->bus, client, &notice);
	}
}

/* What ended revocations have told of pins on demand, which live on: ordered by revocation and file. */
static int compare_told(const void *a, const void *b)
{
	const struct pin *pa = *(struct pin *const *)a, *pb = *(struct pin *const *)b;
	uint64_t ka[] = { pa->revocation, pa->use->file->id, pa->id },
		 kb[] = { pb->revocation, pb->use->file->id, pb->id };

	for (size_t i = 0; i < ELEMENTS(ka); i++)
		if (ka[i] != kb[i])
			return ka[i] < kb[i] ? -1 : 1;
	return 0;
}

static int find_told(struct client *client, struct pin ***ret, size_t *ret_n)
{
	struct context *context;
	struct pin **pins, *pin;
	size_t n = 0;

	pins = calloc(client->n_pins + 1, sizeof(*pins));
	if (!pins)
		return -ENOMEM;
	LIST_FOREACH(context, &client->contexts, of_client)
		LIST_FOREACH(pin, &context->pins, of_context)
			if (pin->on_demand && !pin->over && pin->revocation != 0)
				pins[n++] = pin;
	qsort(pins, n, sizeof(*pins), compare_told);
	*ret = pins;
	*ret_n = n;
	return 0;
}

static int tell_again(struct client *client,
		      int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	_cleanup_(freep) struct pin **pins = NULL;
	_cleanup_(freep) int64_t *ids = NULL;
	size_t n, end;
	int r;

	r = find_told(client, &pins, &n);
	if (r < 0)
		return r;
	ids = calloc(n + 1, sizeof(*ids));
	if (!ids)
		return -ENOMEM;
	for (size_t i = 0; i < n && r >= 0; i = end) {
		const struct pin *first = pins[i];
		/* It may be too long ago to be known still. */
		const struct revocation *rev =
			broker_find_revocation(client->broker, first->revocation);
		struct conflict unknown = conflict_new(CAUSE_MODIFY);
		struct msg_notice notice = {
			.revocation = (int64_t)first->revocation,
			.client = (int64_t)client->id,
			.file = (int64_t)first->use->file->id,
			.path = first->use->file->path,
			.deadlineUSec = rev ? (int64_t)rev->start_usec : 0,
		};

		for (end = i; end < n && pins[end]->revocation == first->revocation &&
			      pins[end]->use->file == first->use->file;
		     end++)
			ids[end] = (int64_t)pins[end]->id;
		notice.pins = (struct ints){ ids + i, end - i };
		conflict_message(rev ? &rev->conflict : &unknown, &notice.conflict);
		r = f(&notice, userdata);
	}
	return r;
}

static int compare_lost(const void *a, const void *b)
{
	const struct pin *pa = *(struct pin *const *)a, *pb = *(struct pin *const *)b;

	if (pa->revocation != pb->revocation)
		return pa->revocation < pb->revocation ? -1 : 1;
	return pa->id < pb->id ? -1 : pa->id > pb->id;
}

/* Those that a restart has lost, in the order of use::lost. */
static int find_lost(struct client *client, struct pin ***ret, size_t *ret_n)
{
	struct context *context;
	struct pin **pins, *pin;
	size_t n = 0;

	LIST_FOREACH(context, &client->contexts, of_client)
		LIST_FOREACH(pin, &context->pins, of_context)
			n += pin->lost;
	pins = calloc(n + 1, sizeof(*pins));
	if (!pins)
		return -ENOMEM;
	n = 0;
	LIST_FOREACH(context, &client->contexts, of_client)
		LIST_FOREACH(pin, &context->pins, of_context)
			if (pin->lost)
				pins[n++] = pin;
	qsort(pins, n, sizeof(*pins), compare_lost);
	*ret = pins;
	*ret_n = n;
	return 0;
}

/* What of it a restart has lost; nothing, if the file is there and such pins have been let go of. */
static int tell_lost_use(const struct use *use, struct pin **pins, size_t n_pins, int64_t *ids,
			 int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	const struct conflict conflict = conflict_new(CAUSE_LOST);
	const char *path = use->file ? use->file->path : use->path;
	struct msg_notice notice = {
		.revocation = (int64_t)use->lost,
		.client = (int64_t)use->client->id,
		.file = (int64_t)use->file_id,
		.path = path ? path : "",
		.deadlineUSec = (int64_t)now_usec(),
	};
	size_t first = 0, n = n_pins;

	while (first < n) {
		size_t middle = first + (n - first) / 2;

		if (pins[middle]->revocation < use->lost)
			first = middle + 1;
		else
			n = middle;
	}
	for (n = 0; first + n < n_pins && pins[first + n]->revocation == use->lost; n++)
		ids[n] = (int64_t)pins[first + n]->id;
	if (use->file && n == 0)
		return 0;
	notice.pins = (struct ints){ ids, n };
	conflict_message(&conflict, &notice.conflict);
	return f(&notice, userdata);
}

static int tell_lost(struct client *client,
		     int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	_cleanup_(freep) struct pin **pins = NULL;
	_cleanup_(freep) int64_t *ids = NULL;
	struct use *use;
	size_t n;
	int r;

	r = find_lost(client, &pins, &n);
	if (r < 0)
		return r;
	ids = calloc(n + 1, sizeof(*ids));
	if (!ids)
		return -ENOMEM;
	LIST_FOREACH(use, &client->uses, of_client)
		if (r >= 0 && use->lost != 0)
			r = tell_lost_use(use, pins, n, ids, f, userdata);
	return r;
}

int notice_for_each(struct client *client,
		    int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	struct broker *broker = client->broker;
	struct revocation *rev;
	uint64_t after = 0;
	int r = 0;

	while (r >= 0 && (rev = broker_next_revocation(broker, after))) {
		_cleanup_(freep) int64_t *ids = NULL;
		struct msg_notice notice;
		struct client *of;
		size_t i = 0;

		after = rev->id;
		if (!revocation_is_running(rev))
			continue;
		ids = calloc(rev->n_targets + 1, sizeof(int64_t));
		if (!ids)
			return -ENOMEM;
		while (r >= 0 && next_notice(rev, &i, ids, &of, &notice))
			if (of == client)
				r = f(&notice, userdata);
	}
	if (r >= 0)
		r = tell_again(client, f, userdata);
	if (r >= 0 && client->restored)
		r = tell_lost(client, f, userdata);
	return r < 0 ? r : 0;
}

static int send_bus(const struct msg_notice *notice, void *userdata)
{
	struct client *client = userdata;

	bus_send_notice(client->broker->bus, client, notice);
	return 0;
}

void notice_send_bus(struct client *client)
{
	if (client->broker->bus && notice_for_each(client, send_bus, client) < 0)
		log_errno(LOG_ERR, ENOMEM, "Cannot send client %" PRIu64 " its notices", client->id);
}
