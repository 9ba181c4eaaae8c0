/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/peer.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "daemon/core/broker.h"
#include "daemon/util/closer.h"
#include "daemon/util/log.h"
#include "daemon/util/schedule.h"
#include "daemon/util/turn.h"
#include "daemon/varlink/request.h"
#include "daemon/varlink/server.h"
#include "protocol/macro.h"
#include "protocol/service.h"

/* What a stream queues ahead. */
#define STREAM_QUEUE_MAX (256U * 1024U)

/* Bytes of a message that take too long to read in a turn. */
#define LONG_MESSAGE (16U * 1024U)

struct peer_private {
	struct peer peer;
	peer_handler handler;
};

static void close_fd(int fd, void *userdata)
{
	struct peer *peer = userdata;
	struct offload *offload = peer->broker->offload;

	if (fd == peer->fd)
		offload_close_connection(offload, peer->user, fd);
	else
		offload_close(offload, peer->user, fd);
}

static bool is_held(const struct peer *peer)
{
	return peer->told.serial != 0;
}

struct peer *peer_ref(struct peer *peer)
{
	peer->n_refs++;
	return peer;
}

struct peer *peer_unref(struct peer *peer)
{
	if (!peer || --peer->n_refs > 0)
		return NULL;
	assert(!peer->connection && !peer->session.client);
	process_clear(&peer->process);
	user_unref(peer->user);
	free(container_of(peer, struct peer_private, peer));
	return NULL;
}

static void forget_client(struct session *session)
{
	struct peer *peer = container_of(session, struct peer, session);

	session_end(session);
	if (peer->watching)
		peer->list = NULL;
	peer->watching = false;
}

static void close_session(struct session *session)
{
	peer_close(container_of(session, struct peer, session));
}

void peer_close(struct peer *peer)
{
	struct client *client = peer->session.client;

	if (!peer->connection)
		return;
	LIST_REMOVE(peer, of_rpc);
	if (is_held(peer))
		notifier_forget(peer->broker->store.notifier, &peer->told);
	peer->io = sd_event_source_disable_unref(peer->io);
	schedule_remove(&peer->turn);
	if (!intake_close(peer))
		peer->connection = connection_free(peer->connection);
	if (client) {
		forget_client(&peer->session);
		if (!client_is_connected(client))
			client_disconnected(client);
	}
	peer_unref(peer);
}

static void go_on_later(struct peer *peer)
{
	schedule_add(peer->rpc->schedule, &peer->turn, false);
}

static void fail(struct peer *peer)
{
	peer->failed = true;
	if (peer->connection)
		go_on_later(peer);
}

static void log_bad_input(struct peer *peer, int error)
{
	struct log_fields fields = {
		.client = peer->session.client ? peer->session.client->id : 0,
		.pid = peer->process.pid,
		.uid = &peer->process.uid,
		.error = -error,
	};

	if (error == -ENOMEM) {
		log_event(LOG_WARNING, NULL, &fields,
			  "No memory for what process %d of uid %u sent, connection closed.",
			  peer->process.pid, peer->process.uid);
		return;
	}
	log_event(LOG_NOTICE, MESSAGE_BAD_INPUT, &fields,
		  "Process %d of uid %u sent what is no message, connection closed: %s.",
		  peer->process.pid, peer->process.uid, strerror(-error));
}

/* What to wait for on the socket. */
void peer_set_events(struct peer *peer)
{
	uint32_t events = 0;

	if (!peer->connection)
		return;
	if (!peer->pending && !is_held(peer) && !peer->intake.stalled && !intake_is_full(peer))
		events |= EPOLLIN;
	if (!is_held(peer) && connection_queued(peer->connection) > 0)
		events |= EPOLLOUT;
	if (sd_event_source_set_io_events(peer->io, events) < 0)
		fail(peer);
}

static void flush(struct peer *peer)
{
	if (peer->failed || !peer->connection || is_held(peer))
		return;
	if (connection_flush(peer->connection) < 0)
		fail(peer);
}

