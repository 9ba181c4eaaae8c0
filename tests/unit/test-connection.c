/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "protocol/connection.h"
#include "protocol/macro.h"

#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <cmocka.h>

/* A connection and the bare socket at its other end. */
struct pair {
	struct connection *c;
	int peer;
	size_t n_descriptors; /* open before */
	size_t n_closed;      /* through close_fd */
	int last_closed;
};

static size_t count_descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	size_t n = 0;

	assert_non_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void close_counted(int fd, void *userdata)
{
	struct pair *p = userdata;

	p->n_closed++;
	p->last_closed = fd;
	assert_int_equal(close(fd), 0);
}

static int set_up(void **state)
{
	struct pair *p = calloc(1, sizeof(*p));
	int fds[2];

	p->n_descriptors = count_descriptors();
	assert_int_equal(
		socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
	assert_int_equal(connection_new(fds[0], close_counted, p, &p->c), 0);
	assert_int_equal(connection_get_fd(p->c), fds[0]);
	p->peer = fds[1];
	*state = p;
	return 0;
}

/* The connection's own descriptor goes last. */
static int tear_down(void **state)
{
	struct pair *p = *state;
	int fd = p->c ? connection_get_fd(p->c) : p->last_closed;

	connection_free(p->c);
	assert_int_equal(p->last_closed, fd);
	assert_int_equal(fcntl(fd, F_GETFD), -1);
	safe_close(p->peer);
	assert_int_equal(count_descriptors(), p->n_descriptors);
	free(p);
	return 0;
}

static void put_with(struct pair *p, const void *bytes, size_t n, size_t n_fds)
{
	union {
		char bytes[CMSG_SPACE(253 * sizeof(int))];
		struct cmsghdr header;
	} control = {};
	struct iovec iov = {(void *)bytes, n};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);

	assert_true(fd >= 0);
	if (n_fds > 0) {
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		for (size_t i = 0; i < n_fds; i++)
			((int *)CMSG_DATA(&control.header))[i] = fd;
		mh.msg_control = &control;
		mh.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
	}
	assert_int_equal(sendmsg(p->peer, &mh, MSG_NOSIGNAL), n);
	close(fd);
}

static void put(struct pair *p, const void *bytes, size_t n)
{
	put_with(p, bytes, n, 0);
}

/* A string literal with its NUL. */
#define PUT(p, text)         put(p, text, sizeof(text))
#define PUT_WITH(p, text, n) put_with(p, text, sizeof(text), n)

/* Expects a message {"n": value} with that many descriptors. */
static void expect_message(struct pair *p, int value, size_t n_fds)
{
	json_object *o = NULL, *n = NULL;
	struct fds fds;

	assert_true(connection_has_message(p->c));
	assert_int_equal(connection_receive(p->c, &o, &fds), 1);
	assert_true(json_object_object_get_ex(o, "n", &n));
	assert_int_equal(json_object_get_int(n), value);
	json_object_put(o);
	assert_int_equal(fds.n_fds, n_fds);
	for (size_t i = 0; i < fds.n_fds; i++) {
		assert_int_equal(fcntl(fds.fds[i], F_GETFD), FD_CLOEXEC);
		close(fds.fds[i]);
	}
}

static void expect_none(struct pair *p)
{
	json_object *o = NULL;
	struct fds fds;

	assert_false(connection_has_message(p->c));
	assert_int_equal(connection_receive(p->c, &o, &fds), 0);
	assert_null(o);
}

static void merged_messages_come_apart(void **state)
{
	static const char text[] = "{\"n\":1}\0{\"n\":2}\0 {\n\"n\" : 3 }\t\0{\"n\":";
	struct pair *p = *state;

	put(p, text, sizeof(text) - 1);
	assert_int_equal(connection_read(p->c), 1);
	PUT(p, "4}");
	/* Nothing more is taken in before these have been received. */
	assert_int_equal(connection_read(p->c), -EAGAIN);
	for (int i = 1; i <= 3; i++)
		expect_message(p, i, 0);
	expect_none(p);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 4, 0);
	expect_none(p);
	assert_int_equal(connection_read(p->c), -EAGAIN);
}

