/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "call.h"

#include <sys/epoll.h>

/* The stream of notices on a second connection. Nothing here waits. */

static void watch_break(pinbroker *pb)
{
	watch_stop(pb);
	backoff_down(&pb->watch_retry);
}

void watch_stop(pinbroker *pb)
{
	if (!pb->watch)
		return;
	poll_remove(pb, connection_get_fd(pb->watch));
	pb->watch = connection_free(pb->watch);
}

static int watch_flush(pinbroker *pb)
{
	int r;

	r = connection_flush(pb->watch);
	if (r >= 0)
		poll_change(pb, connection_get_fd(pb->watch), EPOLLIN | (r > 0 ? EPOLLOUT : 0),
			SOURCE_WATCH);
	return r;
}

static int watch_open(pinbroker *pb)
{
	struct msg_watch_in in = {.client = (int64_t)pb->client, .token = pb->token};
	_cleanup_(json_putp) json_object *message = NULL;
	_cleanup_(connection_freep) struct connection *c = NULL;
	int r;

	r = broker_dial(pb, false, &c);
	if (r < 0)
		return r;
	r = request_message(METHOD_Watch, &in, true, &message);
	if (r < 0)
		return r;
	r = connection_send(c, message, NULL, 0);
	if (r < 0)
		return r;
	r = poll_add(pb, connection_get_fd(c), EPOLLIN, SOURCE_WATCH);
	if (r < 0)
		return r;
	pb->watch = TAKE_PTR(c);
	return watch_flush(pb);
}

void watch_start(pinbroker *pb)
{
	if (watch_open(pb) < 0)
		watch_break(pb);
	else
		backoff_up(&pb->watch_retry);
}

static int watch_take(pinbroker *pb, json_object *message)
{
	json_object *parameters, *notice;
	struct msg_watch_out out;
	const char *name, *field;
	int r;

	r = reply_error(message, &name, &parameters);
	if (r < 0)
		return r;
	if (name) {
		r = error_number(name);
		if (r == -ENOENT || r == -EACCES)
			mark_lost(pb);
		return r;
	}
	if (parameters && json_object_object_get_ex(parameters, "notice", &notice))
		notice_soften(notice);
	r = schema_read(&schema_msg_watch_out, parameters, SCHEMA_IGNORE_UNKNOWN, &out, &field);
	if (r < 0)
		return r;
	r = notice_offer_message(pb, &out.notice);
	schema_clear(&schema_msg_watch_out, &out);
	return r;
}

/* A notice that could not be taken in breaks the stream: the next one starts with it. */
static int watch_receive(pinbroker *pb)
{
	int r;

	for (;;) {
		_cleanup_(reply_done) struct reply reply = {};

		r = connection_receive(pb->watch, &reply.message, &reply.fds);
		if (r <= 0)
			return r;
		r = watch_take(pb, reply.message);
		if (r < 0)
			return r;
	}
}

void watch_dispatch(pinbroker *pb)
{
	int r;

	if (!pb->watch)
		return;
	r = connection_queued(pb->watch) > 0 ? watch_flush(pb) : 0;
	if (r >= 0) {
		r = connection_read(pb->watch);
		if (r == 0)
			r = -EPIPE;
		else if (r == -EAGAIN)
			r = 0;
	}
	if (r >= 0)
		r = watch_receive(pb);
	if (r < 0)
		watch_break(pb);
}
