/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

/*
 * How long a request takes, against a bare server that takes and sends messages of the same sizes over
 * the same kind of socket, and closes the descriptor that came.
 */

#define CALLS 2000
#define CONTEXTS 200 /* at a time; MaxContextsPerUser= is 256 */
#define AIM   1.6

static const char preflight[] = "{\"method\":\"org.pinbroker.Preflight\",\"parameters\":"
				"{\"fileDescriptor\":0,\"access\":\"read\"}}";

static void bare_server(int s, void *userdata)
{
	size_t reply_size = *(size_t *)userdata;
	static char buffer[65536];
	char reply[65536];

	memset(reply, 'x', sizeof(reply));
	reply[reply_size - 1] = 0;
	while (receive_message(s, buffer, sizeof(buffer)) > 0)
		assert_true(send_with_fd(s, reply, reply_size, -1));
}

static double bare_calls(int s, const char *text, int fd, unsigned n)
{
	uint64_t begin = nsec_now();

	for (unsigned i = 0; i < n; i++)
		(void)call(s, text, fd);
	return (double)(nsec_now() - begin) / 1e3 / n;
}

static pid_t bare(size_t reply_size, int *ret_fd)
{
	return serve(bare_server, &reply_size, ret_fd);
}

/* Bind: without a descriptor, and answered at once. */
static void bench_plain(pinbroker *pb, pinbroker_file *file, pinbroker_context *context)
{
	static const struct pinbroker_range range = { 0, PAGE };
	struct series library = {}, raw = {}, floor = {};
	char text[128];
	uint64_t pin;
	int s, fd;
	pid_t pid;
	long id;

	assert_int_equal(pinbroker_pin(pb, file, context, &range, 1, PINBROKER_READ, NULL, &pin), 0);
	s = dial();
	(void)call(s, "{\"method\":\"org.pinbroker.Hello\",\"parameters\":{}}", -1);
	fd = open(file_path, O_PATH | O_CLOEXEC);
	id = reply_number(call(s,
			       "{\"method\":\"org.pinbroker.OpenFile\",\"parameters\":"
			       "{\"fileDescriptor\":0,\"access\":\"read\"}}",
			       fd),
			  "file");
	close(fd);
	fd = eventfd(0, EFD_CLOEXEC);
	snprintf(text, sizeof(text),
		 "{\"method\":\"org.pinbroker.Pin\",\"parameters\":{\"file\":%ld,\"context\":%ld,"
		 "\"ranges\":[{\"offset\":0,\"length\":4096}],\"access\":\"read\"}}",
		 id,
		 reply_number(call(s,
				   "{\"method\":\"org.pinbroker.AddContext\",\"parameters\":"
				   "{\"fileDescriptor\":0}}",
				   fd),
			      "context"));
	close(fd);
	id = reply_number(call(s, text, -1), "pins");
	snprintf(text, sizeof(text),
		 "{\"method\":\"org.pinbroker.Bind\",\"parameters\":{\"pin\":%ld,\"handle\":7}}", id);
	pid = bare(strlen(call(s, text, -1)) + 1, &fd);
	for (unsigned round = 0; round < n_rounds; round++) {
		uint64_t begin;

		series_add(&floor, bare_calls(fd, text, -1, CALLS));
		series_add(&raw, bare_calls(s, text, -1, CALLS));
		begin = nsec_now();
		for (unsigned i = 0; i < CALLS; i++)
			assert_int_equal(pinbroker_bind(pb, pin, 7), 0);
		series_add(&library, (double)(nsec_now() - begin) / 1e3 / CALLS);
	}
	report_against("request", &raw, "request-floor", &floor, AIM);
	report_against("request-by-library", &library, "request-floor", &floor, 0);
	close(fd);
	close(s);
	finish(pid, 0);
	assert_int_equal(pinbroker_unpin(pb, &pin, 1, NULL, NULL), 0);
}

static void remove_contexts(int s, const long *ids, size_t n)
{
	char text[128];
	int fd;

	for (size_t i = 0; i < n; i++) {
		snprintf(text, sizeof(text),
			 "{\"method\":\"org.pinbroker.RemoveContext\",\"parameters\":{\"context\":%ld}}",
			 ids[i]);
		(void)call(s, text, -1);
	}
	/* It stands behind the closes of the descriptors, which the pool does. */
	fd = open(file_path, O_PATH | O_CLOEXEC);
	(void)call(s, preflight, fd);
	close(fd);
}

/* AddContext: its descriptor is looked at, and kept. */
static void bench_descriptor(const char *name, int sent)
{
	static const char add[] = "{\"method\":\"org.pinbroker.AddContext\",\"parameters\":"
				  "{\"fileDescriptor\":0}}";
	struct series raw = {}, floor = {};
	int s = dial(), fd;
	char floor_name[64];
	long ids[CONTEXTS];
	const char *reply;
	pid_t pid;

	(void)call(s, "{\"method\":\"org.pinbroker.Hello\",\"parameters\":{}}", -1);
	reply = call(s, add, sent);
	ids[0] = reply_number(reply, "context");
	pid = bare(strlen(reply) + 1, &fd);
	remove_contexts(s, ids, 1);
	for (unsigned round = 0; round < n_rounds; round++) {
		uint64_t nsec = 0;

		series_add(&floor, bare_calls(fd, add, sent, CALLS));
		for (unsigned i = 0; i < CALLS / CONTEXTS; i++) {
			uint64_t begin = nsec_now();

			for (unsigned k = 0; k < CONTEXTS; k++)
				ids[k] = reply_number(call(s, add, sent), "context");
			nsec += nsec_now() - begin;
			remove_contexts(s, ids, CONTEXTS);
		}
		series_add(&raw, (double)nsec / 1e3 / CALLS);
	}
	snprintf(floor_name, sizeof(floor_name), "%s-floor", name);
	report_against(name, &raw, floor_name, &floor, AIM);
	close(fd);
	close(sent);
	close(s);
	finish(pid, 0);
}

int main(int argc, char *argv[])
{
	pinbroker_context *context;
	pinbroker_file *file;
	pinbroker *pb;

	bench_start(argc, argv, 25);
	world_start("");
	mount_fs("tmpfs");
	make_file();
	assert_int_equal(pinbroker_new("bench", socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_open_file(pb, file_path, PINBROKER_READ, &file), 0);
	assert_int_equal(pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &context), 0);
	bench_plain(pb, file, context);
	bench_descriptor("request-with-socket", socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0));
	bench_descriptor("request-with-descriptor", eventfd(0, EFD_CLOEXEC));
	pinbroker_context_free(context);
	pinbroker_file_free(file);
	pinbroker_unref(pb);
	world_stop();
	return 0;
}