static void bytes_come_one_by_one(void **state)
{
	static const char text[] = "{\"n\":1,\"s\":\"\xc3\xa4\"}\0{\"n\":2}";
	struct pair *p = *state;

	for (size_t i = 0; i < sizeof(text); i++) {
		put_with(p, text + i, 1, i == 0 ? 1 : 0);
		assert_int_equal(connection_read(p->c), 1);
		if (text[i])
			expect_none(p);
		else
			expect_message(p, i == sizeof(text) - 1 ? 2 : 1, i < 20 ? 1 : 0);
	}
	assert_int_equal(connection_read(p->c), -EAGAIN);
}

static void end_of_stream(void **state)
{
	struct pair *p = *state;

	PUT(p, "{\"n\":1}");
	put(p, "{", 1);
	p->peer = safe_close(p->peer);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
	expect_none(p);
	assert_int_equal(connection_read(p->c), 0);
	assert_int_equal(connection_read(p->c), 0);
}

/* The kernel merges a message without descriptors with the next that has some. */
static void descriptors_belong_to_the_last_message_begun(void **state)
{
	struct pair *p = *state;

	PUT(p, "{\"n\":1}");
	PUT(p, "{\"n\":2}");
	PUT_WITH(p, "{\"n\":3}", 2);
	PUT_WITH(p, "{\"n\":4}", CONNECTION_FDS_MAX);
	PUT(p, "{\"n\":5}");
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
	expect_message(p, 2, 0);
	expect_message(p, 3, 2);
	expect_none(p);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 4, CONNECTION_FDS_MAX);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 5, 0);
	assert_int_equal(p->n_closed, 0);
}

/* Its own descriptors came with its beginning, the next one's with its end. */
static void a_message_in_parts_keeps_its_descriptors(void **state)
{
	struct pair *p = *state;

	PUT(p, "{\"n\":1}");
	put_with(p, "{\"n\"", 4, 1);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
	PUT(p, ":2}");
	put_with(p, "{\"n\":3", 6, 3);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 2, 1);
	expect_none(p);
	PUT(p, "}");
	PUT_WITH(p, "{\"n\":4}", 4);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 3, 3);
	expect_message(p, 4, 4);
}

/* They came against the rule: the connection is of no use any more, and they are closed with it. */
static void expect_refused(struct pair *p, size_t n_fds)
{
	assert_int_equal(connection_read(p->c), -EPROTO);
	assert_int_equal(connection_received(p->c), n_fds);
	assert_int_equal(p->n_closed, 0);
	p->c = connection_free(p->c);
	assert_in_range(p->n_closed, n_fds + 1, n_fds + 2); /* its own, and what came before */
}

static void descriptors_in_a_continuation_are_refused(void **state)
{
	struct pair *p = *state;

	put_with(p, "{\"n\"", 4, 1);
	assert_int_equal(connection_read(p->c), 1);
	PUT_WITH(p, ":1}", 2);
	expect_refused(p, 2);
}

static void too_many_descriptors_are_refused(void **state)
{
	static const size_t n_fds[] = {CONNECTION_FDS_MAX + 1, CONNECTION_READ_FDS_MAX};

	for (size_t i = 0; i < ELEMENTS(n_fds); i++) {
		void *fresh;

		assert_int_equal(set_up(&fresh), 0);
		PUT_WITH((struct pair *)fresh, "{\"n\":1}", n_fds[i]);
		expect_refused(fresh, n_fds[i]);
		tear_down(&fresh);
	}
}

static void lost_descriptors_are_noticed(void **state)
{
	/* Room for three of the eight, then for none. */
	static const rlim_t rooms[] = {3, 0};

	for (size_t i = 0; i < ELEMENTS(rooms); i++) {
		struct rlimit limit, low;
		struct pair *p;
		void *fresh;
		int highest, r;

		assert_int_equal(set_up(&fresh), 0);
		p = fresh;
		PUT_WITH(p, "{\"n\":1}", 8);
		highest = open("/dev/null", O_RDONLY | O_CLOEXEC);
		close(highest);
		assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
		low = limit;
		low.rlim_cur = (rlim_t)highest + rooms[i];
		assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
		r = connection_read(p->c);
		assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
		if (r == 1) {
			/* Nothing was lost: valgrind does not pass the limit on to the kernel. */
			expect_message(p, 1, 8);
			tear_down(&fresh);
			skip();
		}
		assert_int_equal(r, -EPROTO);
		assert_int_equal(connection_received(p->c), rooms[i]);
		p->c = connection_free(p->c);
		assert_int_equal(p->n_closed, rooms[i] + 1);
		tear_down(&fresh);
	}
}

