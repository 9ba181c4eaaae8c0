/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <pinbroker.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>

static uint64_t pin; /* 0: let go of */

static int fail(pinbroker *pb, const char *what)
{
	const struct pinbroker_error *e = pinbroker_last_error(pb);

	fprintf(stderr, "%s: %s\n", what, e->message);
	return EXIT_FAILURE;
}

static void on_revoke(pinbroker *pb,
	const struct pinbroker_notice *notice, void *userdata)
{
	printf("%s is wanted: %s\n", notice->path,
		pinbroker_cause_name(notice->cause));
	/* Here the memory is deregistered from the hardware: before the
	 * unpin, as the proof of this context is "claimed". */
	if (pin != 0 && pinbroker_unpin(pb, &pin, 1, NULL, NULL) >= 0)
		pin = 0;
}

int main(int argc, char *argv[])
{
	struct pinbroker_range range = {.offset = 0, .length = 4096};
	pinbroker_context *context;
	pinbroker_file *file;
	struct pollfd pfd = {.events = POLLIN};
	pinbroker *pb;

	if (argc != 2) {
		fprintf(stderr, "usage: %s FILE\n", argv[0]);
		return EXIT_FAILURE;
	}
	if (pinbroker_new("example", NULL, &pb) < 0)
		return EXIT_FAILURE;
	pinbroker_set_revoke_callback(pb, on_revoke, NULL);
	if (pinbroker_connect(pb) < 0)
		return fail(pb, "Cannot connect");
	if (pinbroker_open_file(pb, argv[1], PINBROKER_WRITE, &file) < 0)
		return fail(pb, "Cannot begin");

	/* An eventfd stands for what holds the pins. */
	if (pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), "example",
			&context) < 0)
		return fail(pb, "Cannot hand over the context");

	if (pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE,
			NULL, &pin) < 0)
		return fail(pb, "Cannot pin");
	/* Here the range of pinbroker_file_get_fd(file) is mapped, and
	 * registered with the hardware, which tells a handle. */
	if (pinbroker_bind(pb, pin, 0) < 0)
		return fail(pb, "Cannot bind the pin");
	printf("pin %" PRIu64 " of %s\n", pin, argv[1]);
	fflush(stdout);

	pfd.fd = pinbroker_get_fd(pb);
	while (pin != 0)
		if (poll(&pfd, 1, -1) > 0 && pinbroker_dispatch(pb) < 0)
			return fail(pb, "Cannot go on");

	if (pinbroker_remove_context(context) < 0 ||
		pinbroker_close_file(file) < 0)
		return fail(pb, "Cannot clean up");
	pinbroker_unref(pb);
	return EXIT_SUCCESS;
}
