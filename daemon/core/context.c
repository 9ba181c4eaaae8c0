/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/context.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "daemon/core/broker.h"
#include "daemon/core/context-job.h"
#include "daemon/core/observer.h"
#include "protocol/macro.h"

static int compare_pin(const struct pin *a, const struct pin *b)
{
	return a->id < b->id ? -1 : a->id > b->id;
}

TREE_GENERATE(pins_by_id, pin, of_context, compare_pin)

struct pin *context_next_pin(struct context *context, uint64_t after)
{
	return pins_by_id_RB_NFIND(&context->pins, &(struct pin){ .id = after + 1 });
}

void context_add_pin(struct context *context, struct pin *pin)
{
	pins_by_id_RB_INSERT(&context->pins, pin);
}

void context_remove_pin(struct context *context, struct pin *pin)
{
	pins_by_id_RB_REMOVE(&context->pins, pin);
}

unsigned context_n_awaited(const struct context *context)
{
	return context->description.proof == PROOF_PROVABLE ? context->n_leaving
							      : context->n_leaving_wanted;
}

int context_new(struct client *client, const struct context_ops *ops,
		const struct context_description *description, int fd, const char *label,
		struct context **ret, struct refusal *ret_refusal)
{
	struct context *context;

	if (user_charge(client->user, LIMIT_CONTEXTS, 1) < 0)
		return refuse_limit(ret_refusal, client->user, LIMIT_CONTEXTS);
	context = calloc(1, sizeof(*context));
	if (!context)
		goto no_memory;
	if (label) {
		context->label = strdup(label);
		if (!context->label)
			goto no_memory;
	}
	context->ops = ops;
	context->remote = -1;
	context->fd = fd;
	context->description = *description;
	context->user = user_ref(client->user);
	context->client = client;
	RB_INIT(&context->pins);
	TAILQ_INIT(&context->leaving);
	LIST_INIT(&context->waiters);
	LIST_INIT(&context->unpins);
	LIST_INSERT_HEAD(&client->contexts, context, of_client);
	client->n_contexts++;
	observe_client(client, OBSERVED_CHANGED);
	context->id = broker_next_id(client->broker);
	broker_add_context(client->broker, context);
	observe_context(context, OBSERVED_RECORDED);
	*ret = context;
	return 0;

no_memory:
	free(context);
	user_discharge(client->user, LIMIT_CONTEXTS, 1);
	return -ENOMEM;
}

bool context_fetch(const struct client *client, int number, const struct context_ops *ops, int *ret_fd)
{
	int fd;

	if (!process_is_same(&client->process))
		return false;
	fd = pidfd_getfd(client->process.pidfd, number, 0);
	if (fd < 0)
		return false;
	user_charge_force(client->user, LIMIT_DESCRIPTORS, 1);
	if (!context_is_of_kind(fd, ops)) {
		/* It is another by now, whose closing may hang. */
		offload_close(client->broker->offload, client->user, fd);
		return false;
	}
	*ret_fd = fd;
	return true;
}

void context_keep(struct context *context)
{
	struct store *store = &context->client->broker->store;

	if (!store->notifier || store_has(&context->copy) || context->fd < 0 || context->remote >= 0 ||
	    !context_may_be_kept(context->fd, context->ops))
		return;
	store_keep(store, &context->copy, STORE_CONTEXT, context->id, context->fd);
	if (store_has(&context->copy) && store_name(&context->copy) != context->id)
		observe_context(context, OBSERVED_RECORDED); /* it is to be found by another's name */
}

void context_drop_copy(struct context *context)
{
	store_drop(&context->client->broker->store, &context->copy);
}

/* Its last reference: neither a client nor a job has it any more. */
static void context_destroy(struct context *context, struct offload *offload)
{
	offload_close(offload, context->user, TAKE_FD(context->fd));
	user_discharge(context->user, LIMIT_CONTEXTS, 1);
	user_unref(context->user);
	free(context->label);
	free(context);
}

void context_wake(struct context_waiters *waiters)
{
	struct context_waiter *waiter;

	while ((waiter = LIST_FIRST(waiters))) {
		LIST_REMOVE(waiter, of_context);
		waiter->looked(waiter);
	}
}

struct context *context_free(struct context *context)
{
	struct broker *broker;
	struct pin *pin;

	if (!context)
		return NULL;
	broker = context->client->broker;
	while ((pin = RB_ROOT(&context->pins)))
		pin_free(pin);
	sd_event_source_disable_unref(context->recheck);
	context->recheck = NULL;
	context_drop_copy(context);
	broker_remove_context(broker, context);
	LIST_REMOVE(context, of_client);
	context->client->n_contexts--;
	context->client->n_reaping -= context->reaping;
	observe_client(context->client, OBSERVED_CHANGED);
	context->client = NULL;
	context_wake(&context->waiters);
	context_wake(&context->unpins);
	if (context->n_jobs == 0)
		context_destroy(context, broker->offload);
	return NULL;
}

void context_withdraw(struct context *context, uint64_t revocation)
{
	context->withdrawn = revocation;
	context_close_withdrawn(context);
}

void context_close_withdrawn(struct context *context)
{
	if (context->withdrawn == 0 || context->n_pins > 0 || context->n_jobs > 0 ||
	    context->reaping || context->fd < 0)
		return;
	context_drop_copy(context);
	context->fd = offload_close(context->client->broker->offload, context->user, context->fd);
	observe_context(context, OBSERVED_RECORDED);
}

struct context *context_hold(struct context *context)
{
	context->n_jobs++;
	return context;
}

bool context_release(struct context *context, struct broker *broker)
{
	context->n_jobs--;
	if (context->client) {
		context_close_withdrawn(context);
		if (context->reaping && context->n_jobs == 0)
			context_start_reap(context);
		return true;
	}
	if (context->n_jobs == 0)
		context_destroy(context, broker->offload);
	return false;
}

void context_set_remote(struct context *context, int number)
{
	context->remote = number;
	observe_context(context, OBSERVED_RECORDED);
}

void context_info(const struct context *context, struct msg_context_info *ret)
{
	*ret = (struct msg_context_info){
		.context = (int64_t)context->id,
		.client = (int64_t)context->client->id,
		.kind = context->ops->kind,
		.device = context->description.device[0] ? context->description.device : NULL,
		.label = context->label,
		.forcible = context->description.forcible,
		.proof = context->description.proof,
		.pins = context->n_pins,
	};
}