/* Bytes are read up to what comes with descriptors, and those are left for another thread. */
static void descriptors_can_be_left_alone(void **state)
{
	struct pair *p = *state;
	size_t before = count_descriptors();

	assert_int_equal(connection_read_bytes(p->c), -EAGAIN);
	PUT(p, "{\"n\":1}");
	assert_int_equal(connection_read_bytes(p->c), 1);
	expect_message(p, 1, 0);
	PUT_WITH(p, "{\"n\":2}", 3);
	PUT(p, "{\"n\":3}");
	before = count_descriptors();
	for (int i = 0; i < 3; i++)
		assert_int_equal(connection_read_bytes(p->c), CONNECTION_DESCRIPTORS);
	assert_int_equal(count_descriptors(), before);
	expect_none(p);
	assert_int_equal(connection_read(p->c), 1);
	assert_int_equal(connection_received(p->c), 3);
	expect_message(p, 2, 3);
	assert_int_equal(connection_read_bytes(p->c), 1);
	assert_int_equal(connection_received(p->c), 0);
	expect_message(p, 3, 0);
	p->peer = safe_close(p->peer);
	assert_int_equal(connection_read_bytes(p->c), 0);
}

static int64_t bytes_charged, bytes_max;

static int charge(int64_t bytes, void *userdata)
{
	if (bytes_charged + bytes > bytes_max)
		return -EDQUOT;
	bytes_charged += bytes;
	return 0;
}

/* What is kept beyond the allowance is charged before; refused, it can be tried again. */
static void bytes_are_charged(void **state)
{
	_cleanup_(freep) char *text = calloc(1, 3 * CONNECTION_FREE);
	struct pair *p = *state;
	json_object *o = json_object_new_object();
	int r;

	bytes_charged = bytes_max = 0;
	connection_set_charge(p->c, charge);
	/* half a message */
	memset(text, ' ', 3 * CONNECTION_FREE);
	for (size_t i = 0; i < CONNECTION_FREE; i += 4096) {
		put(p, text, 4096);
		assert_int_equal(connection_read_bytes(p->c), 1);
	}
	assert_int_equal(bytes_charged, 0);
	PUT(p, "{\"n\":1}");
	assert_int_equal(connection_read_bytes(p->c), -EDQUOT);
	assert_int_equal(connection_read(p->c), -EDQUOT);
	bytes_max = INT64_MAX;
	assert_int_equal(connection_read_bytes(p->c), 1);
	assert_true(bytes_charged > 0);
	expect_message(p, 1, 0);
	assert_int_equal(bytes_charged, 0);

	/* answers that nobody reads */
	memset(text, 'x', 2 * CONNECTION_FREE);
	text[2 * CONNECTION_FREE] = 0;
	json_object_object_add(o, "s", json_object_new_string(text));
	bytes_max = 4 * (int64_t)CONNECTION_FREE;
	while ((r = connection_send(p->c, o, NULL, 0)) == 0)
		;
	assert_int_equal(r, -EDQUOT);
	assert_in_range(bytes_charged, 2 * CONNECTION_FREE, 4 * CONNECTION_FREE);
	assert_in_range(connection_queued(p->c), 4 * CONNECTION_FREE, 6 * CONNECTION_FREE);
	/* once they are read, it is given back */
	while (connection_flush(p->c) > 0)
		while (recv(p->peer, text, CONNECTION_FREE, MSG_DONTWAIT) > 0)
			;
	assert_int_equal(bytes_charged, 0);
	assert_int_equal(connection_send(p->c, o, NULL, 0), 0);
	assert_true(bytes_charged > 0);
	json_object_put(o);
	p->c = connection_free(p->c);
	assert_int_equal(bytes_charged, 0);
}

/* Sends {"s":"xxx..."} of that size, NUL included, in pieces; returns the first error. */
static int put_large(struct pair *p, size_t size)
{
	_cleanup_(freep) char *text = malloc(size);
	int r = 1;

	memset(text, 'x', size);
	memcpy(text, "{\"s\":\"", 6);
	memcpy(text + size - 3, "\"}", 3);
	for (size_t sent = 0; sent < size && r == 1;) {
		ssize_t n = send(p->peer, text + sent, size - sent, MSG_NOSIGNAL);

		assert_true(n > 0);
		sent += (size_t)n;
		while (!connection_has_message(p->c) && (r = connection_read(p->c)) == 1)
			;
		if (r == -EAGAIN)
			r = 1;
	}
	return r;
}

