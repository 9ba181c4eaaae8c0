/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "call.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

/* While the broker's backlog is full. */
#define DIAL_PATIENCE_SEC 5

/* Of these the broker may have to open a file, on whatever file system, or to wait for a lease. */
#define PATIENCE_FOR_FILES 4

void reply_done(struct reply *reply)
{
	if (reply->schema && reply->out)
		schema_clear(reply->schema, reply->out);
	for (size_t i = 0; i < reply->fds.n_fds; i++)
		safe_close(reply->fds.fds[i]);
	json_object_put(reply->message);
	*reply = (struct reply){};
}

int broker_dial(pinbroker *pb, bool patient, struct connection **ret)
{
	struct timeval timeout = {.tv_sec = DIAL_PATIENCE_SEC};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	_cleanup_(close_fdp) int fd = -1;
	int r;

	memcpy(address.sun_path, pb->socket_path, strlen(pb->socket_path));
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | (patient ? 0 : SOCK_NONBLOCK), 0);
	if (fd < 0)
		return -errno;
	if (patient && setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) < 0)
		return -errno;
	while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		if (errno != EINTR)
			return -errno;
	if (patient && fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		return -errno;
	r = connection_new(fd, NULL, NULL, ret);
	if (r >= 0)
		TAKE_FD(fd);
	return r;
}

/* Takes the value over. */
static int add_member(json_object *object, const char *key, json_object *value)
{
	if (value && json_object_object_add(object, key, value) == 0)
		return 0;
	json_object_put(value);
	return -ENOMEM;
}

int request_message(int method, const void *in, bool more, json_object **ret)
{
	const struct method *m = &interface_pinbroker.methods[method];
	_cleanup_(json_putp) json_object *message = NULL;
	json_object *parameters;
	char name[128];
	int r;

	snprintf(name, sizeof(name), INTERFACE_NAME ".%s", m->name);
	message = json_object_new_object();
	if (!message)
		return -ENOMEM;
	r = add_member(message, "method", json_object_new_string(name));
	if (r >= 0 && in) {
		r = schema_write(m->in, in, &parameters);
		if (r >= 0)
			r = add_member(message, "parameters", parameters);
	}
	if (r >= 0 && more)
		r = add_member(message, "more", json_object_new_boolean(true));
	if (r < 0)
		return r;
	*ret = TAKE_PTR(message);
	return 0;
}

int reply_error(json_object *message, const char **ret_name, json_object **ret_parameters)
{
	json_object *parameters = NULL, *error = NULL;

	if (json_object_object_get_ex(message, "parameters", &parameters) && parameters &&
		!json_object_is_type(parameters, json_type_object))
		return -EPROTO;
	if (json_object_object_get_ex(message, "error", &error) &&
		!json_object_is_type(error, json_type_string))
		return -EPROTO;
	*ret_name = error ? json_object_get_string(error) : NULL;
	*ret_parameters = parameters;
	return 0;
}

static bool reply_continues(json_object *message)
{
	json_object *continues;

	return json_object_object_get_ex(message, "continues", &continues) &&
	       json_object_get_boolean(continues);
}

uint64_t call_deadline(const pinbroker *pb, int method)
{
	bool files = method == METHOD_OpenFile || method == METHOD_Preflight;

	return now_usec() + pb->answer_usec * (files ? PATIENCE_FOR_FILES : 1);
}

static int connection_wait(struct connection *c, uint64_t until_usec)
{
	struct pollfd pfd = {
		.fd = connection_get_fd(c),
		.events = (short)(POLLIN | (connection_queued(c) > 0 ? POLLOUT : 0)),
	};
	struct timespec ts, *timeout = NULL;

	if (until_usec != USEC_INFINITY) {
		uint64_t now = now_usec();

		if (now >= until_usec)
			return -ETIMEDOUT;
		ts.tv_sec = (time_t)((until_usec - now) / USEC_PER_SEC);
		ts.tv_nsec = (long)((until_usec - now) % USEC_PER_SEC * 1000);
		timeout = &ts;
	}
	if (ppoll(&pfd, 1, timeout, NULL) < 0 && errno != EINTR)
		return -errno;
	return 0;
}

int connection_await(struct connection *c, uint64_t until_usec, json_object **ret,
	struct fds *ret_fds, bool *ret_unread)
{
	int r;

	for (;;) {
		r = connection_receive(c, ret, ret_fds);
		if (r > 0)
			return 0;
		if (r == 0)
			r = connection_flush(c);
		if (r >= 0) {
			r = connection_read(c);
			if (r == 0) {
				*ret_unread = connection_queued(c) > 0;
				return -EPIPE;
			}
		}
		if (r == -EAGAIN)
			r = connection_wait(c, until_usec);
		if (r < 0) {
			*ret_unread = connection_queued(c) > 0 || r == -ECONNRESET;
			return r;
		}
	}
}