static void close_fds(struct peer *peer, const struct fds *fds)
{
	for (size_t i = 0; i < fds->n_fds; i++)
		offload_close(peer->broker->offload, peer->user, fds->fds[i]);
}

static void turn(struct peer *peer, int r);

/* One that takes long to read and to forget is read, and forgotten, on the pool. */
struct long_message {
	struct job job;
	struct peer *peer; /* reference */
	char *text;        /* owned */
	size_t n;
	struct fds fds; /* owned */
	struct request request;
	int result;
};

static void long_message_read(struct job *job)
{
	struct long_message *m = container_of(job, struct long_message, job);
	json_object *message;

	m->result = message_parse(m->text, m->n, &message);
	if (m->result >= 0)
		m->result = request_read(&m->request, message);
}

static void long_message_forget(struct job *job)
{
	struct long_message *m = container_of(job, struct long_message, job);

	request_clear(&m->request);
	free(TAKE_PTR(m->text));
}

static void long_message_forgotten(struct job *job)
{
	struct long_message *m = container_of(job, struct long_message, job);

	if (m->text)
		long_message_forget(job); /* the pool ended before it came to that */
	peer_unref(m->peer);
	free(m);
}

static void long_message_done(struct job *job)
{
	struct long_message *m = container_of(job, struct long_message, job);
	struct peer *peer = m->peer;

	peer->pending = false;
	if (peer->connection && m->result >= 0)
		container_of(peer, struct peer_private, peer)->handler(peer, &m->request, &m->fds);
	close_fds(peer, &m->fds);
	if (peer->connection)
		turn(peer, m->result);
	m->job.run = long_message_forget;
	m->job.done = long_message_forgotten;
	offload_submit_step(peer->broker->offload, peer->user, &m->job);
}

static int receive_long(struct peer *peer)
{
	struct long_message *m = calloc(1, sizeof(*m));
	int r;

	if (!m)
		return -ENOMEM;
	r = connection_receive_text(peer->connection, &m->text, &m->n, &m->fds);
	if (r < 0) {
		free(m);
		return r;
	}
	m->peer = peer_ref(peer);
	m->job.run = long_message_read;
	m->job.done = long_message_done;
	peer->pending = true;
	offload_submit_step(peer->broker->offload, peer->user, &m->job);
	return 0;
}

/* Answers what has arrived, some of it each turn. */
static int answer(struct peer *peer)
{
	struct peer_private *p = container_of(peer, struct peer_private, peer);
	struct slice slice = slice_begin();
	int r;

	while (peer->connection && !peer->pending && !peer->failed && !is_held(peer) &&
	       !intake_is_full(peer)) {
		struct request request;
		json_object *message;
		struct fds fds;

		if (slice_is_over(&slice)) {
			if (connection_has_message(peer->connection))
				go_on_later(peer);
			break;
		}
		if (connection_message_size(peer->connection) > LONG_MESSAGE)
			return receive_long(peer);
		r = connection_receive(peer->connection, &message, &fds);
		if (r <= 0)
			return r;
		r = request_read(&request, message);
		if (r >= 0)
			p->handler(peer, &request, &fds);
		request_clear(&request);
		close_fds(peer, &fds);
		if (r < 0)
			return r;
	}
	return 0;
}

static void stream(struct peer *peer)
{
	int r;

	while (peer->list && !peer->failed) {
		if (connection_queued(peer->connection) > STREAM_QUEUE_MAX)
			return; /* until the socket has taken it */
		r = peer->list(peer);
		flush(peer);
		if (r > 0) {
			go_on_later(peer);
			return;
		}
		peer->list = NULL;
		if (!peer->watching) /* that goes on for ever */
			peer_done(peer);
	}
}

static void turn(struct peer *peer, int r)
{
	if (r >= 0 && !peer->failed && !peer->pending)
		r = answer(peer);
	if (r < 0 && r != -EPIPE && r != -ECONNRESET && r != -ECANCELED)
		log_bad_input(peer, r);
	if (r >= 0 && peer->connection) {
		flush(peer);
		stream(peer);
		peer_set_events(peer);
	}
	if (r < 0 || peer->failed)
		peer_close(peer);
}