static void messages_have_a_largest_size(void **state)
{
	static const size_t sizes[] = {
		4095, 4096, 4097, 65536, CONNECTION_MESSAGE_MAX - 1, CONNECTION_MESSAGE_MAX};
	struct pair *p = *state;
	json_object *o, *s;
	struct fds fds;

	for (size_t i = 0; i < ELEMENTS(sizes); i++) {
		assert_int_equal(put_large(p, sizes[i]), 1);
		assert_int_equal(connection_receive(p->c, &o, &fds), 1);
		assert_true(json_object_object_get_ex(o, "s", &s));
		assert_int_equal(json_object_get_string_len(s), sizes[i] - strlen("{'s':''}") - 1);
		json_object_put(o);
	}
	PUT(p, "{\"n\":1}");
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
	assert_int_equal(put_large(p, CONNECTION_MESSAGE_MAX + 1), -EMSGSIZE);
}

static void a_large_message_may_follow_a_small_one(void **state)
{
	struct pair *p = *state;
	json_object *o;
	struct fds fds;

	PUT(p, "{\"n\":1}");
	put_with(p, "{\"n\":2,", 7, 1);
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
	for (size_t i = 0; i < CONNECTION_MESSAGE_MAX - 100; i += 1000) {
		static char blanks[1000];

		memset(blanks, ' ', sizeof(blanks));
		put(p, blanks, i + 1000 < CONNECTION_MESSAGE_MAX - 100 ? 1000 : 1);
		assert_int_equal(connection_read(p->c), 1);
	}
	PUT(p, "\"m\":3}");
	PUT_WITH(p, "{\"n\":4}", 4);
	assert_int_equal(connection_read(p->c), 1);
	assert_int_equal(connection_receive(p->c, &o, &fds), 1);
	assert_int_equal(json_object_object_length(o), 2);
	json_object_put(o);
	assert_int_equal(fds.n_fds, 1);
	close(fds.fds[0]);
	if (!connection_has_message(p->c))
		assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 4, 4);
}