int connection_send_copies(struct connection *c, json_object *message, const int *fds, size_t n_fds)
{
	int copies[CONNECTION_FDS_MAX] = {};
	size_t n = 0;
	int r = 0;

	if (n_fds > CONNECTION_FDS_MAX)
		return -EINVAL;
	for (; n < n_fds; n++) {
		copies[n] = fcntl(fds[n], F_DUPFD_CLOEXEC, 3);
		if (copies[n] < 0) {
			r = -errno;
			break;
		}
	}
	if (r >= 0)
		r = connection_send(c, message, copies, n_fds);
	if (r < 0)
		while (n > 0)
			safe_close(copies[--n]);
	return r;
}

bool is_broken_connection(int r)
{
	return r == -EPIPE || r == -ECONNRESET || r == -ENOTCONN;
}

int error_transport(const pinbroker *pb, int method, int r)
{
	const char *name = interface_pinbroker.methods[method].name;

	if (r == -EBADF)
		return error_set(pb, r, "%s: the descriptor is not open.", name);
	if (r == -ENOMEM)
		return error_set(pb, r, "%s: out of memory.", name);
	if (r == -ETIMEDOUT)
		return error_set(pb, r,
			"The broker at %s does not answer %s: it is stopped, or hangs. See how it "
			"is "
			"(systemctl status pinbrokerd), and try again.",
			pb->socket_path, name);
	if (is_broken_connection(r))
		return error_set(pb, -ECONNRESET,
			"The broker at %s closed the connection during %s.", pb->socket_path, name);
	return error_set(pb, r, "Talking to the broker at %s failed during %s: %s.%s",
		pb->socket_path, name, strerror(-r), limit_advice(-r));
}

int error_dial(const pinbroker *pb, int r)
{
	if (r == -EMFILE || r == -ENFILE || r == -ENOMEM)
		return error_set(pb, r, "Cannot make a connection to the broker: %s.%s",
			strerror(-r), limit_advice(-r));
	return error_set(pb, r,
		"Cannot connect to the broker at %s: %s. See whether it is running (systemctl "
		"status pinbrokerd.socket), or give another path in $PINBROKER_SOCKET.",
		pb->socket_path, strerror(-r));
}

static int error_protocol(const pinbroker *pb, int method, const char *field)
{
	return error_set(pb, -EPROTO,
		"The broker's answer to %s makes no sense%s%s. Broker and library may be of "
		"different versions.",
		interface_pinbroker.methods[method].name, field ? ": " : "", field ?: "");
}

int reply_read(pinbroker *pb, int method, void *out, struct reply *reply)
{
	const struct schema *schema = interface_pinbroker.methods[method].out;
	const char *name, *field = NULL;
	json_object *parameters;
	int r;

	r = reply_error(reply->message, &name, &parameters);
	if (r < 0)
		return error_protocol(pb, method, NULL);
	if (name)
		return error_from_reply(pb, name, parameters);
	if (!out)
		return 0;
	r = schema_read(schema, parameters, SCHEMA_IGNORE_UNKNOWN, out, &field);
	if (r == -ENOMEM)
		return error_transport(pb, method, r);
	if (r < 0)
		return error_protocol(pb, method, field);
	reply->schema = schema;
	reply->out = out;
	return 0;
}

int transient_call(pinbroker *pb, int method, const void *in, const int *fds, size_t n_fds,
	void *out, struct reply *reply)
{
	_cleanup_(json_putp) json_object *message = NULL;
	_cleanup_(connection_freep) struct connection *c = NULL;
	bool unread;
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	r = broker_dial(pb, true, &c);
	if (r < 0)
		return error_dial(pb, r);
	r = request_message(method, in, false, &message);
	if (r >= 0)
		r = connection_send_copies(c, message, fds, n_fds);
	if (r >= 0)
		r = connection_await(
			c, call_deadline(pb, method), &reply->message, &reply->fds, &unread);
	if (r < 0)
		return error_transport(pb, method, r);
	r = reply_read(pb, method, out, reply);
	if (r < 0)
		reply_done(reply);
	return r;
}

int transient_stream(pinbroker *pb, int method, const void *in, void *out,
	int (*each)(const void *out, void *userdata), void *userdata)
{
	_cleanup_(json_putp) json_object *message = NULL;
	_cleanup_(connection_freep) struct connection *c = NULL;
	bool unread, more;
	int r;

	r = check_process(pb);
	if (r < 0)
		return r;
	r = broker_dial(pb, true, &c);
	if (r < 0)
		return error_dial(pb, r);
	r = request_message(method, in, true, &message);
	if (r >= 0)
		r = connection_send(c, message, NULL, 0);
	if (r < 0)
		return error_transport(pb, method, r);
	do {
		_cleanup_(reply_done) struct reply reply = {};

		r = connection_await(
			c, call_deadline(pb, method), &reply.message, &reply.fds, &unread);
		if (r < 0)
			return error_transport(pb, method, r);
		more = reply_continues(reply.message);
		r = reply_read(pb, method, out, &reply);
		if (r < 0)
			return r;
		r = each(out, userdata);
		if (r != 0)
			return r;
	} while (more);
	return 0;
}
