/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/selection.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/core/broker.h"

static struct selection begin(struct broker *broker)
{
	return (struct selection){.broker = broker, .last = broker->ids.last};
}

struct selection selection_of_file(const struct file *file, uint64_t start)
{
	struct selection s = begin(file->broker);

	s.file = file->id;
	s.start = start;
	return s;
}

int selection_of_pins(
	struct broker *broker, const uint64_t *ids, size_t n_ids, struct selection *ret)
{
	struct selection s = begin(broker);

	s.ids = calloc(n_ids + 1, sizeof(*ids));
	if (!s.ids)
		return -ENOMEM;
	if (n_ids > 0)
		memcpy(s.ids, ids, n_ids * sizeof(*ids));
	s.n_ids = n_ids;
	*ret = s;
	return 0;
}

struct selection selection_of(struct broker *broker, const struct selection_filter *filter)
{
	struct selection s = begin(broker);

	s.filter = filter;
	return s;
}

int selection_copy(const struct selection *from, struct selection *ret)
{
	size_t n = from->mounts.n_others;
	struct selection s = *from;
	uint64_t *others;

	s.ids = NULL;
	s.name = from->name ? strdup(from->name) : NULL;
	s.mounts.others = others = calloc(n + 1, sizeof(*others));
	if ((from->name && !s.name) || !others) {
		free(s.name);
		free(others);
		return -ENOMEM;
	}
	if (n > 0)
		memcpy(others, from->mounts.others, n * sizeof(*others));
	*ret = s;
	return 0;
}

void selection_clear(struct selection *s)
{
	free(s->ids);
	free(s->name);
	free((uint64_t *)s->mounts.others);
	*s = (struct selection){};
}

static bool is_chosen(const struct selection *s, const struct pin *pin)
{
	const struct client *client = pin->context->client;

	return (s->client == 0 || client->id == s->client) && !(s->pinning && pin->on_demand) &&
	       !(s->unwanted && !LIST_EMPTY(&pin->targets)) && !(s->untold && pin_is_told(pin)) &&
	       (!s->of_uid || client->process.uid == s->uid);
}

static int next_of_file(struct selection *s, struct pin **ret)
{
	struct file *file = broker_find_file(s->broker, s->file);
	struct pin *pin = file ? pin_ranges_find_after(
					 &file->pins, s->start, s->after_offset, s->after)
			       : NULL;

	if (!pin)
		return 0;
	s->after_offset = pin->offset;
	s->after = pin->id;
	if (pin->id <= s->last && is_chosen(s, pin))
		*ret = pin;
	return 1;
}

static int next_of_list(struct selection *s, struct pin **ret)
{
	if (s->i == s->n_ids)
		return 0;
	*ret = broker_find_pin(s->broker, s->ids[s->i++]);
	return 1;
}

static bool is_meant(const struct selection *s, const struct pin *pin)
{
	return (s->filter->file && s->filter->file(pin->use->file, pin->use, s)) ||
	       (s->filter->context && s->filter->context(pin->context, s));
}

static int next_of_filter(struct selection *s, struct pin **ret)
{
	struct pin *pin = broker_next_pin(s->broker, s->after);

	if (!pin || pin->id > s->last)
		return 0;
	s->after = pin->id;
	*ret = !pin->over && is_meant(s, pin) ? pin : NULL;
	return 1;
}

int selection_next(struct selection *s, struct pin **ret)
{
	int r;

	*ret = NULL;
	r = s->file != 0 ? next_of_file(s, ret)
	    : s->ids     ? next_of_list(s, ret)
			 : next_of_filter(s, ret);
	if (*ret && (*ret)->over)
		*ret = NULL;
	return r;
}

void selection_retry(struct selection *s, const struct pin *pin)
{
	if (s->ids)
		s->i--;
	else
		s->after = pin->id - 1; /* offset and all: the next with this offset is the pin */
}
