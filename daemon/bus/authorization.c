/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define HASH_NONFATAL_OOM 1
#define HASH_FUNCTION     HASH_OAT
#include "daemon/bus/authorization.h"

#include <string.h>
#include <sys/queue.h>

#include "daemon/bus/credentials.h"
#include "daemon/bus/polkit.h"
#include "daemon/core/broker.h"
#include "protocol/macro.h"

/* As many as dbus-daemon lets a connection wait for answers to. */
#define CALLS_MAX 128U

struct sender {
	unsigned n_calls;
	UT_hash_handle hh; /* bus_authorization::senders */
	char name[];
};

/* One that is held back. */
struct call {
	struct bus_authorization *authorization;
	struct sender *sender;
	struct user *user; /* reference; one LIMIT_UNFINISHED, while polkit is asked */
	sd_bus_message *m; /* reference */
	struct bus_credentials credentials;
	sd_bus_slot *slot; /* of what is asked */
	bool allowed;      /* on its way again */
	TAILQ_ENTRY(call) of_authorization;
};

struct bus_authorization {
	sd_bus *bus;
	struct broker *broker;
	sd_bus_slot *filter;
	struct sender *senders;
	struct bus_credentials caller; /* of the call that was allowed last */
	TAILQ_HEAD(, call) held,
		allowed; /* owned; those that are allowed in the order of the bus's queue */
};

static int sender_get(struct bus_authorization *a, const char *name, struct sender **ret)
{
	size_t n = strlen(name);
	struct sender *sender;

	HASH_FIND(hh, a->senders, name, n, sender);
	if (!sender) {
		sender = calloc(1, sizeof(*sender) + n + 1);
		if (!sender)
			return -ENOMEM;
		memcpy(sender->name, name, n);
		HASH_ADD(hh, a->senders, name, n, sender);
		if (!sender->hh.tbl) { /* how uthash tells of missing memory */
			free(sender);
			return -ENOMEM;
		}
	}
	*ret = sender;
	return 0;
}

static void sender_collect(struct bus_authorization *a, struct sender *sender)
{
	if (sender->n_calls > 0)
		return;
	HASH_DEL(a->senders, sender);
	free(sender);
}

static struct call *call_free(struct call *call)
{
	struct bus_authorization *a = call->authorization;

	if (call->allowed)
		TAILQ_REMOVE(&a->allowed, call, of_authorization);
	else
		TAILQ_REMOVE(&a->held, call, of_authorization);
	call->sender->n_calls--;
	sender_collect(a, call->sender);
	if (call->user)
		user_discharge(call->user, LIMIT_UNFINISHED, 1);
	user_unref(call->user);
	sd_bus_slot_unref(call->slot);
	sd_bus_message_unref(call->m);
	free(call);
	return NULL;
}

static void refuse_call(struct call *call, int r, sd_bus_error *error)
{
	(void)sd_bus_reply_method_errno(call->m, r, error);
	sd_bus_error_free(error);
	call_free(call);
}

static void allow_call(struct call *call)
{
	struct bus_authorization *a = call->authorization;
	int r;

	call->slot = sd_bus_slot_unref(call->slot);
	r = sd_bus_enqueue_for_read(a->bus, call->m);
	if (r < 0) {
		refuse_call(call, r, NULL);
		return;
	}
	call->allowed = true;
	TAILQ_REMOVE(&a->held, call, of_authorization);
	TAILQ_INSERT_TAIL(&a->allowed, call, of_authorization);
}

static int on_polkit(sd_bus_message *answer, void *userdata, sd_bus_error *ret_error)
{
	sd_bus_error error = SD_BUS_ERROR_NULL;
	struct call *call = userdata;
	int r;

	r = bus_polkit_read(answer, &error);
	if (r < 0)
		refuse_call(call, r, &error);
	else
		allow_call(call);
	return 0;
}