void peer_read(struct peer *peer, int r)
{
	if (r == 0)
		r = -EPIPE; /* the end of the stream */
	turn(peer, r == -EAGAIN ? 0 : r);
}

static void take_turn(struct scheduled *scheduled)
{
	struct peer *peer = container_of(scheduled, struct peer, turn);
	uint64_t begin_usec = turn_cpu_usec();
	uint32_t revents = peer->revents;

	peer_ref(peer);
	peer->revents = 0;
	if (revents != 0)
		(void)sd_event_source_set_enabled(peer->io, SD_EVENT_ON);
	if (revents & EPOLLIN && !peer->pending)
		peer_read(peer, intake_read(peer));
	else
		turn(peer, revents & (EPOLLHUP | EPOLLERR) ? -EPIPE : 0);
	user_spend(peer->user, turn_cpu_usec() - begin_usec);
	peer_unref(peer);
}

static int on_io(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct peer *peer = userdata;

	peer->revents = revents;
	if (user_is_light(peer->user)) {
		take_turn(&peer->turn);
		return 0;
	}
	schedule_add(peer->rpc->schedule, &peer->turn, true);
	return sd_event_source_set_enabled(source, SD_EVENT_OFF);
}

static void peer_told(struct notifier_waiter *waiter)
{
	struct peer *peer = container_of(waiter, struct peer, told);

	flush(peer);
	if (!peer->pending)
		go_on_later(peer);
	peer_set_events(peer);
}

void peer_hold(struct peer *peer)
{
	struct notifier *notifier = peer->broker->store.notifier;

	peer->told.told = peer_told;
	if (notifier && peer->connection)
		(void)notifier_wait(notifier, &peer->told);
}

void peer_done(struct peer *peer)
{
	peer->pending = false;
	if (!peer->connection)
		return;
	if (connection_has_message(peer->connection))
		go_on_later(peer);
	peer_set_events(peer);
}

static int peer_start(struct peer *peer, int fd)
{
	int r, on = 1;

	/* Else the kernel would drop bytes that were sent out of band, and the descriptors with them, while the
	 * loop reads. */
	if (setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on)) < 0)
		return -errno;
	r = sd_event_add_io(peer->broker->event, &peer->io, fd, EPOLLIN, on_io, peer);
	if (r >= 0)
		r = connection_new(fd, close_fd, peer, &peer->connection);
	if (r >= 0)
		connection_set_charge(peer->connection, intake_charge);
	return r;
}

