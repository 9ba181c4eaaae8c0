/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "connection.h"

#include "json-text.h"
#include "protocol/macro.h"

#include <limits.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define READ_MAX       (64U * 1024U)
#define INPUT_MIN      4096U
#define SEGMENT_MIN    4000U
#define SEGMENTS_MAX   16  /* in one sendmsg() */
#define PARSED_OBJECT  1200U /* bytes that a parsed object or array takes at most, when small, */
#define PARSED_BYTE    8U    /* and what is in it, a byte of text */
#define KERNEL_FDS_MAX CONNECTION_READ_FDS_MAX

struct text {
	unsigned n_refs;
	size_t size; /* with the NUL */
	char bytes[];
};

/* What is queued: one message with its descriptors, or any number without, or a text. */
struct segment {
	TAILQ_ENTRY(segment) next;
	struct fds fds;
	struct text *text; /* reference; NULL: bytes are sent */
	size_t start, end, size;
	char bytes[];
};

static struct segment *segment_new(size_t size)
{
	struct segment *s = malloc(sizeof(*s) + size);

	if (!s)
		return NULL;
	s->fds.n_fds = s->start = s->end = 0;
	s->text = NULL;
	s->size = size;
	return s;
}

static void segment_free(struct segment *s)
{
	text_unref(s->text);
	free(s);
}

/* Descriptors received, and where in the input their message starts. */
struct arrival {
	struct fds fds;
	size_t message;
};

struct connection {
	int fd;
	void (*close_fd)(int fd, void *userdata);
	int (*charge)(int64_t bytes, void *userdata);
	void *userdata;
	int64_t charged;
	json_tokener *tokener;

	char *input;
	size_t input_size;
	size_t start; /* of the first message */
	size_t end;   /* of what has been read */
	char *nul;    /* the end of the first message, NULL if that has not been read */

	/*
	 * Two are enough: nothing is read while a whole message waits, and a message gets its
	 * descriptors from the one read that begins it. So there are those of a message read in
	 * part and those of the read that completed it.
	 */
	struct arrival arrivals[2];
	size_t n_arrivals;
	int rejected[KERNEL_FDS_MAX]; /* came against the rule */
	size_t n_rejected;
	size_t n_received; /* by the last read */

	TAILQ_HEAD(segments, segment) segments;
	size_t queued;
	size_t output_size; /* of the segments */
};

static void connection_close_fd(struct connection *c, int fd)
{
	if (c->close_fd)
		c->close_fd(fd, c->userdata);
	else
		safe_close(fd);
}

static void connection_close_fds(struct connection *c, const int *fds, size_t n_fds)
{
	for (size_t i = 0; i < n_fds; i++)
		connection_close_fd(c, fds[i]);
}

/* What may be kept now: what is beyond the allowance is charged. */
static int connection_charge(struct connection *c, size_t input, size_t output)
{
	int64_t charged = (input > CONNECTION_FREE ? (int64_t)(input - CONNECTION_FREE) : 0) +
			  (output > CONNECTION_FREE ? (int64_t)(output - CONNECTION_FREE) : 0);
	int r = 0;

	if (c->charge && charged != c->charged)
		r = c->charge(charged - c->charged, c->userdata);
	if (r < 0)
		return r;
	c->charged = charged;
	return 0;
}

void connection_set_charge(struct connection *c, int (*charge)(int64_t bytes, void *userdata))
{
	c->charge = charge;
}

static json_tokener *tokener_new(void)
{
	json_tokener *tokener = json_tokener_new_ex(CONNECTION_DEPTH_MAX);

	if (tokener)
		json_tokener_set_flags(tokener, JSON_TOKENER_STRICT);
	return tokener;
}