/* Charges the uid, so that nobody can have more of his calls kept than others get done. */
static int ask_polkit(struct call *call, uid_t uid, sd_bus_error *error)
{
	struct user *user;
	int r;

	r = user_get(call->authorization->broker->users, uid, &user);
	if (r < 0)
		return r;
	if (user_charge(user, LIMIT_UNFINISHED, 1) < 0) {
		r = sd_bus_error_setf(
			error, SD_BUS_ERROR_LIMITS_EXCEEDED,
			"%s=%" PRIu64 " is reached by calls that polkit is asked about: wait for one.",
			limit_name(LIMIT_UNFINISHED), user_maximum(user, LIMIT_UNFINISHED));
		user_unref(user);
		return r;
	}
	call->user = user;
	r = bus_polkit_ask(call->m, on_polkit, call, &call->slot);
	if (r == -E2BIG)
		return sd_bus_error_set(error, SD_BUS_ERROR_LIMITS_EXCEEDED,
					"The call is too long: make several of it.");
	return r;
}

static int on_credentials(sd_bus_message *answer, void *userdata, sd_bus_error *ret_error)
{
	sd_bus_error error = SD_BUS_ERROR_NULL;
	struct call *call = userdata;
	struct bus_credentials *sender = &call->credentials;
	int r;

	call->slot = sd_bus_slot_unref(call->slot);
	r = bus_credentials_read(answer, sender);
	if (r >= 0 && (sender->uid == 0 || sender->uid == geteuid() || sender->administrator)) {
		allow_call(call);
		return 0;
	}
	if (r >= 0)
		r = ask_polkit(call, sender->uid, &error);
	if (r < 0)
		refuse_call(call, r, &error);
	return 0;
}

static int hold(struct bus_authorization *a, sd_bus_message *m, sd_bus_error *error)
{
	struct sender *sender;
	struct call *call;
	int r;

	r = sender_get(a, sd_bus_message_get_sender(m), &sender);
	if (r < 0)
		return r;
	if (sender->n_calls == CALLS_MAX)
		return sd_bus_error_set(error, SD_BUS_ERROR_LIMITS_EXCEEDED,
					"Too many calls at a time: wait for answers.");
	call = calloc(1, sizeof(*call));
	if (!call) {
		sender_collect(a, sender);
		return -ENOMEM;
	}
	call->authorization = a;
	call->sender = sender;
	sender->n_calls++;
	call->m = sd_bus_message_ref(m);
	TAILQ_INSERT_TAIL(&a->held, call, of_authorization);
	r = bus_credentials_ask(a->bus, sender->name, on_credentials, call, &call->slot);
	if (r < 0)
		call_free(call);
	return r < 0 ? r : 1;
}

static int on_message(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct bus_authorization *a = userdata;
	struct call *allowed = TAILQ_FIRST(&a->allowed);

	if (!sd_bus_message_is_method_call(m, NULL, NULL) ||
	    sd_bus_message_is_method_call(m, "org.freedesktop.DBus.Peer", NULL))
		return 0;
	if (allowed && allowed->m == m) {
		a->caller = allowed->credentials;
		call_free(allowed);
		return 0;
	}
	return sd_bus_message_get_sender(m) ? hold(a, m, error) : -EACCES;
}

int bus_authorization_new(sd_bus *bus, struct broker *broker, struct bus_authorization **ret)
{
	struct bus_authorization *a = calloc(1, sizeof(*a));
	int r;

	if (!a)
		return -ENOMEM;
	a->bus = bus;
	a->broker = broker;
	TAILQ_INIT(&a->held);
	TAILQ_INIT(&a->allowed);
	r = sd_bus_add_filter(bus, &a->filter, on_message, a);
	if (r < 0) {
		free(a);
		return r;
	}
	*ret = a;
	return 0;
}

const struct bus_credentials *bus_authorization_caller(const struct bus_authorization *a)
{
	return &a->caller;
}

struct bus_authorization *bus_authorization_free(struct bus_authorization *a)
{
	if (!a)
		return NULL;
	sd_bus_slot_unref(a->filter);
	while (!TAILQ_EMPTY(&a->held))
		call_free(TAILQ_FIRST(&a->held));
	while (!TAILQ_EMPTY(&a->allowed))
		call_free(TAILQ_FIRST(&a->allowed));
	free(a);
	return NULL;
}
