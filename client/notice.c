/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <string.h>

static int compare_ids(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static struct notice_trace *notice_memory_find(
	struct notice_memory *memory, const struct pinbroker_notice *notice)
{
	for (size_t i = 0; i < NOTICE_MEMORY; i++) {
		struct notice_trace *t = &memory->traces[i];

		if (t->revocation == notice->revocation && t->file == notice->file)
			return t;
	}
	return NULL;
}

static bool notice_trace_covers(const struct notice_trace *t, const struct pinbroker_notice *notice)
{
	for (size_t i = 0; i < notice->n_pins; i++)
		if (!bsearch(&notice->pins[i], t->pins, t->n_pins, sizeof(*t->pins), compare_ids))
			return false;
	return true;
}

static int notice_trace_extend(struct notice_trace *t, const struct pinbroker_notice *notice)
{
	size_t n = t->n_pins, n_unique = 0;
	uint64_t *pins;

	pins = realloc(t->pins, (n + notice->n_pins + 1) * sizeof(*pins));
	if (!pins)
		return -ENOMEM;
	t->pins = pins;
	if (notice->n_pins > 0)
		memcpy(pins + n, notice->pins, notice->n_pins * sizeof(*pins));
	n += notice->n_pins;
	qsort(pins, n, sizeof(*pins), compare_ids);
	for (size_t i = 0; i < n; i++)
		if (n_unique == 0 || pins[n_unique - 1] != pins[i])
			pins[n_unique++] = pins[i];
	t->n_pins = n_unique;
	return 0;
}

/*
 * New is: a revocation and file not heard of, a pin not named before, who is behind it, or why
 * (which the bus does not tell). The two channels, and what is told again after a reconnect, bring
 * nothing of the kind.
 */
int notice_memory_admit(
	struct notice_memory *memory, const struct pinbroker_notice *notice, bool *ret_update)
{
	struct notice_trace *t = notice_memory_find(memory, notice);
	bool who = notice->pid != 0, why = notice->reason, update = t;
	int r;

	if (t && (t->who || !who) && (t->why || !why) && notice_trace_covers(t, notice))
		return 0;
	if (!t) {
		t = &memory->traces[memory->next];
		free(t->pins);
		*t = (struct notice_trace){};
	}
	r = notice_trace_extend(t, notice);
	if (r < 0)
		return r;
	if (!update) {
		memory->next = (memory->next + 1) % NOTICE_MEMORY;
		t->revocation = notice->revocation;
		t->file = notice->file;
	}
	t->who |= who;
	t->why |= why;
	*ret_update = update;
	return 1;
}

void notice_memory_done(struct notice_memory *memory)
{
	for (size_t i = 0; i < NOTICE_MEMORY; i++)
		free(memory->traces[i].pins);
	*memory = (struct notice_memory){};
}

static struct notice *notice_free(struct notice *n)
{
	if (!n)
		return NULL;
	free((char *)n->public.path);
	free((uint64_t *)n->public.pins);
	free((char *)n->public.comm);
	free((char *)n->public.reason);
	free(n);
	return NULL;
}

static int copy_string(const char **s)
{
	if (!*s)
		return 0;
	*s = strdup(*s);
	return *s ? 0 : -ENOMEM;
}

static int notice_copy(const struct pinbroker_notice *from, struct notice **ret)
{
	struct notice *n;
	uint64_t *pins;
	int r;

	n = malloc(sizeof(*n));
	pins = malloc((from->n_pins + 1) * sizeof(*pins));
	if (!n || !pins) {
		free(n);
		free(pins);
		return -ENOMEM;
	}
	if (from->n_pins > 0)
		memcpy(pins, from->pins, from->n_pins * sizeof(*pins));
	n->public = *from;
	n->public.pins = pins;
	r = copy_string(&n->public.path);
	r = copy_string(&n->public.comm) ?: r;
	r = copy_string(&n->public.reason) ?: r;
	if (r < 0) {
		notice_free(n);
		return r;
	}
	*ret = n;
	return 0;
}

int notice_offer(pinbroker *pb, const struct pinbroker_notice *notice)
{
	struct notice *n;
	int r;

	/* Copied first: what has been admitted must also be passed on. */
	r = notice_copy(notice, &n);
	if (r < 0)
		return r;
	pthread_mutex_lock(&pb->notice_lock);
	r = notice_memory_admit(&pb->memory, notice, &n->public.update);
	if (r > 0) {
		STAILQ_INSERT_TAIL(&pb->notices, n, link);
		n = NULL; /* the macro names it more than once */
	}
	pthread_mutex_unlock(&pb->notice_lock);
	if (r > 0)
		wake(pb);
	notice_free(n);
	return r;
}

int notice_offer_message(pinbroker *pb, const struct msg_notice *message)
{
	struct pinbroker_notice notice;

	convert_notice(message, &notice);
	notice.deadline_usec = clock_convert(pb, notice.deadline_usec);
	return notice_offer(pb, &notice);
}

/* A newer broker may know more causes; "modify" is the most general one. */
void notice_soften(json_object *notice)
{
	json_object *conflict, *cause;

	if (!json_object_is_type(notice, json_type_object) ||
		!json_object_object_get_ex(notice, "conflict", &conflict) ||
		!json_object_is_type(conflict, json_type_object) ||
		!json_object_object_get_ex(conflict, "cause", &cause) ||
		!json_object_is_type(cause, json_type_string))
		return;
	if (enumeration_value(&enumeration_cause, json_object_get_string(cause)) < 0)
		json_object_set_string(cause, enumeration_name(&enumeration_cause, CAUSE_MODIFY));
}

static struct notice *notices_pop(pinbroker *pb)
{
	struct notice *n;

	pthread_mutex_lock(&pb->notice_lock);
	n = STAILQ_FIRST(&pb->notices);
	if (n)
		STAILQ_REMOVE_HEAD(&pb->notices, link);
	pthread_mutex_unlock(&pb->notice_lock);
	return n;
}

int notices_deliver(pinbroker *pb)
{
	struct notice *n;
	int delivered = 0;

	/* The callback may be the one that releases the handle. */
	while (is_held(pb) && (n = notices_pop(pb))) {
		if (pb->callback)
			pb->callback(pb, &n->public, pb->userdata);
		notice_free(n);
		delivered++;
	}
	return delivered;
}

void notices_done(pinbroker *pb)
{
	struct notice *n;

	while ((n = notices_pop(pb)))
		notice_free(n);
	notice_memory_done(&pb->memory);
}