int connection_new(
	int fd, void (*close_fd)(int fd, void *userdata), void *userdata, struct connection **ret)
{
	struct connection *c;

	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->tokener = tokener_new();
	c->input = malloc(INPUT_MIN);
	if (!c->tokener || !c->input) {
		if (c->tokener)
			json_tokener_free(c->tokener);
		free(c->input);
		free(c);
		return -ENOMEM;
	}
	c->input_size = INPUT_MIN;
	TAILQ_INIT(&c->segments);
	c->close_fd = close_fd;
	c->userdata = userdata;
	c->fd = fd;
	*ret = c;
	return 0;
}

struct connection *connection_free(struct connection *c)
{
	struct segment *s;

	if (!c)
		return NULL;
	for (size_t i = 0; i < c->n_arrivals; i++)
		connection_close_fds(c, c->arrivals[i].fds.fds, c->arrivals[i].fds.n_fds);
	connection_close_fds(c, c->rejected, c->n_rejected);
	while ((s = TAILQ_FIRST(&c->segments))) {
		TAILQ_REMOVE(&c->segments, s, next);
		connection_close_fds(c, s->fds.fds, s->fds.n_fds);
		segment_free(s);
	}
	json_tokener_free(c->tokener);
	free(c->input);
	(void)connection_charge(c, 0, 0);
	connection_close_fd(c, c->fd);
	free(c);
	return NULL;
}

int connection_get_fd(const struct connection *c)
{
	return c->fd;
}

bool connection_has_message(const struct connection *c)
{
	return c->nul;
}

/* Moves the rest of a message to the front, and makes room behind it. */
static int connection_make_room(struct connection *c)
{
	size_t size;
	char *input;
	int r;

	if (c->start > 0) {
		memmove(c->input, c->input + c->start, c->end - c->start);
		for (size_t i = 0; i < c->n_arrivals; i++)
			c->arrivals[i].message -= c->start;
		c->end -= c->start;
		c->start = 0;
	}
	if (c->end < c->input_size)
		return 0;
	if (c->input_size >= CONNECTION_MESSAGE_MAX)
		return -EMSGSIZE;
	size = c->input_size * 4;
	r = connection_charge(c, size, c->output_size);
	if (r < 0)
		return r;
	input = realloc(c->input, size);
	if (!input) {
		(void)connection_charge(c, c->input_size, c->output_size);
		return -ENOMEM;
	}
	c->input = input;
	c->input_size = size;
	return 0;
}

/* Takes over the descriptors that came with the n bytes at c->end. */
static int connection_take_fds(struct connection *c, struct msghdr *mh, size_t n)
{
	const char *bytes = c->input + c->end, *nul;
	int fds[KERNEL_FDS_MAX];
	struct cmsghdr *cmsg;
	struct arrival *a;
	size_t n_fds = 0;
	bool begins;

	for (cmsg = CMSG_FIRSTHDR(mh); cmsg; cmsg = CMSG_NXTHDR(mh, cmsg))
		if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
			n_fds = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
			memcpy(fds, CMSG_DATA(cmsg), n_fds * sizeof(int));
		}
	c->n_received = n_fds;
	if (n_fds == 0)
		return mh->msg_flags & MSG_CTRUNC ? -EPROTO : 0;

	nul = memrchr(bytes, 0, n - 1);
	begins = nul || c->start == c->end;
	if (mh->msg_flags & MSG_CTRUNC || n_fds > CONNECTION_FDS_MAX || !begins) {
		/* They are closed with the connection, which is of no use any more: this may be any thread. */
		memcpy(c->rejected, fds, n_fds * sizeof(int));
		c->n_rejected = n_fds;
		return -EPROTO;
	}
	a = &c->arrivals[c->n_arrivals++];
	a->message = nul ? (size_t)(nul + 1 - c->input) : c->start;
	a->fds.n_fds = n_fds;
	memcpy(a->fds.fds, fds, n_fds * sizeof(int));
	return 0;
}

static void connection_add(struct connection *c, size_t n)
{
	c->nul = memchr(c->input + c->end, 0, n);
	c->end += n;
}