static void what_is_no_message_is_refused(void **state)
{
	static const struct {
		const char *text;
		size_t n;
	} bad[] = {
#define BAD(text) {text, sizeof(text)}
		BAD(""),
		BAD(" "),
		BAD("{"),
		BAD("}"),
		BAD("{} {}"),
		BAD("{}}"),
		BAD("{}x"),
		BAD("{} /* */"),
		BAD("{\"n\":1,}"),
		BAD("{\"n\"}"),
		BAD("{n:1}"),
		BAD("{\"n\":01}"),
		BAD("{\"n\":\"a\nb"),
		BAD("{\"n\":\"a\nb\"}"),
		BAD("{\"n\":\"\x1f\"}"),
		BAD("{\"\t\":1}"),
		BAD("{\"n\":\"\\\n\"}"),
		BAD("{\v\"n\":1}"),
		BAD("[]"),
		BAD("[{}]"),
		BAD("1"),
		BAD("\"{}\""),
		BAD("null"),
		BAD("true"),
		BAD("\xef\xbb\xbf{}"),
		BAD("{\"n\":\"\xff\"}"),
		BAD("{\"n\":\"\xc3\"}"),
		BAD("{\"n\":\"\xc3(\"}"),
		BAD("{\"n\":\"\x80\"}"),
		BAD("{\"\xe2\x82\":1}"),
		BAD("{\"n\":\"\xc0\xaf\"}"),
		BAD("{\"n\":\"\xed\xa0\xbd\xed\xb8\x80\"}"),
		BAD("{\"n\":\"\xf4\x90\x80\x80\"}"),
		BAD("{\"n\":\"\\\xc3\xa4\"}"),
		BAD("{\"n\":\"\\u00\xc3\xa4\"}"),
		BAD("{\xc3\xa4:1}"),
		BAD("{\"n\":\xc3\xa4}"),
		BAD("{\xc2\xa0\"n\":1}"),
		BAD("{\"n\":[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]}"),
		BAD("{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":"
		    "{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":{\"n\":1}}}}}}}}}}}}}}}}}"),
	};

	for (size_t i = 0; i < ELEMENTS(bad); i++) {
		json_object *o = NULL;
		struct fds fds;
		void *fresh;
		struct pair *p;
		int r;

		assert_int_equal(set_up(&fresh), 0);
		p = fresh;
		put_with(p, bad[i].text, bad[i].n, 1);
		assert_int_equal(connection_read(p->c), 1);
		assert_true(connection_has_message(p->c));
		r = connection_receive(p->c, &o, &fds);
		if (r != -EBADMSG)
			fail_msg("%d for %s", r, bad[i].text);
		assert_null(o);
		assert_int_equal(p->n_closed, 0);
		tear_down(&fresh);
	}
}

/* Whatever json-c's strict mode takes for a control character. */
static void text_beyond_ascii_is_taken(void **state)
{
	static const struct {
		const char *text, *key, *value;
	} good[] = {
		{"{\"n\":\"/\xc3\xa4\"}", "n", "/\xc3\xa4"},
		{"{\"\xc3\xa4\":\"\x7f\xc2\x80\"}", "\xc3\xa4", "\x7f\xc2\x80"},
		{"{\"\\\\\xdf\xbf\":\"\xe0\xa0\x80\"}", "\\\xdf\xbf", "\xe0\xa0\x80"},
		{"{\"n\":\"\xed\x9f\xbf\xee\x80\x80\"}", "n", "\xed\x9f\xbf\xee\x80\x80"},
		{"{\"n\":\"\xef\xbf\xbd\xf0\x90\x80\x80\"}", "n", "\xef\xbf\xbd\xf0\x90\x80\x80"},
		{"{\"n\":\"\xf4\x8f\xbf\xbd\"}", "n", "\xf4\x8f\xbf\xbd"},
		{"{\"n\":\"\\ud83d\\ude00\xf0\x9f\x98\x80\"}", "n",
			"\xf0\x9f\x98\x80\xf0\x9f\x98\x80"},
		{"{\t\"n\" :\n\"\\\"\xc3\xa4\\n\"\r}", "n", "\"\xc3\xa4\n"},
	};
	struct pair *p = *state;

	for (size_t i = 0; i < ELEMENTS(good); i++) {
		json_object *o = NULL, *value = NULL;
		struct fds fds;

		put(p, good[i].text, strlen(good[i].text) + 1);
		assert_int_equal(connection_read(p->c), 1);
		assert_int_equal(connection_receive(p->c, &o, &fds), 1);
		assert_true(json_object_object_get_ex(o, good[i].key, &value));
		assert_string_equal(json_object_get_string(value), good[i].value);
		json_object_put(o);
	}
}

static void depth_up_to_the_limit_is_taken(void **state)
{
	struct pair *p = *state;

	PUT(p, "{\"n\":1,\"m\":[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]}");
	assert_int_equal(connection_read(p->c), 1);
	expect_message(p, 1, 0);
}

/* A message of the largest size would otherwise make the process grow by 263 MiB. */
static void brackets_up_to_the_limit_are_taken(void **state)
{
	_cleanup_(freep) char *text = malloc(4 * CONNECTION_BRACKETS_MAX);
	struct pair *p = *state;
	json_object *o = NULL;
	struct fds fds;

	for (size_t n = CONNECTION_BRACKETS_MAX;; n++) {
		char *end = stpcpy(text, "{\"n\":1,\"m\":[0");

		for (size_t i = 2; i < n; i++)
			end = stpcpy(end, ",[]");
		strcpy(end, "]}");
		put(p, text, strlen(text) + 1);
		while (!connection_has_message(p->c))
			assert_int_equal(connection_read(p->c), 1);
		if (n > CONNECTION_BRACKETS_MAX)
			break;
		expect_message(p, 1, 0);
	}
	assert_int_equal(connection_receive(p->c, &o, &fds), -EBADMSG);
}

static void descriptors_never_handed_out_are_closed(void **state)
{
	struct pair *p = *state;
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	json_object *o = json_object_new_object();
	struct connection *c = p->c;
	int own = connection_get_fd(c);

	PUT(p, "{\"n\":1}");
	put_with(p, "{\"n\":2", 6, 5);
	assert_int_equal(connection_read(c), 1);
	assert_int_equal(connection_send(c, o, &fd, 1), 0);
	json_object_put(o);

	connection_free(c);
	assert_int_equal(p->n_closed, 7);
	assert_int_equal(p->last_closed, own);
	safe_close(p->peer);
	set_up((void **)&c);
	*state = c;
	((struct pair *)*state)->n_descriptors = p->n_descriptors;
	free(p);
}

static json_object *numbered(int n)
{
	json_object *o = json_object_new_object();

	json_object_object_add(o, "n", json_object_new_int(n));
	return o;
}

static void send_numbered(struct pair *p, int n, const int *fds, size_t n_fds)
{
	json_object *o = numbered(n);

	assert_int_equal(connection_send(p->c, o, fds, n_fds), 0);
	json_object_put(o);
}

/* One read of the peer: what it brings in bytes and in descriptors. */
static ssize_t peer_read(struct pair *p, char *bytes, size_t n, size_t *ret_fds)
{
	union {
		char bytes[CMSG_SPACE(CONNECTION_FDS_MAX * sizeof(int))];
		struct cmsghdr header;
	} control;
	struct iovec iov = {bytes, n};
	struct msghdr mh = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control)};
	ssize_t got = recvmsg(p->peer, &mh, MSG_CMSG_CLOEXEC);
	struct cmsghdr *cmsg = got >= 0 ? CMSG_FIRSTHDR(&mh) : NULL;

	*ret_fds = cmsg ? (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
	for (size_t i = 0; i < *ret_fds; i++)
		close(((int *)CMSG_DATA(cmsg))[i]);
	return got;
}

