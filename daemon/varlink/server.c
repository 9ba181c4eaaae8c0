/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/server.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "daemon/util/schedule.h"
#include "daemon/varlink/call.h"
#include "daemon/varlink/request.h"
#include "protocol/macro.h"
#include "protocol/service.h"

#define ACCEPTS_PER_TURN  16
#define STREAMS_AT_ONCE   8U

/* Room for descriptors without which no connection is accepted: those who are there can send some. */
#define ACCEPT_ROOM (CONNECTION_READ_FDS_MAX + 16U)

#define ACCEPT_PAUSE_USEC (500 * USEC_PER_MSEC)

struct listener {
	struct rpc *rpc;
	int fd; /* owned */
	sd_event_source *io, *pause;
	LIST_ENTRY(listener) listeners;
};

static void refuse_interface(struct peer *peer, const char *name)
{
	peer_error(peer, SERVICE_NAME, &schema_msg_interface_not_found,
		   &(struct msg_interface_not_found){ .interface = name });
}

static void refuse_parameter_name(struct peer *peer, const char *name)
{
	peer_error(peer, SERVICE_NAME, &schema_msg_invalid_parameter,
		   &(struct msg_invalid_parameter){ .parameter = name });
}

static void get_info(struct peer *peer)
{
	static const char *interfaces[] = { SERVICE_NAME, INTERFACE_NAME };
	struct msg_get_info_out out = {
		.vendor = "pinbroker",
		.product = "pinbrokerd",
		.version = PINBROKER_VERSION,
		.url = "https://pinbroker.org",
		.interfaces = { interfaces, ELEMENTS(interfaces) },
	};

	peer_reply(peer, &schema_msg_get_info_out, &out, NULL, 0);
}

static void get_interface_description(struct peer *peer, json_object *parameters)
{
	struct msg_get_interface_description_in in;
	const struct interface *interface;
	const char *field;

	if (schema_read(&schema_msg_get_interface_description_in, parameters, 0, &in, &field) < 0) {
		refuse_parameter_name(peer, field);
		return;
	}
	if (strcmp(in.interface, INTERFACE_NAME) == 0) {
		interface = &interface_pinbroker;
	} else if (strcmp(in.interface, SERVICE_NAME) == 0) {
		interface = &interface_service;
	} else {
		refuse_interface(peer, in.interface);
		return;
	}
	peer_reply(peer, &schema_msg_get_interface_description_out,
		   &(struct msg_get_interface_description_out){ interface->description }, NULL, 0);
}

static void handle_service_call(struct peer *peer, const char *name, json_object *parameters)
{
	const struct method *method = interface_find_method(&interface_service, name);

	if (!method)
		peer_error(peer, SERVICE_NAME, &schema_msg_method_not_found,
			   &(struct msg_method_not_found){ .method = name });
	else if (method - interface_service.methods == METHOD_GetInterfaceDescription)
		get_interface_description(peer, parameters);
	else if (parameters && json_object_object_length(parameters) > 0)
		refuse_parameter_name(peer, "parameters");
	else
		get_info(peer);
}

static void handle_call(struct peer *peer, struct request *request, struct fds *fds)
{
	const struct method *method = request->method;
	struct call call = { .peer = peer, .fds = fds };
	int r = request->result;

	if (method->more && !request->more) {
		peer_error(peer, SERVICE_NAME, &schema_msg_expected_more,
			   &(struct msg_expected_more){});
		return;
	}
	if (r == -EINVAL) {
		refuse_parameter_name(peer, request->field);
		return;
	}
	if (r == 0) {
		peer->pending = true;
		r = call_handlers[method - interface_pinbroker.methods](&call, &request->in);
	}
	if (r == CALL_PENDING)
		return;
	if (r != 0)
		peer_refuse(peer, r, &call.refusal);
	peer->pending = false;
}

/* A wrong call is answered, too. */
static void on_request(struct peer *peer, struct request *request, struct fds *fds)
{
	const char *name = request->name, *dot = strrchr(name, '.');
	char interface[64];

	peer->oneway = request->oneway;
	if (request->method) {
		handle_call(peer, request, fds);
		return;
	}
	if (!dot || (size_t)(dot - name) >= sizeof(interface)) {
		refuse_interface(peer, name);
		return;
	}
	memcpy(interface, name, (size_t)(dot - name));
	interface[dot - name] = 0;
	if (strcmp(interface, SERVICE_NAME) == 0)
		handle_service_call(peer, dot + 1, request->parameters);
	else if (strcmp(interface, INTERFACE_NAME) == 0)
		peer_error(peer, SERVICE_NAME, &schema_msg_method_not_found,
			   &(struct msg_method_not_found){ .method = dot + 1 });
	else
		refuse_interface(peer, interface);
}

