/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/pin.h"

#include <assert.h>
#include <inttypes.h>
#include <errno.h>
#include <stdlib.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/label.h"
#include "protocol/macro.h"

static uint64_t n_pages(const struct pin *pin)
{
	return pin_pinned_bytes(pin) / (uint64_t)sysconf(_SC_PAGESIZE);
}

/* n: 1, or -1 before its state or its targets change */
static void count_in_context(struct pin *pin, int n)
{
	struct context *context = pin->context;
	bool wanted = !LIST_EMPTY(&pin->targets);

	if (wanted) {
		context->n_wanted += (unsigned)n;
		pin->use->file->n_wanted += (unsigned)n;
	}
	if (pin->state != PIN_LEAVING)
		return;
	if (n > 0)
		TAILQ_INSERT_TAIL(&context->leaving, pin, of_leaving);
	else
		TAILQ_REMOVE(&context->leaving, pin, of_leaving);
	context->n_leaving += (unsigned)n;
	if (wanted)
		context->n_leaving_wanted += (unsigned)n;
}

static void join_file(struct pin *pin, struct use *use)
{
	struct client *client = use->client;

	pin->use = use;
	pin->context->n_pins++;
	pin->context->n_pages += n_pages(pin);
	count_in_context(pin, 1);
	pin_ranges_insert(&use->file->pins, pin);
	use->file->n_pins++;
	use->file->n_on_demand += pin->on_demand;
	use->n_pins++;
	client->n_pins++;
	client->pinned_bytes += pin_pinned_bytes(pin);
	client->n_told += pin_is_told(pin);
	client->broker->n_pins++;
	file_pinned(use->file, pin_end_offset(pin));
	observe_file(use->file, OBSERVED_CHANGED);
	observe_client(client, OBSERVED_CHANGED);
}

static void count_lost(struct pin *pin, int n)
{
	struct use *use = pin->lost ? client_next_lost(pin->context->client, pin->revocation - 1) : NULL;

	if (use && use->lost == pin->revocation)
		use->n_lost += (unsigned)n;
}

static int pin_make(struct context *context, struct use *use, const struct pin_past *past,
		    struct label *label, struct pin **ret)
{
	struct broker *broker = context->client->broker;
	struct pin *pin;

	pin = calloc(1, sizeof(*pin));
	if (!pin)
		return -ENOMEM;
	pin->id = broker_next_id(broker);
	pin->context = context;
	pin->offset = past->offset;
	pin->length = past->length;
	pin->access = past->access;
	pin->on_demand = past->on_demand;
	pin->state = past->state;
	pin->over = past->over;
	pin->lost = past->lost;
	pin->destroyed = past->destroyed;
	pin->revocation = past->revocation;
	pin->handle = past->handle;
	pin->identity = past->identity;
	pin->label = label_ref(label);
	LIST_INIT(&pin->targets);
	context_add_pin(context, pin);
	count_lost(pin, 1);
	if (use)
		join_file(pin, use);
	broker_add_pin(broker, pin);
	observe_pin(pin, OBSERVED_RECORDED);
	*ret = pin;
	return 0;
}

int pin_new(struct context *context, struct use *use, const struct msg_range *range,
	    enum access access, bool on_demand, struct label *label, struct pin **ret)
{
	const struct pin_past fresh = {
		.offset = (uint64_t)range->offset,
		.length = (uint64_t)range->length,
		.access = access,
		.on_demand = on_demand,
		.state = PIN_RESERVED,
		.handle = INT_NULL,
	};

	return pin_make(context, use, &fresh, label, ret);
}

int pin_resume(struct context *context, struct use *use, const struct pin_past *past,
	       struct label *label)
{
	struct pin *pin;
	int r;

	r = pin_make(context, use, past, label, &pin);
	if (r < 0)
		return r;
	user_charge_force(context->user, LIMIT_PINS, 1);
	if (use)
		user_charge_force(context->user, LIMIT_PINNED_BYTES, pin_pinned_bytes(pin));
	return 0;
}

/* Takes it out of its file: from here on it holds nothing up. */
static void leave_file(struct pin *pin)
{
	struct use *use = pin->use;

	pin_ranges_remove(&use->file->pins, pin);
	count_in_context(pin, -1);
	pin->context->n_pages -= n_pages(pin);
	use->client->n_told -= pin_is_told(pin);
	use->file->n_pins--;
	use->file->n_on_demand -= pin->on_demand;
	use->n_pins--;
	use->client->n_pins--;
	use->client->pinned_bytes -= pin_pinned_bytes(pin);
	use->client->broker->n_pins--;
	observe_file(use->file, OBSERVED_CHANGED);
	observe_client(use->client, OBSERVED_CHANGED);
	pin->context->n_pins--;
	context_close_withdrawn(pin->context);
	user_discharge(pin->context->user, LIMIT_PINNED_BYTES, pin_pinned_bytes(pin));
	pin->use = NULL;
	use_collect(use);
}