static void messages_with_descriptors_are_sent_alone(void **state)
{
	struct pair *p = *state;
	size_t before, n_fds;
	char bytes[1000];
	int fds[2];

	send_numbered(p, 1, NULL, 0);
	send_numbered(p, 2, NULL, 0);
	fds[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
	fds[1] = open("/dev/null", O_RDONLY | O_CLOEXEC);
	send_numbered(p, 3, fds, 2);
	send_numbered(p, 4, NULL, 0);
	send_numbered(p, 5, NULL, 0);
	assert_int_equal(connection_queued(p->c), 5 * sizeof("{\"n\":1}"));
	before = count_descriptors();
	assert_int_equal(connection_flush(p->c), 0);
	assert_int_equal(connection_queued(p->c), 0);
	assert_int_equal(count_descriptors(), before - 2);

	/* A read ends with the chunk that carries descriptors. */
	assert_int_equal(peer_read(p, bytes, sizeof(bytes), &n_fds), 3 * sizeof("{\"n\":1}"));
	assert_int_equal(n_fds, 2);
	assert_memory_equal(bytes, "{\"n\":1}\0{\"n\":2}\0{\"n\":3}", 3 * sizeof("{\"n\":1}"));
	assert_int_equal(peer_read(p, bytes, sizeof(bytes), &n_fds), 2 * sizeof("{\"n\":1}"));
	assert_int_equal(n_fds, 0);
	assert_memory_equal(bytes, "{\"n\":4}\0{\"n\":5}", 2 * sizeof("{\"n\":1}"));
}

/* Everything that fills a socket is sent in the end, whole and in order, each with its descriptors.
 */
static void what_the_socket_does_not_take_waits(void **state)
{
	enum { MESSAGES = 20000 };
	struct pair *p = *state;
	struct connection *other;
	int n = 0, r, fd;

	assert_int_equal(connection_new(p->peer, NULL, NULL, &other), 0);
	p->peer = -1;
	for (int i = 0; i < MESSAGES; i++) {
		fd = i % 100 == 7 ? open("/dev/null", O_RDONLY | O_CLOEXEC) : -1;
		send_numbered(p, i, &fd, fd >= 0);
	}
	assert_int_equal(connection_flush(p->c), 1);
	assert_true(connection_queued(p->c) > 0);
	for (bool blocked = true; blocked || n < MESSAGES;) {
		struct pair receiver = {.c = other};

		r = connection_flush(p->c);
		assert_true(r >= 0);
		blocked = r == 1;
		assert_int_equal(connection_read(other), 1);
		for (; connection_has_message(other); n++)
			expect_message(&receiver, n, n % 100 == 7);
	}
	assert_int_equal(n, MESSAGES);
	connection_free(other);
}

static void a_large_message_with_descriptors_arrives(void **state)
{
	_cleanup_(freep) char *text = calloc(1, CONNECTION_MESSAGE_MAX);
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC), r;
	json_object *o = json_object_new_object();
	struct pair *p = *state;
	struct connection *other;
	struct fds fds;

	memset(text, 'x', CONNECTION_MESSAGE_MAX - 100);
	json_object_object_add(o, "s", json_object_new_string(text));
	assert_int_equal(connection_new(p->peer, NULL, NULL, &other), 0);
	p->peer = -1;
	send_numbered(p, 1, NULL, 0);
	assert_int_equal(connection_send(p->c, o, &fd, 1), 0);
	send_numbered(p, 2, NULL, 0);
	json_object_put(o);
	do {
		r = connection_flush(p->c);
		assert_true(r >= 0);
		while (!connection_has_message(other) && connection_read(other) == 1)
			;
		if (connection_has_message(other) && connection_queued(p->c) > 1000)
			expect_message(&(struct pair){.c = other}, 1, 0);
	} while (r == 1);
	assert_int_equal(connection_receive(other, &o, &fds), 1);
	assert_true(json_object_object_get_ex(o, "s", NULL));
	json_object_put(o);
	assert_int_equal(fds.n_fds, 1);
	close(fds.fds[0]);
	if (!connection_has_message(other))
		assert_int_equal(connection_read(other), 1);
	expect_message(&(struct pair){.c = other}, 2, 0);
	connection_free(other);
}