/* Makes room for a read. */
static int connection_begin(struct connection *c, struct iovec *ret)
{
	size_t room;
	int r;

	c->n_received = 0;
	if (c->nul)
		return -EAGAIN;
	r = connection_make_room(c);
	if (r < 0)
		return r;
	room = c->input_size - c->end;
	*ret = (struct iovec){ c->input + c->end, room < READ_MAX ? room : READ_MAX };
	return 0;
}

int connection_read_bytes(struct connection *c)
{
	struct iovec iov;
	struct msghdr mh = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;
	int r;

	r = connection_begin(c, &iov);
	if (r < 0)
		return r;
	n = recvmsg(c->fd, &mh, MSG_DONTWAIT | MSG_PEEK);
	if (n < 0)
		return errno == EINTR ? -EAGAIN : -errno;
	if (n == 0)
		return 0;
	/* Without room for any, the kernel says only that there are some. */
	if (mh.msg_flags & MSG_CTRUNC)
		return CONNECTION_DESCRIPTORS;
	/* So much and no more: it could be merged with what has some. */
	n = recv(c->fd, iov.iov_base, (size_t)n, MSG_DONTWAIT);
	if (n < 0)
		return errno == EINTR ? -EAGAIN : -errno;
	connection_add(c, (size_t)n);
	return 1;
}

