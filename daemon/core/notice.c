/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/notice.h"

#include <errno.h>
#include <inttypes.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "protocol/macro.h"

static int compare_untold(const void *a, const void *b)
{
	const struct untold *ua = a, *ub = b;
	const uint64_t ka[] = {ua->client, ua->file, ua->context, ua->pin},
		       kb[] = {ub->client, ub->file, ub->context, ub->pin};

	for (size_t i = 0; i < ELEMENTS(ka); i++)
		if (ka[i] != kb[i])
			return ka[i] < kb[i] ? -1 : 1;
	return 0;
}

void notice_sort(struct untold *items, size_t n)
{
	qsort(items, n, sizeof(*items), compare_untold);
}

/* The pins of one notice: those from *i on that have client and file in common. Only the loop uses
 * it. */
static struct ints gather_pins(
	struct broker *broker, const struct untold *items, size_t n, size_t *i)
{
	static int64_t ids[NOTICE_PINS_MAX];
	const struct untold *first = &items[*i];
	size_t n_ids = 0;

	for (; *i < n && items[*i].client == first->client && items[*i].file == first->file &&
		n_ids < ELEMENTS(ids);
		(*i)++) {
		const struct pin *pin = broker_find_pin(broker, items[*i].pin);

		if (pin && (!pin->over || pin->lost))
			ids[n_ids++] = (int64_t)pin->id;
	}
	return (struct ints){ids, n_ids};
}

/* Returns false if none of the pins is there any more. */
static bool next_notice(struct broker *broker, const struct untold *items, size_t n, size_t *i,
	struct msg_notice *ret)
{
	const struct untold *first = &items[*i];
	const struct file *file = broker_find_file(broker, first->file);

	*ret = (struct msg_notice){
		.client = (int64_t)first->client,
		.file = (int64_t)first->file,
		.path = file ? file->path : NULL,
		.pins = gather_pins(broker, items, n, i),
	};
	return ret->pins.n_items > 0;
}

static void describe(const struct revocation *rev, struct msg_notice *notice)
{
	notice->revocation = (int64_t)rev->id;
	notice->deadlineUSec = (int64_t)rev->deadline_usec;
	conflict_message(&rev->conflict, &notice->conflict);
}

void notice_send(const struct revocation *rev, const struct untold *items, size_t n, size_t *i,
	const struct slice *slice)
{
	struct broker *broker = rev->broker;

	do {
		struct client *client = broker_find_client(broker, items[*i].client);
		struct msg_notice notice;

		if (!next_notice(broker, items, n, i, &notice))
			continue;
		describe(rev, &notice);
		observe_notice(client, &notice);
	} while (*i < n && !slice_is_over(slice));
}

/* ---- What was missed ---- */

struct missed {
	struct untold items[NOTICE_PINS_MAX];
	size_t n;
	uint64_t file;	     /* of the last one */
	uint64_t revocation; /* of all, where they are alike */
	unsigned n_files;
};

/* Returns false if it has room for no more. */
static bool add_missed(struct missed *m, const struct pin *pin)
{
	uint64_t file = pin->use ? pin->use->file->id : 0; /* it has none if it was lost */

	if (m->n == ELEMENTS(m->items) || (file != m->file && m->n_files == NOTICE_FILES_MAX))
		return false;
	m->n_files += file != m->file;
	m->file = file;
	m->items[m->n++] = (struct untold){
		.client = pin->context->client->id,
		.file = file,
		.context = pin->context->id,
		.pin = pin->id,
	};
	return true;
}

/* Of one revocation; false: it wants nothing more of the client. */
static bool find_missed(struct revocation *rev, const struct client *client,
	struct notice_place *place, struct missed *m)
{
	struct place at = {client->id, place->context, place->pin};
	struct target *target;

	while ((target = target_next(rev, at)) && target->stake->client == client->id) {
		if (!add_missed(m, target->pin))
			return true;
		at.context = place->context = target->stake->id;
		at.pin = place->pin = target->id;
	}
	return false;
}

static int tell_missed(struct broker *broker, const struct revocation *rev, struct missed *m,
	int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	size_t i = 0;
	int r = 0;

	notice_sort(m->items, m->n);
	while (i < m->n && r >= 0) {
		struct msg_notice notice;

		if (!next_notice(broker, m->items, m->n, &i, &notice))
			continue;
		describe(rev, &notice);
		r = f(&notice, userdata);
	}
	return r;
}

static int catch_up_running(struct client *client, struct notice_place *place, struct missed *m,
	int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	struct slice slice = slice_begin();
	struct revocation *rev;

	do {
		/* the one that it has come to, or the next */
		rev = place->revocation == 0
			      ? NULL
			      : broker_find_revocation(client->broker, place->revocation);
		if (!rev || !revocation_is_running(rev) || !find_missed(rev, client, place, m)) {
			if (m->n > 0)
				break;
			rev = broker_next_revocation(client->broker, place->revocation);
			place->revocation = rev ? rev->id : UINT64_MAX;
			place->context = place->pin = 0;
		}
	} while (rev && m->n == 0 && !slice_is_over(&slice));
	if (m->n > 0)
		return tell_missed(client->broker, rev, m, f, userdata) ?: 1;
	if (!rev)
		*place = (struct notice_place){ .what = MISSED_TOLD };
	return 1;
}