static void output_is_limited(void **state)
{
	_cleanup_(freep) char *text = calloc(1, CONNECTION_MESSAGE_MAX);
	json_object *o = json_object_new_object(), *empty = json_object_new_object();
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC), fds[CONNECTION_FDS_MAX + 1] = {};
	struct pair *p = *state;

	/* With the other bytes of it, 32 of them are all that fits. */
	memset(text, 'x', CONNECTION_MESSAGE_MAX - sizeof("{\"s\":\"\"}"));
	json_object_object_add(o, "s", json_object_new_string(text));
	for (int i = 0; i < 32; i++)
		assert_int_equal(connection_send(p->c, o, NULL, 0), 0);
	assert_int_equal(connection_queued(p->c), CONNECTION_OUTPUT_MAX);
	assert_int_equal(connection_send(p->c, empty, &fd, 1), -ENOBUFS);
	/* Not taken over. */
	assert_int_equal(close(fd), 0);
	assert_int_equal(connection_send(p->c, empty, fds, ELEMENTS(fds)), -EINVAL);
	json_object_put(o);
	json_object_put(empty);
}

static void a_gone_peer_is_an_error_not_a_signal(void **state)
{
	struct pair *p = *state;

	p->peer = safe_close(p->peer);
	send_numbered(p, 1, NULL, 0);
	assert_int_equal(connection_flush(p->c), -EPIPE);
}

static void no_connection_is_freed(void **state)
{
	struct pair *p = *state;

	assert_null(connection_free(NULL));
	expect_none(p);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
	static const struct CMUnitTest tests[] = {
		TEST(merged_messages_come_apart),
		TEST(bytes_come_one_by_one),
		TEST(end_of_stream),
		TEST(descriptors_belong_to_the_last_message_begun),
		TEST(a_message_in_parts_keeps_its_descriptors),
		TEST(descriptors_in_a_continuation_are_refused),
		TEST(too_many_descriptors_are_refused),
		TEST(lost_descriptors_are_noticed),
		TEST(descriptors_can_be_left_alone),
		TEST(bytes_are_charged),
		TEST(messages_have_a_largest_size),
		TEST(a_large_message_may_follow_a_small_one),
		TEST(what_is_no_message_is_refused),
		TEST(text_beyond_ascii_is_taken),
		TEST(depth_up_to_the_limit_is_taken),
		TEST(brackets_up_to_the_limit_are_taken),
		TEST(descriptors_never_handed_out_are_closed),
		TEST(messages_with_descriptors_are_sent_alone),
		TEST(what_the_socket_does_not_take_waits),
		TEST(a_large_message_with_descriptors_arrives),
		TEST(output_is_limited),
		TEST(a_gone_peer_is_an_error_not_a_signal),
		TEST(no_connection_is_freed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
