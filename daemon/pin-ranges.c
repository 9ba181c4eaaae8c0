/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "pin.h"

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

static void update(struct pin *pin)
{
	uint64_t end = pin_end_offset(pin), left = subtree_end(RB_LEFT(pin, by_range)),
		 right = subtree_end(RB_RIGHT(pin, by_range));

	if (left > end)
		end = left;
	if (right > end)
		end = right;
	pin->subtree_end = end;
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
	pin->subtree_end = pin_end_offset(pin);
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

uint64_t pin_ranges_end(const struct pin_ranges *ranges)
{
	return subtree_end(RB_ROOT(ranges));
}