/* The next context of the client, by their identifiers, from the one that it has come to on. */
static struct context *find_context(const struct client *client, uint64_t from)
{
	struct context *context, *found = NULL;

	LIST_FOREACH(context, &client->contexts, of_client)
		if (context->id >= from && (!found || context->id < found->id))
			found = context;
	return found;
}

/* Finds pins of one revocation and file, or of one file that was lost; what comes next follows the last. */
static void find_alike(struct client *client, struct notice_place *place, struct missed *m)
{
	struct slice slice = slice_begin();
	struct context *context = find_context(client, place->context);

	while (context && !slice_is_over(&slice)) {
		struct pin *pin;

		if (context->id != place->context)
			*place = (struct notice_place){ .what = place->what, .context = context->id };
		pin = context_next_pin(context, place->pin);
		if (!pin) {
			*place = (struct notice_place){ .what = place->what, .context = context->id + 1 };
			context = find_context(client, place->context);
			continue;
		}
		if (place->what == MISSED_LOST ? pin->lost : pin_is_told(pin)) {
			uint64_t file = pin->use ? pin->use->file->id : 0;

			if (m->n > 0 && (pin->revocation != m->revocation || file != m->file))
				return;
			m->revocation = pin->revocation;
			if (!add_missed(m, pin))
				return;
		}
		place->pin = pin->id;
	}
	if (!context)
		*place = (struct notice_place){ .what = place->what + 1 };
}

static int catch_up_told(struct client *client, struct notice_place *place, struct missed *m,
			 int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	/* It may be too long ago to be known still. */
	struct conflict unknown = conflict_new(CAUSE_MODIFY);
	const struct revocation *rev;
	struct msg_notice notice;
	size_t i = 0;

	find_alike(client, place, m);
	if (m->n == 0 || !next_notice(client->broker, m->items, m->n, &i, &notice))
		return 1;
	rev = broker_find_revocation(client->broker, m->revocation);
	notice.revocation = (int64_t)m->revocation;
	notice.deadlineUSec = rev ? (int64_t)rev->start_usec : 0;
	conflict_message(rev ? &rev->conflict : &unknown, &notice.conflict);
	return f(&notice, userdata) ?: 1;
}

/* What a restart has lost of a file. */
static int tell_lost(const struct use *use, struct ints pins,
		     int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	const struct conflict conflict = conflict_new(CAUSE_LOST);
	const char *path = use->file ? use->file->path : use->path;
	struct msg_notice notice = {
		.revocation = (int64_t)use->lost,
		.client = (int64_t)use->client->id,
		.file = (int64_t)use->file_id,
		.path = path ? path : "",
		.pins = pins,
		.deadlineUSec = (int64_t)now_usec(),
	};

	conflict_message(&conflict, &notice.conflict);
	return f(&notice, userdata) ?: 1;
}

static int catch_up_lost(struct client *client, struct notice_place *place, struct missed *m,
			 int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	struct use *use;
	size_t i = 0;

	find_alike(client, place, m);
	if (m->n == 0)
		return 1;
	use = client_next_lost(client, m->revocation - 1);
	if (!use || use->lost != m->revocation)
		return 1; /* it has been closed */
	return tell_lost(use, gather_pins(client->broker, m->items, m->n, &i), f, userdata);
}

static int catch_up_files(struct client *client, struct notice_place *place,
			  int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	struct use *use = client_next_lost(client, place->revocation);

	if (!use) {
		place->what = MISSED_NOTHING;
		return 0;
	}
	place->revocation = use->lost;
	if (use->file || use->n_lost > 0)
		return 1;
	return tell_lost(use, (struct ints){}, f, userdata);
}

static int catch_up(struct client *client, struct notice_place *place, struct missed *m,
		    int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	if (place->what == MISSED_TOLD && client->n_told == 0)
		*place = (struct notice_place){ .what = MISSED_LOST };
	if (place->what == MISSED_LOST && RB_EMPTY(&client->lost))
		return 0;
	switch (place->what) {
	case MISSED_RUNNING:
		return catch_up_running(client, place, m, f, userdata);
	case MISSED_TOLD:
		return catch_up_told(client, place, m, f, userdata);
	case MISSED_LOST:
		return catch_up_lost(client, place, m, f, userdata);
	case MISSED_FILES:
		return catch_up_files(client, place, f, userdata);
	default:
		return 0;
	}
}

int notice_catch_up(struct client *client, struct notice_place *place,
		    int (*f)(const struct msg_notice *notice, void *userdata), void *userdata)
{
	static struct missed m; /* only the loop uses it */
	struct slice slice = slice_begin();
	int r;

	m.n = m.n_files = 0;
	m.file = 0;
	/* where there is nothing to tell, that is known at once: what begins meanwhile is not told twice */
	do
		r = catch_up(client, place, &m, f, userdata);
	while (r > 0 && m.n == 0 && !slice_is_over(&slice));
	return r;
}