/* Nothing more is kept of it: all it gets is a reason. */
static void tell_limit(int fd, const struct user *user, enum limit limit)
{
	uint64_t maximum = user_maximum(user, limit);
	char reply[200];
	int n;

	n = snprintf(reply, sizeof(reply),
		     "{\"error\":\"" INTERFACE_NAME ".LimitExceeded\",\"parameters\":{\"limit\":"
		     "\"%s\",\"maximum\":%" PRIu64 ",\"used\":%" PRIu64 "}}",
		     limit_name(limit), maximum, maximum);
	(void)send(fd, reply, (size_t)n + 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void tell_groups(int fd)
{
	char reply[200];
	int n;

	n = snprintf(reply, sizeof(reply),
		     "{\"error\":\"" INTERFACE_NAME ".NotAllowed\",\"parameters\":{\"cause\":\"groups\","
		     "\"message\":\"A process may have %u supplementary groups at most.\"}}",
		     PROCESS_GROUPS_MAX);
	(void)send(fd, reply, (size_t)n + 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Returns 0, or -EDQUOT: it is charged all the same, until it is closed, and nothing is read from it. */
static int charge_connection(struct user *user, const struct process *process, int fd)
{
	int r = user_charge(user, LIMIT_CLIENTS, 1);

	if (r < 0) {
		user_charge_force(user, LIMIT_CLIENTS, 1);
		tell_limit(fd, user, LIMIT_CLIENTS);
	} else if (process->n_groups > PROCESS_GROUPS_MAX) {
		r = -EDQUOT;
		tell_groups(fd);
	}
	return r;
}

int peer_new(struct rpc *rpc, int fd, peer_handler handler)
{
	struct broker *broker = rpc->broker;
	struct process process;
	struct peer_private *p;
	struct peer *peer;
	struct user *user;
	int r;

	r = process_from_socket(fd, &process);
	if (r >= 0) {
		r = user_get(broker->users, process.uid, &user);
		if (r < 0)
			process_clear(&process);
	}
	if (r < 0) {
		offload_close_connection(broker->offload, NULL, fd);
		return r;
	}
	r = charge_connection(user, &process, fd);
	p = r >= 0 ? calloc(1, sizeof(*p)) : NULL;
	if (!p) {
		offload_close_connection(broker->offload, user, fd);
		process_clear(&process);
		user_unref(user);
		return r < 0 ? r : -ENOMEM;
	}
	p->handler = handler;
	peer = &p->peer;
	peer->rpc = rpc;
	peer->broker = broker;
	peer->user = user;
	peer->process = process;
	peer->fd = fd;
	peer->n_refs = 1;
	peer->turn.user = user;
	peer->turn.take_turn = take_turn;
	peer->session.forget = forget_client;
	peer->session.close = close_session;
	r = peer_start(peer, fd);
	if (r < 0) {
		peer->io = sd_event_source_disable_unref(peer->io);
		offload_close_connection(broker->offload, user, fd);
		peer_unref(peer);
		return r;
	}
	LIST_INSERT_HEAD(&rpc->peers, peer, of_rpc);
	return 0;
}

void peer_give_way(struct peer *peer)
{
	struct log_fields fields = {
		.client = peer->session.client ? peer->session.client->id : 0,
		.pid = peer->process.pid,
		.uid = &peer->process.uid,
	};

	if (peer->failed)
		return;
	log_event(LOG_NOTICE, MESSAGE_BAD_INPUT, &fields,
		  "Process %d of uid %u has stopped in the middle of a message, and other messages of that "
		  "user wait for the room that it takes (%s=): connection closed.",
		  peer->process.pid, peer->process.uid, limit_name(LIMIT_QUEUED_BYTES));
	if (connection_queued(peer->connection) == 0)
		tell_limit(peer->fd, peer->user, LIMIT_QUEUED_BYTES);
	fail(peer);
}

static int add_string(json_object *message, const char *key, const char *value)
{
	json_object *s = json_object_new_string(value);

	if (!s)
		return -ENOMEM;
	if (json_object_object_add(message, key, s) < 0) {
		json_object_put(s);
		return -ENOMEM;
	}
	return 0;
}

static int make_message(const char *error, bool more, const struct schema *schema, const void *out,
			json_object **ret)
{
	json_object *parameters, *message = json_object_new_object();
	int r;

	r = message ? schema_write(schema, out, &parameters) : -ENOMEM;
	if (r >= 0 && json_object_object_add(message, "parameters", parameters) < 0) {
		json_object_put(parameters);
		r = -ENOMEM;
	}
	if (r >= 0 && error)
		r = add_string(message, "error", error);
	if (r >= 0 && more)
		r = json_object_object_add(message, "continues", json_object_new_boolean(true)) < 0
			    ? -ENOMEM
			    : 0;
	if (r < 0)
		json_object_put(message);
	else
		*ret = message;
	return r;
}

static void fail_to_answer(struct peer *peer, int r)
{
	log_errno(LOG_NOTICE, r, "Cannot answer process %d, closing its connection", peer->process.pid);
	fail(peer);
}

static void send_message(struct peer *peer, const char *error, bool more,
			 const struct schema *schema, const void *out, const int *fds, size_t n_fds)
{
	json_object *message;
	int r;

	if (!peer->connection || peer->oneway || peer->failed) {
		for (size_t i = 0; i < n_fds; i++)
			offload_close(peer->broker->offload, peer->user, fds[i]);
		return;
	}
	broker_flush(peer->broker);
	r = make_message(error, more, schema, out, &message);
	if (r >= 0) {
		r = connection_send(peer->connection, message, fds, n_fds);
		json_object_put(message);
	}
	if (r < 0) {
		for (size_t i = 0; i < n_fds; i++)
			offload_close(peer->broker->offload, peer->user, fds[i]);
		fail_to_answer(peer, r);
		return;
	}
	peer->intake.n_unread_fds += (unsigned)n_fds;
	flush(peer);
	if (connection_queued(peer->connection) > 0)
		peer_set_events(peer);
}

int peer_format(const struct schema *schema, const void *out, bool more, struct text **ret)
{
	json_object *message;
	int r;

	r = make_message(NULL, more, schema, out, &message);
	if (r < 0)
		return r;
	r = text_new(message, ret);
	json_object_put(message);
	return r;
}

void peer_send_text(struct peer *peer, int r, struct text *text, bool at_once)
{
	if (!peer->connection || peer->oneway || peer->failed)
		return;
	broker_flush(peer->broker);
	if (r >= 0)
		r = connection_send_text(peer->connection, text);
	if (r < 0) {
		fail_to_answer(peer, r);
	} else if (at_once) {
		flush(peer);
		peer_set_events(peer);
	} else {
		go_on_later(peer);
	}
}

void peer_reply(struct peer *peer, const struct schema *schema, const void *out, const int *fds,
		size_t n_fds)
{
	send_message(peer, NULL, false, schema, out, fds, n_fds);
}

void peer_reply_more(struct peer *peer, const struct schema *schema, const void *out)
{
	send_message(peer, NULL, true, schema, out, NULL, 0);
}

void peer_error(struct peer *peer, const char *interface, const struct schema *schema,
		const void *out)
{
	char name[96];

	snprintf(name, sizeof(name), "%s.%s", interface, schema->name);
	send_message(peer, name, false, schema, out, NULL, 0);
}

#define ERROR(tag, ...)                                                                            \
	peer_error(peer, INTERFACE_NAME, &schema_##tag, &(struct tag){ __VA_ARGS__ })

void peer_refuse(struct peer *peer, int r, const struct refusal *f)
{
	if (r < 0) {
		ERROR(msg_busy, .cause = "system", .untilUSec = INT_NULL, .message = strerror(-r));
		return;
	}
	switch (f->kind) {
	case REFUSAL_NOT_LEASABLE:
		ERROR(msg_not_leasable, .cause = f->cause,
		      .fileSystem = f->file_system[0] ? f->file_system : NULL,
		      .message = f->message);
		break;
	case REFUSAL_BUSY:
		ERROR(msg_busy, .cause = f->cause, .untilUSec = f->until_usec,
		      .message = f->message);
		break;
	case REFUSAL_NOT_ALLOWED:
		ERROR(msg_not_allowed, .cause = f->cause, .message = f->message);
		break;
	case REFUSAL_NO_SUCH_OBJECT:
		ERROR(msg_no_such_object, .type = f->cause, .id = f->id);
		break;
	case REFUSAL_LIMIT_EXCEEDED:
		ERROR(msg_limit_exceeded, .limit = f->cause, .maximum = f->maximum,
		      .used = f->used);
		break;
	case REFUSAL_REVOKED:
		ERROR(msg_revoked, .revocation = f->id, .pins = { (int64_t[]){ f->pin }, f->pin != 0 });
		break;
	case REFUSAL_RANGE_CONFLICT:
		ERROR(msg_range_conflict, .revocation = f->id, .offset = f->offset,
		      .length = f->length);
		break;
	case REFUSAL_BEYOND_END_OF_FILE:
		ERROR(msg_beyond_end_of_file, .offset = f->offset, .length = f->length,
		      .size = f->size);
		break;
	case REFUSAL_NOT_SUPPORTED:
		ERROR(msg_not_supported, .cause = f->cause, .message = f->message);
		break;
	case REFUSAL_INVALID_PARAMETER:
		peer_error(peer, SERVICE_NAME, &schema_msg_invalid_parameter,
			   &(struct msg_invalid_parameter){ .parameter = f->cause });
		break;
	}
}