int connection_read(struct connection *c)
{
	union {
		char bytes[CMSG_SPACE(KERNEL_FDS_MAX * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov;
	struct msghdr mh = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t n;
	int r;

	r = connection_begin(c, &iov);
	if (r < 0)
		return r;
	n = recvmsg(c->fd, &mh, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (n < 0)
		return errno == EINTR ? -EAGAIN : -errno;
	if (n == 0)
		return 0;
	if (mh.msg_controllen > 0 || mh.msg_flags & MSG_CTRUNC) {
		r = connection_take_fds(c, &mh, (size_t)n);
		if (r < 0)
			return r;
	}
	connection_add(c, (size_t)n);
	return 1;
}

size_t connection_received(const struct connection *c)
{
	return c->n_received;
}

/* json-c 0.16 crashes where its tokener is refused memory for a key: so there has to be some. */
static bool have_memory(size_t n_brackets, size_t size)
{
	void *p = malloc(n_brackets * PARSED_OBJECT + size * PARSED_BYTE);

	free(p);
	return p;
}

/* length: without the NUL, at which the tokener knows that nothing more comes. */
static int parse(json_tokener *tokener, const char *text, size_t length, json_object **ret)
{
	_cleanup_(freep) char *ascii = NULL;
	struct json_text found;
	json_object *o;

	/* Brackets in strings count, too: the limit is far above any message of the interface. */
	if (json_text_examine(text, length, &found) < 0 ||
		found.n_brackets > CONNECTION_BRACKETS_MAX)
		return -EBADMSG;
	if (!have_memory(found.n_brackets, found.ascii_size))
		return -ENOMEM;
	if (found.ascii_size > length) {
		ascii = malloc(found.ascii_size + 1);
		if (!ascii)
			return -ENOMEM;
		json_text_to_ascii(text, length, ascii);
		ascii[found.ascii_size] = 0;
		text = ascii;
	}
	o = json_tokener_parse_ex(tokener, text, (int)found.ascii_size + 1);
	if (!json_object_is_type(o, json_type_object)) {
		json_object_put(o);
		return -EBADMSG;
	}
	*ret = o;
	return 0;
}

static void connection_shrink(struct connection *c)
{
	char *input;

	c->start = c->end = 0;
	if (c->input_size == INPUT_MIN)
		return;
	input = realloc(c->input, INPUT_MIN);
	if (!input)
		return;
	c->input = input;
	c->input_size = INPUT_MIN;
	(void)connection_charge(c, c->input_size, c->output_size);
}

size_t connection_kept_of_part(const struct connection *c)
{
	return !c->nul && c->end > c->start && c->input_size > CONNECTION_FREE
		       ? c->input_size - CONNECTION_FREE
		       : 0;
}

size_t connection_message_size(const struct connection *c)
{
	return c->nul ? (size_t)(c->nul - c->input) - c->start + 1 : 0;
}

/* The first message has been taken out of the input: hands out its descriptors, and goes on to the next. */
static void connection_taken(struct connection *c, struct fds *ret_fds)
{
	if (c->n_arrivals > 0 && c->arrivals[0].message == c->start) {
		*ret_fds = c->arrivals[0].fds;
		c->arrivals[0] = c->arrivals[1];
		c->n_arrivals--;
	} else {
		ret_fds->n_fds = 0;
	}
	c->start += connection_message_size(c);
	c->nul = memchr(c->input + c->start, 0, c->end - c->start);
	if (c->start == c->end)
		connection_shrink(c);
}

int connection_receive(struct connection *c, json_object **ret_message, struct fds *ret_fds)
{
	int r;

	if (!c->nul)
		return 0;
	r = parse(c->tokener, c->input + c->start, connection_message_size(c) - 1, ret_message);
	if (r < 0)
		return r;
	connection_taken(c, ret_fds);
	return 1;
}

int connection_receive_text(struct connection *c, char **ret, size_t *ret_n, struct fds *ret_fds)
{
	size_t n = connection_message_size(c);
	char *text = malloc(n);

	if (!text)
		return -ENOMEM;
	memcpy(text, c->input + c->start, n);
	connection_taken(c, ret_fds);
	*ret = text;
	*ret_n = n;
	return 0;
}

int message_parse(const char *text, size_t n, json_object **ret)
{
	json_tokener *tokener = tokener_new();
	int r;

	if (!tokener)
		return -ENOMEM;
	r = parse(tokener, text, n - 1, ret);
	json_tokener_free(tokener);
	return r;
}

/* A segment with room for n bytes: the last one, or a new one. */
static int connection_get_segment(struct connection *c, size_t n, bool alone, struct segment **ret)
{
	struct segment *s = TAILQ_LAST(&c->segments, segments);
	size_t size = n < SEGMENT_MIN && !alone ? SEGMENT_MIN : n;
	int r;

	/* One with descriptors, or a text, never has any. */
	if (s && !alone && s->size - s->end >= n) {
		*ret = s;
		return 0;
	}
	r = connection_charge(c, c->input_size, c->output_size + size);
	if (r < 0)
		return r;
	s = segment_new(size);
	if (!s) {
		(void)connection_charge(c, c->input_size, c->output_size);
		return -ENOMEM;
	}
	c->output_size += size;
	TAILQ_INSERT_TAIL(&c->segments, s, next);
	*ret = s;
	return 0;
}

/* ret_n: with the NUL */
static int message_format(json_object *message, const char **ret, size_t *ret_n)
{
	/* json-c 0.16 leaves out what it is refused memory for, and says nothing. */
	errno = 0;
	*ret = json_object_to_json_string_length(
		message, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, ret_n);
	if (!*ret || errno == ENOMEM)
		return -ENOMEM;
	(*ret_n)++;
	return 0;
}

int text_new(json_object *message, struct text **ret)
{
	struct text *text;
	const char *bytes;
	size_t n;
	int r;

	r = message_format(message, &bytes, &n);
	if (r < 0)
		return r;
	text = malloc(sizeof(*text) + n);
	if (!text)
		return -ENOMEM;
	text->n_refs = 1;
	text->size = n;
	memcpy(text->bytes, bytes, n);
	*ret = text;
	return 0;
}

struct text *text_ref(struct text *text)
{
	text->n_refs++;
	return text;
}

struct text *text_unref(struct text *text)
{
	if (text && --text->n_refs == 0)
		free(text);
	return NULL;
}

int connection_send_text(struct connection *c, struct text *text)
{
	struct segment *s;
	int r;

	if (text->size > CONNECTION_OUTPUT_MAX - c->queued)
		return -ENOBUFS;
	r = connection_charge(c, c->input_size, c->output_size + text->size);
	if (r < 0)
		return r;
	s = segment_new(0);
	if (!s) {
		(void)connection_charge(c, c->input_size, c->output_size);
		return -ENOMEM;
	}
	c->output_size += text->size;
	s->text = text_ref(text);
	s->size = s->end = text->size;
	TAILQ_INSERT_TAIL(&c->segments, s, next);
	c->queued += text->size;
	return 0;
}

int connection_send(struct connection *c, json_object *message, const int *fds, size_t n_fds)
{
	struct segment *s;
	const char *text;
	size_t n;
	int r;

	if (n_fds > CONNECTION_FDS_MAX)
		return -EINVAL;
	r = message_format(message, &text, &n);
	if (r < 0)
		return r;
	if (n > CONNECTION_OUTPUT_MAX - c->queued)
		return -ENOBUFS;
	r = connection_get_segment(c, n, n_fds > 0, &s);
	if (r < 0)
		return r;
	memcpy(s->bytes + s->end, text, n);
	s->end += n;
	c->queued += n;
	if (n_fds > 0)
		memcpy(s->fds.fds, fds, n_fds * sizeof(int));
	s->fds.n_fds = n_fds;
	return 0;
}

static void connection_sent(struct connection *c, size_t n)
{
	struct segment *s;

	c->queued -= n;
	while ((s = TAILQ_FIRST(&c->segments))) {
		size_t part = n < s->end - s->start ? n : s->end - s->start;

		while (s->fds.n_fds > 0)
			connection_close_fd(c, s->fds.fds[--s->fds.n_fds]);
		s->start += part;
		n -= part;
		if (s->start < s->end)
			return;
		TAILQ_REMOVE(&c->segments, s, next);
		c->output_size -= s->size;
		(void)connection_charge(c, c->input_size, c->output_size);
		segment_free(s);
		if (n == 0)
			return;
	}
}

static ssize_t connection_write(struct connection *c)
{
	union {
		char bytes[CMSG_SPACE(CONNECTION_FDS_MAX * sizeof(int))];
		struct cmsghdr header;
	} control = {};
	struct segment *s = TAILQ_FIRST(&c->segments);
	struct iovec iov[SEGMENTS_MAX];
	struct msghdr mh = {.msg_iov = iov};

	if (s->fds.n_fds > 0) {
		size_t n = s->fds.n_fds * sizeof(int);

		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(n);
		memcpy(CMSG_DATA(&control.header), s->fds.fds, n);
		mh.msg_control = &control;
		mh.msg_controllen = CMSG_SPACE(n);
	}
	do {
		iov[mh.msg_iovlen].iov_base = (s->text ? s->text->bytes : s->bytes) + s->start;
		iov[mh.msg_iovlen++].iov_len = s->end - s->start;
		s = TAILQ_NEXT(s, next);
	} while (s && !mh.msg_control && s->fds.n_fds == 0 && mh.msg_iovlen < SEGMENTS_MAX);

	return sendmsg(c->fd, &mh, MSG_DONTWAIT | MSG_NOSIGNAL);
}

int connection_flush(struct connection *c)
{
	size_t written = 0;

	while (c->queued > 0) {
		ssize_t n = connection_write(c);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno == EAGAIN ? 1 : -errno;
		connection_sent(c, (size_t)n);
		written += (size_t)n;
		/* whoever reads as fast as this writes must not keep it for ever */
		if (written >= CONNECTION_WRITE_MAX && c->queued > 0)
			return 1;
	}
	return 0;
}

size_t connection_queued(const struct connection *c)
{
	return c->queued;
}
