/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "call.h"

#include <poll.h>
#include <string.h>
#include <sys/epoll.h>

void request_drop(pinbroker *pb)
{
	if (!pb->request)
		return;
	poll_remove(pb, connection_get_fd(pb->request));
	pb->request = connection_free(pb->request);
}

bool request_is_broken(pinbroker *pb)
{
	struct pollfd pfd = {.events = POLLRDHUP};

	if (!pb->request)
		return true;
	pfd.fd = connection_get_fd(pb->request);
	return poll(&pfd, 1, 0) > 0;
}

static int request_install(pinbroker *pb, struct connection *c)
{
	int r;

	/* By edges: a broken connection is dealt with once, by whoever holds the lock. */
	r = poll_add(pb, connection_get_fd(c), EPOLLRDHUP | EPOLLET, SOURCE_REQUEST);
	if (r < 0)
		return r;
	request_drop(pb);
	pb->request = c;
	return 0;
}

/* Says a thing on a connection that need not be the client's (yet). */
static int request_on(pinbroker *pb, struct connection *c, int method, const void *in, void *out,
	uint64_t until_usec, struct reply *reply)
{
	_cleanup_(json_putp) json_object *message = NULL;
	bool unread;
	int r;

	r = request_message(method, in, false, &message);
	if (r >= 0)
		r = connection_send(c, message, NULL, 0);
	if (r >= 0)
		r = connection_await(c, until_usec, &reply->message, &reply->fds, &unread);
	if (r < 0)
		return error_transport(pb, method, r);
	r = reply_read(pb, method, out, reply);
	if (r < 0)
		reply_done(reply);
	return r;
}

/* In a time namespace of our own the broker's clock is another than ours. Where it may have been the same, with the
 * answer under way meanwhile, it is. */
static void clock_learn(pinbroker *pb, uint64_t sent_usec, int64_t broker_usec)
{
	int64_t least = (int64_t)sent_usec - broker_usec,
		most = (int64_t)now_usec() - broker_usec;

	if (broker_usec != INT_NULL)
		atomic_store(&pb->clock_usec, least <= 0 && most >= 0 ? 0 : least);
}

static int request_hello_on(pinbroker *pb, struct connection *c, const char *bus_name,
	uint64_t until_usec, struct msg_hello_out *out, struct reply *reply)
{
	struct msg_hello_in in = {.name = pb->name, .busName = bus_name};
	uint64_t sent_usec = now_usec();
	int r;

	r = request_on(pb, c, METHOD_Hello, &in, out, until_usec, reply);
	if (r >= 0)
		clock_learn(pb, sent_usec, out->nowUSec);
	return r;
}

/* What was learnt in part is forgotten with the rest. */
static int request_learn(pinbroker *pb, const struct msg_hello_out *out)
{
	pb->client = (uint64_t)out->client;
	pb->token = strdup(out->token);
	pb->version = strdup(out->version);
	pb->features = calloc(out->features.n_items + 1, sizeof(*pb->features));
	if (!pb->token || !pb->version || !pb->features)
		return -ENOMEM;
	for (size_t i = 0; i < out->features.n_items; i++) {
		pb->features[i] = strdup(out->features.items[i]);
		if (!pb->features[i])
			return -ENOMEM;
		pb->n_features++;
	}
	return 0;
}

void request_forget(pinbroker *pb)
{
	request_drop(pb);
	for (size_t i = 0; i < pb->n_features; i++)
		free(pb->features[i]);
	free(pb->features);
	free(pb->version);
	free(pb->token);
	pb->features = NULL;
	pb->n_features = 0;
	pb->version = NULL;
	pb->token = NULL;
	pb->client = 0;
}

/* A broker that does not like the bus name is still good for everything else. */
int request_connect(pinbroker *pb)
{
	_cleanup_(connection_freep) struct connection *c = NULL;
	struct msg_hello_out out;
	_cleanup_(reply_done) struct reply reply = {};
	const char *bus_name = pb->bus_ready ? pb->bus_name : NULL;
	int r;

	r = broker_dial(pb, true, &c);
	if (r < 0)
		return error_dial(pb, r);
	r = request_hello_on(pb, c, bus_name, call_deadline(pb, METHOD_Hello), &out, &reply);
	if (r < 0 && bus_name && pinbroker_last_error(pb)->name)
		r = request_hello_on(pb, c, NULL, call_deadline(pb, METHOD_Hello), &out, &reply);
	if (r < 0)
		return r;
	r = request_learn(pb, &out);
	if (r >= 0)
		r = request_install(pb, c);
	if (r < 0)
		return error_transport(pb, METHOD_Hello, r);
	TAKE_PTR(c);
	/* Said, even where it was not liked: it will not be liked better the next time. */
	free(pb->bus_name_said);
	pb->bus_name_said = bus_name ? strdup(bus_name) : NULL;
	return 0;
}

