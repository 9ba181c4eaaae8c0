/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include "daemon/core/broker.h"
#include "daemon/core/notice.h"
#include "daemon/core/observer.h"
#include "daemon/util/turn.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* Hello, Resume and Watch: who a connection speaks for. */

static bool is_unique_name(const char *name)
{
	if (name[0] != ':' || strlen(name) > 255)
		return false;
	for (const char *p = name + 1; *p; p++)
		if (!strchr("0123456789.", *p))
			return false;
	return name[1] != 0;
}

struct hello_job {
	struct job job;
	struct peer *peer; /* reference */
	char *name, *bus_name;
	struct process process; /* a copy, being described */
	int result;
};

static void hello_free(struct hello_job *j)
{
	process_clear(&j->process);
	free(j->name);
	free(j->bus_name);
	peer_unref(j->peer);
	free(j);
}

static void hello_reply(struct peer *peer, const struct client *client)
{
	const char *features[16];
	struct msg_hello_out out = {
		.client = (int64_t)client->id,
		.token = client->token,
		.version = PINBROKER_VERSION,
		.features = { features, 0 },
		.nowUSec = (int64_t)now_usec(),
	};

	while (out.features.n_items < ELEMENTS(features) && context_kind(out.features.n_items)) {
		features[out.features.n_items] = context_kind(out.features.n_items);
		out.features.n_items++;
	}

	peer_reply(peer, &schema_msg_hello_out, &out, NULL, 0);
}

/* The bus has said whose name it is: r is 0, REFUSED, or an errno if it could not be asked. */
static void hello_verified(int r, struct refusal *refusal, void *userdata)
{
	struct hello_job *j = userdata;
	struct peer *peer = j->peer;

	if (peer->connection && peer->session.client) {
		if (r == REFUSED)
			peer_refuse(peer, r, refusal);
		else
			hello_reply(peer, peer->session.client);
		peer_done(peer);
	}
	hello_free(j);
}

static void hello_done(struct job *job)
{
	struct hello_job *j = container_of(job, struct hello_job, job);
	struct peer *peer = j->peer;
	struct refusal refusal;
	struct client *client = peer->session.client;
	int r = j->result;

	if (!peer->connection) {
		hello_free(j);
		return;
	}
	if (r >= 0 && !client) {
		r = client_new(peer->broker, peer->user, &j->process, &client, &refusal);
		if (r == 0)
			session_begin(&peer->session, client);
	}
	if (r != 0) {
		peer_refuse(peer, r, &refusal);
		peer_done(peer);
		hello_free(j);
		return;
	}
	client_set_names(client, TAKE_PTR(j->name), TAKE_PTR(j->bus_name));
	if (client->bus_name && client_verify_bus_name(client, hello_verified, j) >= 0)
		return;
	hello_verified(0, NULL, j);
}

static void hello_run(struct job *job)
{
	struct hello_job *j = container_of(job, struct hello_job, job);

	j->result = process_describe(&j->process);
}

int call_hello(struct call *call, const union call_in *in)
{
	const struct msg_hello_in *hello = &in->hello;
	struct peer *peer = call->peer;
	struct hello_job *j;

	if (peer->watching)
		return refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "watching",
			      "This connection is a stream of notices.");
	if (peer->process.pid == 0)
		return refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "pidNamespace",
			      "The broker is in a pid namespace that the caller is not in, and so cannot "
			      "know it: run the broker in that of the whole machine.");
	if (!call_is_name(hello->name))
		return refuse_parameter(&call->refusal, "name");
	if (hello->busName && !is_unique_name(hello->busName))
		return refuse_parameter(&call->refusal, "busName");
	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	j->peer = peer_ref(peer);
	j->process.pidfd = -1;
	if ((hello->name && !(j->name = strdup(hello->name))) ||
	    (hello->busName && !(j->bus_name = strdup(hello->busName))) ||
	    process_copy(&peer->process, &j->process) < 0) {
		hello_free(j);
		return -ENOMEM;
	}
	j->job.run = hello_run;
	j->job.done = hello_done;
	if (offload_submit(peer->broker->offload, peer->user, &j->job) < 0) {
		hello_free(j);
		return refuse_limit(&call->refusal, peer->user, LIMIT_UNFINISHED);
	}
	return CALL_PENDING;
}

/* Only the process that said Hello, with the token, may take its client up. */
static struct client *prove_client(struct call *call, int64_t id, const char *token)
{
	struct peer *peer = call->peer;
	struct client *client = broker_find_client(peer->broker, (uint64_t)id);

	if (!client || client->dead || client->ended || client->process.uid != peer->process.uid ||
	    client->process.pid != peer->process.pid || !client_check_token(client, token)) {
		refuse_no_such(&call->refusal, "client", (uint64_t)id);
		return NULL;
	}
	if (peer->session.client) {
		refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "hello",
		       "This connection speaks for client %llu already.",
		       (unsigned long long)peer->session.client->id);
		return NULL;
	}
	return client;
}

/* One message brings no more than this of what was missed, far below what a client reads; Watch tells all. */
#define NOTICES_MAX_BYTES (256U * 1024U)

struct notices {
	struct msg_notice *items;
	size_t n, n_bytes;
};

/* The notice's strings live on, its list of pins does not. */
static int collect_notice(const struct msg_notice *notice, void *userdata)
{
	struct notices *notices = userdata;
	struct msg_notice *items, *copy;
	size_t size = notice->pins.n_items * sizeof(int64_t);

	items = realloc(notices->items, (notices->n + 1) * sizeof(*items));
	if (!items)
		return -ENOMEM;
	notices->items = items;
	copy = &items[notices->n];
	*copy = *notice;
	copy->pins.items = malloc(size + 1);
	if (!copy->pins.items)
		return -ENOMEM;
	if (size > 0)
		memcpy(copy->pins.items, notice->pins.items, size);
	notices->n++;
	notices->n_bytes += sizeof(*notice) + 2 * size + strlen(notice->path);
	return 0;
}

static int collect_notices(struct client *client, struct notices *notices)
{
	struct slice slice = slice_begin();
	struct notice_place place = {};
	int r;

	do
		r = notice_catch_up(client, &place, collect_notice, notices);
	while (r > 0 && notices->n_bytes < NOTICES_MAX_BYTES && !slice_is_over(&slice));
	return r;
}

int call_resume(struct call *call, const union call_in *in)
{
	struct client *client = prove_client(call, in->resume.client, in->resume.token);
	struct notices notices = {};
	int r;

	if (!client)
		return REFUSED;
	r = collect_notices(client, &notices);
	if (r >= 0) {
		struct msg_resume_out out = { .notices = { notices.items, notices.n } };

		session_begin(&call->peer->session, client);
		peer_reply(call->peer, &schema_msg_resume_out, &out, NULL, 0);
	}
	for (size_t i = 0; i < notices.n; i++)
		free(notices.items[i].pins.items);
	free(notices.items);
	return r < 0 ? r : 0;
}

static int watch_notice(const struct msg_notice *notice, void *userdata)
{
	peer_reply_more(userdata, &schema_msg_watch_out, &(struct msg_watch_out){ *notice });
	return 0;
}

static int watch_missed(struct peer *peer)
{
	return notice_catch_up(peer->session.client, &peer->missed, watch_notice, peer);
}

int call_watch(struct call *call, const union call_in *in)
{
	struct client *client = prove_client(call, in->watch.client, in->watch.token);

	if (!client)
		return REFUSED;
	session_begin(&call->peer->session, client);
	call->peer->watching = true;
	/* What began before somebody watched is told first. */
	call->peer->list = watch_missed;
	return CALL_PENDING;
}