static int on_resume_accepting(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct listener *l = userdata;

	return sd_event_source_set_enabled(l->io, SD_EVENT_ON);
}

/* Out of descriptors: the connection waits in the backlog, and we do not spin. */
static void pause_accepting(struct listener *l)
{
	(void)sd_event_source_set_enabled(l->io, SD_EVENT_OFF);
	(void)sd_event_source_set_time(l->pause, now_usec() + ACCEPT_PAUSE_USEC);
	(void)sd_event_source_set_enabled(l->pause, SD_EVENT_ONESHOT);
}

static int on_connection(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
	struct listener *l = userdata;

	for (unsigned n = 0; n < ACCEPTS_PER_TURN; n++) {
		int r, s;

		if (!users_have_room(l->rpc->broker->users, ACCEPT_ROOM)) {
			log_error("Out of descriptors, accepting no connections for the moment.");
			pause_accepting(l);
			break;
		}
		s = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (s < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
			      errno == ENOMEM)) {
			log_errno(LOG_ERR, errno, "Cannot accept connections for the moment");
			pause_accepting(l);
		}
		if (s < 0)
			break;
		r = peer_new(l->rpc, s, on_request);
		if (r < 0)
			log_errno_limit(LOG_NOTICE, r, LOG_RESOURCE_EVENT, "Refused a connection");
	}
	return 0;
}

static struct listener *listener_free(struct listener *l)
{
	if (!l)
		return NULL;
	sd_event_source_disable_unref(l->io);
	sd_event_source_disable_unref(l->pause);
	/* Connections that wait in it may carry descriptors. */
	offload_close_connection(l->rpc->broker->offload, NULL, l->fd);
	free(l);
	return NULL;
}

int rpc_listen(struct rpc *rpc, int fd)
{
	struct listener *l;
	int r;

	l = calloc(1, sizeof(*l));
	if (!l)
		return -ENOMEM;
	l->rpc = rpc;
	l->fd = -1;
	r = sd_event_add_io(rpc->broker->event, &l->io, fd, EPOLLIN, on_connection, l);
	if (r >= 0)
		r = sd_event_add_time(rpc->broker->event, &l->pause, CLOCK_MONOTONIC, 0, 0,
				      on_resume_accepting, l);
	if (r >= 0)
		r = sd_event_source_set_enabled(l->pause, SD_EVENT_OFF);
	if (r < 0) {
		listener_free(l);
		return r;
	}
	l->fd = fd;
	LIST_INSERT_HEAD(&rpc->listeners, l, listeners);
	return 0;
}

/* To every connection that watches for the client. */
static void on_notice(struct observer *observer, struct client *client, const struct msg_notice *notice)
{
	struct text *text = NULL;
	struct session *session;
	unsigned n = 0;
	int r;

	LIST_FOREACH(session, &client->sessions, of_client) {
		struct peer *peer = container_of(session, struct peer, session);

		if (!peer->watching)
			continue;
		r = text ? 0 : peer_format(&schema_msg_watch_out, &(struct msg_watch_out){ *notice }, true, &text);
		/* the first few are written to at once, the others in turns of their own */
		peer_send_text(peer, r, text, n++ < STREAMS_AT_ONCE);
	}
	text_unref(text);
}

int rpc_new(struct broker *broker, struct rpc **ret)
{
	struct rpc *rpc = calloc(1, sizeof(*rpc));
	int r;

	if (!rpc)
		return -ENOMEM;
	rpc->broker = broker;
	LIST_INIT(&rpc->listeners);
	LIST_INIT(&rpc->peers);
	r = schedule_new(broker->event, &rpc->schedule);
	if (r < 0) {
		free(rpc);
		return r;
	}
	rpc->observer = (struct observer){ .notice = on_notice };
	observer_add(&broker->observers, &rpc->observer);
	*ret = rpc;
	return 0;
}

struct rpc *rpc_free(struct rpc *rpc)
{
	if (!rpc)
		return NULL;
	while (!LIST_EMPTY(&rpc->listeners)) {
		struct listener *l = LIST_FIRST(&rpc->listeners);

		LIST_REMOVE(l, listeners);
		listener_free(l);
	}
	while (!LIST_EMPTY(&rpc->peers))
		peer_close(LIST_FIRST(&rpc->peers));
	observer_remove(&rpc->broker->observers, &rpc->observer);
	schedule_free(rpc->schedule);
	free(rpc);
	return NULL;
}
