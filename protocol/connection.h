/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <json-c/json.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * One end of a Varlink connection with descriptors: messages are JSON objects that end with a NUL
 * byte, on a non-blocking AF_UNIX stream socket. It buffers, frames and limits; it knows nothing of
 * methods and never blocks or waits.
 *
 * Because the kernel merges what was sent separately, a message with descriptors is sent alone, in
 * one sendmsg(), and received descriptors belong to the last message begun in that read.
 */

#define CONNECTION_MESSAGE_MAX (1024U * 1024U) /* bytes of one message received, with the NUL */
#define CONNECTION_OUTPUT_MAX  (32U * 1024U * 1024U) /* bytes queued for sending */
#define CONNECTION_WRITE_MAX   (256U * 1024U) /* bytes sent at a time */
#define CONNECTION_DEPTH_MAX   16                    /* of the JSON */
#define CONNECTION_FDS_MAX     16                    /* descriptors with one message */
#define CONNECTION_READ_FDS_MAX 253 /* SCM_MAX_FD: descriptors that one read can bring */
#define CONNECTION_FREE        (64U * 1024U)         /* bytes kept each way that are not charged */
/* { and [ in a message: json-c makes up to 800 bytes of each. */
#define CONNECTION_BRACKETS_MAX 8192

struct connection;

/* A message as it is sent, which may be queued on many connections and exists once. */
struct text;

struct fds {
	int fds[CONNECTION_FDS_MAX];
	size_t n_fds;
};

/*
 * Takes the descriptor over, on success. close_fd, if not NULL, is called in place of close() for
 * every descriptor that the connection gets rid of: those received and never handed out, those that were sent,
 * and, last of all, its own (which may carry unread descriptors). userdata is passed to it.
 */
int connection_new(
	int fd, void (*close_fd)(int fd, void *userdata), void *userdata, struct connection **ret);
struct connection *connection_free(struct connection *c); /* accepts NULL, returns NULL */

/*
 * charge is called, with the userdata of connection_new(), before bytes are kept beyond CONNECTION_FREE,
 * and with a negative number when they are kept no more. What it refuses with a negative errno is not kept: reading
 * fails with that, and can be tried again, or sending.
 */
void connection_set_charge(struct connection *c, int (*charge)(int64_t bytes, void *userdata));

int connection_get_fd(const struct connection *c);

/*
 * Reads once from the socket, at most 64 KiB. Returns 1 if there may be more to read; 0 at the end
 * of the stream; -EAGAIN if there was nothing, or a whole message waits to be received first (a
 * loop that cannot take it yet does not poll for input); -EMSGSIZE: a message over
 * CONNECTION_MESSAGE_MAX; -EPROTO: descriptors against the rule, or some lost (MSG_CTRUNC); another
 * negative errno from the socket. After any error but -EAGAIN the connection is of no use any more.
 */
int connection_read(struct connection *c);

/*
 * The same, but leaves alone what comes with descriptors, and returns CONNECTION_DESCRIPTORS: it is for
 * connection_read(), which then takes no memory and calls nothing, so that it may run on any thread.
 */
#define CONNECTION_DESCRIPTORS 2
int connection_read_bytes(struct connection *c);

/* How many descriptors the last read has brought, in whatever way it ended. */
size_t connection_received(const struct connection *c);

/*
 * Takes the next whole message. Returns 1 and hands over the object and, in *ret_fds, the
 * descriptors, both the caller's from then on; 0 if there is none yet; -EBADMSG if it is not a JSON
 * object, not valid UTF-8, too deep, or has too many brackets; -ENOMEM. After an error the
 * connection is of no use.
 */
int connection_receive(struct connection *c, json_object **ret_message, struct fds *ret_fds);

/* Bytes that are kept, beyond CONNECTION_FREE, of a message that has arrived in part. */
size_t connection_kept_of_part(const struct connection *c);

/* Bytes of the message that connection_receive() would take next, with its NUL; 0: there is none. */
size_t connection_message_size(const struct connection *c);
/* Takes it as it is: the text, with its NUL, is the caller's. 0, or -ENOMEM. */
int connection_receive_text(struct connection *c, char **ret, size_t *ret_n, struct fds *ret_fds);
/* Makes of a text what connection_receive() would, with the same errors. On any thread. */
int message_parse(const char *text, size_t n, json_object **ret);

/* True if connection_receive() would return something other than 0. */
bool connection_has_message(const struct connection *c);

/*
 * Queues a message. The descriptors are taken over on success (and closed once sent). Returns 0;
 * -ENOBUFS if more than CONNECTION_OUTPUT_MAX bytes would be queued; -EINVAL if there are more than
 * CONNECTION_FDS_MAX descriptors; -ENOMEM.
 */
int connection_send(struct connection *c, json_object *message, const int *fds, size_t n_fds);

/* -ENOMEM */
int text_new(json_object *message, struct text **ret);
struct text *text_ref(struct text *text);
struct text *text_unref(struct text *text); /* accepts NULL, returns NULL */
/* Queues it, with a reference of its own; returns what connection_send() does. */
int connection_send_text(struct connection *c, struct text *text);

/* Writes what the socket takes, at most CONNECTION_WRITE_MAX and a bit. Returns 1 if something is left (wait for EPOLLOUT), 0 if all has
 * been sent, negative errno from the socket. */
int connection_flush(struct connection *c);

/* Bytes queued and not yet taken by the socket. */
size_t connection_queued(const struct connection *c);