int request_hello(pinbroker *pb, const char *bus_name, uint64_t until_usec)
{
	struct msg_hello_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = request_hello_on(pb, pb->request, bus_name, until_usec, &out, &reply);
	if (r < 0 && !pinbroker_last_error(pb)->name) {
		request_drop(pb);
		return r;
	}
	free(pb->bus_name_said);
	pb->bus_name_said = bus_name ? strdup(bus_name) : NULL;
	return r;
}

/*
 * Takes the client up again on a new connection, and learns of the revocations that are running.
 * The old connection, if there still is one, goes only then.
 */
int request_restore(pinbroker *pb, uint64_t until_usec)
{
	struct msg_resume_in in = {.client = (int64_t)pb->client, .token = pb->token};
	_cleanup_(connection_freep) struct connection *c = NULL;
	struct msg_resume_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_dial(pb, until_usec == USEC_INFINITY, &c);
	if (r < 0)
		return error_dial(pb, r);
	if (until_usec == USEC_INFINITY)
		until_usec = call_deadline(pb, METHOD_Resume);
	r = request_on(pb, c, METHOD_Resume, &in, &out, until_usec, &reply);
	if (r == -ENOENT || r == -EACCES) {
		mark_lost(pb);
		return check_usable(pb);
	}
	if (r < 0)
		return r;
	for (size_t i = 0; i < out.notices.n_items; i++) {
		r = notice_offer_message(pb, &out.notices.items[i]);
		if (r < 0)
			return error_transport(pb, METHOD_Resume, r);
	}
	r = request_install(pb, c);
	if (r < 0)
		return error_transport(pb, METHOD_Resume, r);
	TAKE_PTR(c);
	atomic_store(&pb->resumed, true);
	return 0;
}

/* What comes to the same when it is done twice: a file that is open gets the same id again. */
static bool method_is_repeatable(int method)
{
	return method == METHOD_Bind || method == METHOD_OpenFile || method == METHOD_Preflight;
}

/* The request went out, the answer is lost. -ENOMEM would say that nothing was done. */
static int error_answer(const pinbroker *pb, int method, int r)
{
	bool late = r == -ETIMEDOUT;

	if (method_is_repeatable(method) || (r != -ENOMEM && !late && !is_broken_connection(r)))
		return error_transport(pb, method, r);
	return error_set(pb, late ? r : -ECONNRESET,
		"%s: %s before the broker's answer was read, so whether it was done is not known. "
		"List the pins to find out.",
		interface_pinbroker.methods[method].name,
		r == -ENOMEM ? "memory ran out"
		: late       ? "the time was over (is the broker stopped, or does it hang?)"
			     : "the connection broke");
}

/* The connection stands, but what is on it is of no use. It goes only when there is another: a
 * broker forgets who has neither pins nor connections. */
static void request_renew(pinbroker *pb)
{
	if (request_restore(pb, USEC_INFINITY) < 0)
		request_drop(pb);
}

static int broker_call_locked(pinbroker *pb, int method, json_object *message, const int *fds,
	size_t n_fds, struct reply *reply)
{
	bool unread;
	int r;

	for (unsigned attempt = 0;; attempt++) {
		if (!pb->request) {
			r = request_restore(pb, USEC_INFINITY);
			if (r < 0)
				return r;
		}
		r = connection_send_copies(pb->request, message, fds, n_fds);
		if (r < 0)
			return error_transport(pb, method, r);
		r = connection_await(pb->request, call_deadline(pb, method), &reply->message,
			&reply->fds, &unread);
		if (r >= 0)
			return 0;
		if (r == -ETIMEDOUT) {
			/* A late answer is not to be taken for that of the next call. */
			request_drop(pb);
			return error_answer(pb, method, r);
		}
		if (!is_broken_connection(r)) {
			request_renew(pb);
			return unread ? error_transport(pb, method, r)
				      : error_answer(pb, method, r);
		}
		request_drop(pb);
		if (attempt > 0 || (!unread && !method_is_repeatable(method))) {
			request_restore(pb, USEC_INFINITY);
			return pb->lost ? check_usable(pb) : error_answer(pb, method, r);
		}
	}
}

int broker_call(pinbroker *pb, int method, const void *in, const int *fds, size_t n_fds, void *out,
	struct reply *reply)
{
	_cleanup_(json_putp) json_object *message = NULL;
	int r;

	r = check_usable(pb);
	if (r < 0)
		return r;
	r = request_message(method, in, false, &message);
	if (r < 0)
		return error_transport(pb, method, r);

	call_lock(pb);
	r = broker_call_locked(pb, method, message, fds, n_fds, reply);
	call_unlock(pb);
	if (r < 0)
		return r;
	r = reply_read(pb, method, out, reply);
	if (r == -ENOMEM)
		r = error_answer(pb, method, r);
	if (r < 0)
		reply_done(reply);
	return r;
}
