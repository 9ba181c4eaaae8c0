/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fuzz.h"
#include "protocol/connection.h"
#include "protocol/interface.h"
#include "protocol/macro.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/*
 * The input is a row of chunks, each behind a byte that says how it is sent: the low six bits are
 * its length (0: all that is left), the high two choose the number of descriptors. A newline stands
 * for the NUL at the end of a message, which keeps the corpus readable.
 */

static const size_t n_fds_of[] = {0, 1, 2, CONNECTION_FDS_MAX + 1};

static void send_chunk(int fd, const uint8_t *data, size_t size, size_t n_fds)
{
	union {
		char bytes[CMSG_SPACE((CONNECTION_FDS_MAX + 1) * sizeof(int))];
		struct cmsghdr header;
	} control = {};
	char bytes[4096];
	struct iovec iov = {bytes, size < sizeof(bytes) ? size : sizeof(bytes)};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};

	for (size_t i = 0; i < iov.iov_len; i++)
		bytes[i] = data[i] == '\n' ? 0 : (char)data[i];
	if (n_fds > 0) {
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		for (size_t i = 0; i < n_fds; i++)
			((int *)CMSG_DATA(&control.header))[i] = STDERR_FILENO;
		mh.msg_control = &control;
		mh.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
	}
	if (sendmsg(fd, &mh, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)iov.iov_len)
		abort();
}

/* Reads it as every method's call, and sends it back with the descriptors that it brought. */
static int use_message(struct connection *c, json_object *message, const struct fds *fds)
{
	json_object *parameters = message;
	int r;

	json_object_object_get_ex(message, "parameters", &parameters);
	for (size_t i = 0; i < interface_pinbroker.n_methods; i++) {
		const struct schema *schema = interface_pinbroker.methods[i].in;
		_cleanup_(freep) void *p = calloc(1, schema->size + 1);

		if (schema_read(schema, parameters, 0, p, NULL) == 0)
			schema_clear(schema, p);
	}
	r = connection_send(c, message, fds->fds, fds->n_fds);
	if (r < 0)
		abort();
	return connection_flush(c);
}

static int use_connection(struct connection *c)
{
	json_object *message;
	struct fds fds;
	int r;

	while ((r = connection_read(c)) == 1) {
		while (connection_has_message(c)) {
			r = connection_receive(c, &message, &fds);
			if (r < 0)
				return r;
			if (r != 1 || fds.n_fds > CONNECTION_FDS_MAX)
				abort();
			r = use_message(c, message, &fds);
			json_object_put(message);
			if (r < 0)
				return r;
		}
		if (connection_receive(c, &message, &fds) != 0)
			abort();
	}
	if (r == 0)
		abort();
	return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int lowest = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0), fds[2], r = -EAGAIN;
	struct connection *c;

	close(lowest);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0 ||
		connection_new(fds[0], NULL, NULL, &c) < 0)
		abort();
	while (size > 0 && r == -EAGAIN) {
		uint8_t how = *data++;
		size_t n = how & 0x3f;

		size--;
		if (n == 0 || n > size)
			n = size;
		if (n == 0)
			break;
		send_chunk(fds[1], data, n, n_fds_of[how >> 6]);
		r = use_connection(c);
		data += n;
		size -= n;
	}
	connection_free(c);
	close(fds[1]);

	/* Not one descriptor was left open. */
	r = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
	close(r);
	if (r != lowest)
		abort();
	return 0;
}
