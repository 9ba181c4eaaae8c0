/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <assert.h>
#include <string.h>

/* In one message, which has a limit of size. */
#define UNPIN_PORTION 1024U

static_assert(PINBROKER_RANGES_MAX == PIN_RANGES_MAX, "");

static int copy_ranges(
	const pinbroker *pb, const struct pinbroker_range *ranges, size_t n, struct msg_range **ret)
{
	struct msg_range *copy;

	copy = calloc(n, sizeof(*copy));
	if (!copy)
		return error_set(pb, -ENOMEM, "Out of memory.");
	for (size_t i = 0; i < n; i++) {
		if (ranges[i].length == 0 || ranges[i].offset > INT64_MAX ||
			ranges[i].length > INT64_MAX - ranges[i].offset) {
			free(copy);
			return error_set(pb, -EINVAL, "Range %zu is empty or too far out.", i);
		}
		copy[i].offset = (int64_t)ranges[i].offset;
		copy[i].length = (int64_t)ranges[i].length;
	}
	*ret = copy;
	return 0;
}

static int reserve(pinbroker *pb, const pinbroker_file *file, const pinbroker_context *context,
	const struct pinbroker_range *ranges, size_t n_ranges, enum pinbroker_access access,
	bool on_demand, const char *label, uint64_t *ret_pins)
{
	struct msg_pin_out out;
	_cleanup_(reply_done) struct reply reply = {};
	_cleanup_(freep) struct msg_range *copy = NULL;
	struct msg_pin_in in = {.access = (int)access, .onDemand = on_demand, .label = label};
	int r;

	if (n_ranges == 0)
		return error_set(pb, -EINVAL, "There is no range to pin.");
	if (n_ranges > PINBROKER_RANGES_MAX)
		return error_set(
			pb, -E2BIG, "More than %d ranges in one call.", PINBROKER_RANGES_MAX);
	if (access != PINBROKER_READ && access != PINBROKER_WRITE)
		return error_set(pb, -EINVAL, "There is no such access.");
	r = copy_ranges(pb, ranges, n_ranges, &copy);
	if (r < 0)
		return r;
	in.file = (int64_t)pinbroker_file_get_id(file);
	in.context = (int64_t)pinbroker_context_get_id(context);
	in.ranges.items = copy;
	in.ranges.n_items = n_ranges;
	r = broker_call(pb, METHOD_Pin, &in, NULL, 0, &out, &reply);
	if (r < 0)
		return r;
	if (out.pins.n_items != n_ranges)
		return error_set(pb, -EPROTO, "The broker's answer names %zu of %zu.",
			out.pins.n_items, n_ranges);
	memcpy(ret_pins, out.pins.items, n_ranges * sizeof(*ret_pins));
	return 0;
}

EXPORT int pinbroker_pin(pinbroker *pb, const pinbroker_file *file,
	const pinbroker_context *context, const struct pinbroker_range *ranges, size_t n_ranges,
	enum pinbroker_access access, const char *label, uint64_t *ret_pins)
{
	return reserve(pb, file, context, ranges, n_ranges, access, false, label, ret_pins);
}

EXPORT int pinbroker_pin_on_demand(pinbroker *pb, const pinbroker_file *file,
	const pinbroker_context *context, const struct pinbroker_range *ranges, size_t n_ranges,
	enum pinbroker_access access, const char *label, uint64_t *ret_pins)
{
	return reserve(pb, file, context, ranges, n_ranges, access, true, label, ret_pins);
}

EXPORT int pinbroker_bind(pinbroker *pb, uint64_t pin, uint64_t handle)
{
	struct msg_bind_in in = {.pin = (int64_t)pin, .handle = (int64_t)handle};
	_cleanup_(reply_done) struct reply reply = {};

	if (pin > INT64_MAX || handle > INT64_MAX)
		return error_set(pb, -EINVAL, "The pin or the handle is out of range.");
	return broker_call(pb, METHOD_Bind, &in, NULL, 0, NULL, &reply);
}

static int unpin_portion(
	pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended, size_t *n_ended)
{
	/* Ids are positive and fit; one that does not is refused by the broker as any other. */
	struct msg_unpin_in in = {.pins = {(int64_t *)pins, n_pins}};
	struct msg_unpin_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_call(pb, METHOD_Unpin, &in, NULL, 0, &out, &reply);
	if (r < 0)
		return r;
	if (out.ended.n_items > n_pins)
		return error_set(pb, -EPROTO, "The broker ended more pins than were let go of.");
	if (ret_ended && out.ended.n_items > 0)
		memcpy(ret_ended + *n_ended, out.ended.items,
			out.ended.n_items * sizeof(*ret_ended));
	*n_ended += out.ended.n_items;
	return 0;
}

EXPORT int pinbroker_unpin(pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended,
	size_t *ret_n_ended)
{
	size_t n_ended = 0;
	int r = 0;

	for (size_t i = 0; i < n_pins; i += UNPIN_PORTION) {
		size_t n = n_pins - i < UNPIN_PORTION ? n_pins - i : UNPIN_PORTION;

		r = unpin_portion(pb, pins + i, n, ret_ended, &n_ended);
		if (r < 0)
			return r;
	}
	if (ret_n_ended)
		*ret_n_ended = n_ended;
	return 0;
}

EXPORT int pinbroker_extend(
	pinbroker *pb, uint64_t revocation, uint64_t by_usec, uint64_t *ret_deadline_usec)
{
	struct msg_extend_in in = {
		.revocation = (int64_t)revocation,
		.byUSec = by_usec > INT64_MAX ? INT64_MAX : (int64_t)by_usec,
	};
	struct msg_extend_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_call(pb, METHOD_Extend, &in, NULL, 0, &out, &reply);
	if (r < 0)
		return r;
	if (ret_deadline_usec)
		*ret_deadline_usec = clock_convert(pb, (uint64_t)out.deadlineUSec);
	return 0;
}
