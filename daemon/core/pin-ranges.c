/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/pin.h"

static int compare_range(const struct pin *a, const struct pin *b)
{
	if (a->offset != b->offset)
		return a->offset < b->offset ? -1 : 1;
	return a->id < b->id ? -1 : a->id > b->id;
}

static uint64_t subtree_end(const struct pin *pin)
{
	return pin ? pin->subtree_end : 0;
}

static uint64_t subtree_wanted_end(const struct pin *pin)
{
	return pin ? pin->subtree_wanted_end : 0;
}

static uint64_t furthest(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t ab = a > b ? a : b;

	return ab > c ? ab : c;
}

static bool is_wanted(const struct pin *pin)
{
	return !LIST_EMPTY(&pin->targets);
}

static void update(struct pin *pin)
{
	const struct pin *left = RB_LEFT(pin, by_range), *right = RB_RIGHT(pin, by_range);
	uint64_t end = pin_end_offset(pin);

	pin->subtree_end = furthest(end, subtree_end(left), subtree_end(right));
	pin->subtree_wanted_end = furthest(is_wanted(pin) ? end : 0, subtree_wanted_end(left),
					   subtree_wanted_end(right));
}

#undef RB_AUGMENT
#define RB_AUGMENT(pin) update(pin)
TREE_GENERATE(pin_ranges, pin, by_range, compare_range)

/* The tree augments where it rotates only. */
static void update_to_root(struct pin *pin)
{
	for (; pin; pin = RB_PARENT(pin, by_range))
		update(pin);
}

void pin_ranges_insert(struct pin_ranges *ranges, struct pin *pin)
{
	pin->subtree_end = pin->subtree_wanted_end = 0;
	pin_ranges_RB_INSERT(ranges, pin);
	update_to_root(pin);
}

void pin_ranges_remove(struct pin_ranges *ranges, struct pin *pin)
{
	struct pin *left = RB_LEFT(pin, by_range), *right = RB_RIGHT(pin, by_range),
		   *lowest = RB_PARENT(pin, by_range);

	/* The lowest node whose subtree loses one: with two children, the successor's parent. */
	if (left && right) {
		lowest = right;
		while (RB_LEFT(lowest, by_range))
			lowest = RB_LEFT(lowest, by_range);
		if (RB_PARENT(lowest, by_range) != pin)
			lowest = RB_PARENT(lowest, by_range);
	}
	pin_ranges_RB_REMOVE(ranges, pin);
	update_to_root(lowest);
}

static struct pin *find_below(struct pin *node, uint64_t start, uint64_t end)
{
	while (node) {
		struct pin *left = RB_LEFT(node, by_range);

		if (subtree_end(node) <= start)
			return NULL;
		if (subtree_end(left) > start) {
			node = left; /* if none there overlaps, none further right does */
			continue;
		}
		if (node->offset >= end)
			return NULL;
		if (pin_end_offset(node) > start)
			return node;
		node = RB_RIGHT(node, by_range);
	}
	return NULL;
}

struct pin *pin_ranges_find(struct pin_ranges *ranges, uint64_t start, uint64_t end,
			    struct pin *after)
{
	struct pin *found;

	if (!after) {
		found = find_below(RB_ROOT(ranges), start, end);
		return found && found->offset < end ? found : NULL;
	}
	for (struct pin *node = after;;) {
		found = find_below(RB_RIGHT(node, by_range), start, end);
		if (found)
			return found->offset < end ? found : NULL;
		for (;;) {
			struct pin *child = node;

			node = RB_PARENT(node, by_range);
			if (!node || node->offset >= end)
				return NULL;
			if (RB_LEFT(node, by_range) == child)
				break;
		}
		if (pin_end_offset(node) > start)
			return node;
	}
}

struct pin *pin_ranges_find_after(struct pin_ranges *ranges, uint64_t start, uint64_t offset, uint64_t id)
{
	struct pin *pin = pin_ranges_RB_NFIND(ranges, &(struct pin){ .offset = offset, .id = id + 1 });

	if (!pin || pin_end_offset(pin) > start)
		return pin;
	return pin_ranges_find(ranges, start, UINT64_MAX, pin);
}

void pin_ranges_update(struct pin *pin)
{
	update_to_root(pin);
}

struct pin *pin_ranges_find_wanted(struct pin_ranges *ranges, uint64_t start, uint64_t end)
{
	struct pin *node = RB_ROOT(ranges);

	while (node && subtree_wanted_end(node) > start) {
		struct pin *left = RB_LEFT(node, by_range);

		if (subtree_wanted_end(left) > start) {
			node = left; /* as above: if none there overlaps, none further right does */
			continue;
		}
		if (node->offset >= end)
			return NULL;
		if (is_wanted(node) && pin_end_offset(node) > start)
			return node;
		node = RB_RIGHT(node, by_range);
	}
	return NULL;
}

uint64_t pin_ranges_end(const struct pin_ranges *ranges)
{
	return subtree_end(RB_ROOT(ranges));
}