struct pin *pin_free(struct pin *pin)
{
	if (!pin)
		return NULL;
	assert(LIST_EMPTY(&pin->targets));
	if (pin->use)
		leave_file(pin);
	count_lost(pin, -1);
	context_remove_pin(pin->context, pin);
	user_discharge(pin->context->user, LIMIT_PINS, 1);
	broker_remove_pin(pin->context->client->broker, pin);
	label_unref(pin->label);
	free(pin);
	return NULL;
}

void pin_add_target(struct pin *pin, struct target *target)
{
	count_in_context(pin, -1);
	LIST_INSERT_HEAD(&pin->targets, target, of_pin);
	count_in_context(pin, 1);
	pin_ranges_update(pin);
}

void pin_remove_target(struct pin *pin, struct target *target)
{
	count_in_context(pin, -1);
	LIST_REMOVE(target, of_pin);
	count_in_context(pin, 1);
	pin_ranges_update(pin);
}

void pin_set_told(struct pin *pin, uint64_t revocation)
{
	struct client *client = pin->use->client;

	client->n_told -= pin_is_told(pin);
	pin->revocation = revocation;
	client->n_told += pin_is_told(pin);
}

int pin_bind(struct pin *pin, int64_t handle, const struct handle_identity *identity,
	     struct refusal *ret_refusal)
{
	if (pin->over)
		return refuse_revoked(ret_refusal, pin->revocation, pin->id);
	if (pin->state == PIN_LEAVING)
		return refuse_no_such(ret_refusal, "pin", pin->id);
	if (identity->length > pin->length)
		return refuse(ret_refusal, REFUSAL_NOT_ALLOWED, "tooLong",
			      "More is registered than pinned: %" PRIu64 " of %" PRIu64 " byte%s.",
			      identity->length, pin->length, PLURAL(pin->length));
	/* It was looked at while it was being destroyed. */
	pin->destroyed &= pin->handle == handle && handle_identity_equal(&pin->identity, identity);
	pin->torn = false;
	pin->handle = handle;
	pin->identity = *identity;
	pin->state = PIN_BOUND;
	pin_set_told(pin, 0);
	observe_pin(pin, OBSERVED_RECORDED);
	return 0;
}

void pin_leave(struct pin *pin)
{
	const struct context_ops *ops = pin->context->ops;
	bool check = ops->until_close || (pin->state == PIN_BOUND && ops->check);

	if (pin->state == PIN_LEAVING)
		return;
	count_in_context(pin, -1);
	pin->state = PIN_LEAVING;
	pin->left_msec = now_msec();
	count_in_context(pin, 1);
	if (check && pin_is_awaited(pin)) {
		observe_pin(pin, OBSERVED_RECORDED);
		context_check_soon(pin->context);
	} else {
		pin_end(pin, PROOF_CLAIMED);
	}
}

bool pin_is_awaited(const struct pin *pin)
{
	return !pin->over && pin->state == PIN_LEAVING &&
	       (!LIST_EMPTY(&pin->targets) || pin->context->description.proof == PROOF_PROVABLE);
}

void pin_end(struct pin *pin, enum proof proof)
{
	struct file *file = pin->use->file;
	bool known = pin->state == PIN_LEAVING || pin->context->client->dead;
	uint64_t file_id = file->id;
	struct broker *broker = file->broker;
	struct target *targets = LIST_FIRST(&pin->targets);

	leave_file(pin);
	if (targets)
		pin->revocation = targets->stake->revocation->id;
	LIST_INIT(&pin->targets);
	if (known) {
		pin_free(pin);
	} else {
		pin->over = true;
		observe_pin(pin, OBSERVED_RECORDED);
	}

	/* With the pin out of the way, whoever waited for it may go on. */
	while (targets) {
		struct target *next = LIST_NEXT(targets, of_pin);

		revocation_target_gone(targets, proof);
		targets = next;
	}
	file = broker_find_file(broker, file_id);
	if (file && file_n_pinning(file) == 0) {
		file_update(file);
		file_collect(file);
	}
}

void pin_info(const struct pin *pin, struct msg_pin_info *ret)
{
	*ret = (struct msg_pin_info){
		.pin = (int64_t)pin->id,
		.client = (int64_t)pin->context->client->id,
		.file = (int64_t)pin->use->file->id,
		.context = (int64_t)pin->context->id,
		.path = pin->use->file->path,
		.offset = (int64_t)pin->offset,
		.length = (int64_t)pin->length,
		.access = pin->access,
		.onDemand = pin->on_demand,
		.handle = pin->handle,
		.label = label_text(pin->label),
		.state = pin->state,
		.revocation = INT_NULL,
	};
	if (!LIST_EMPTY(&pin->targets))
		ret->revocation = (int64_t)pin_revocation(pin)->id;
}
