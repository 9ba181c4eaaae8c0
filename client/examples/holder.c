/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A minimal holder: keeps the whole of a file pinned as a fixed buffer of an io_uring, and lets go
 * when somebody wants the pages.
 *
 *     cc holder.c $(pkg-config --cflags --libs libpinbroker liburing)
 *     ./a.out /dev/shm/data & python3 -c 'import os; os.truncate("/dev/shm/data", 4096)'
 */

#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <liburing.h>
#include <pinbroker.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

struct holder {
	pinbroker *pb;
	pinbroker_file *file;
	pinbroker_context *context;
	struct io_uring ring;
	void *map;
	size_t size;
	uint64_t pin; /* 0: none */
};

/* For the library's calls: it has a sentence for each failure. */
static void check(struct holder *h, int r)
{
	if (r < 0)
		errx(1, "%s", pinbroker_last_error(h->pb)->message);
}

static void hold(struct holder *h)
{
	struct pinbroker_range range = {0};
	struct iovec iov;
	struct stat st;
	int r;

	if (fstat(pinbroker_file_get_fd(h->file), &st) < 0)
		err(1, "fstat");
	if (st.st_size == 0)
		errx(1, "The file is empty.");
	h->size = range.length = (size_t)st.st_size;

	/* First the reservation, then the hardware, then the hardware's name for it. */
	check(h, pinbroker_pin(h->pb, h->file, h->context, &range, 1, PINBROKER_WRITE, "example",
			 &h->pin));
	h->map = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_SHARED,
		pinbroker_file_get_fd(h->file), 0);
	if (h->map == MAP_FAILED)
		err(1, "mmap");
	iov.iov_base = h->map;
	iov.iov_len = h->size;
	r = io_uring_register_buffers(&h->ring, &iov, 1);
	if (r < 0)
		errx(1, "io_uring_register_buffers: %s; see pinbrokerctl preflight", strerror(-r));
	r = pinbroker_bind(h->pb, h->pin, 0);
	/* Ended by force already, if this took very long: the notice of it is on the way. */
	if (r != -ESTALE)
		check(h, r);
	printf("holding %zu bytes with pin %" PRIu64 "\n", h->size, h->pin);
}

/* An io_uring's proof is "claimed": first the buffer goes, then pinbroker_unpin() says that it has
 * gone. Where the proof is "provable" it is the other way round. */
static void let_go(struct holder *h)
{
	io_uring_unregister_buffers(&h->ring);
	munmap(h->map, h->size);
	check(h, pinbroker_unpin(h->pb, &h->pin, 1, NULL, NULL));
	printf("let go of pin %" PRIu64 "\n", h->pin);
	h->pin = 0;
}

/* pinbroker_dispatch() calls this. A program with more than one pin looks in notice->pins which to
 * let go of. It need not happen in here, but before notice->deadline_usec. */
static void on_revoke(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	struct holder *h = userdata;

	printf("%s of %s, by %s\n", pinbroker_cause_name(notice->cause), notice->path,
		notice->comm ? notice->comm : "somebody");
	if (h->pin != 0)
		let_go(h);
}

static void serve(struct holder *h)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(h->pb), .events = POLLIN};

	while (h->pin != 0) {
		if (poll(&pfd, 1, -1) < 0 && errno != EINTR)
			err(1, "poll");
		/* If the broker has forgotten us, this fails; the end of the process lets go. */
		check(h, pinbroker_dispatch(h->pb));
	}
}

int main(int argc, char *argv[])
{
	struct holder h = {0};
	int r;

	if (argc != 2)
		errx(64, "usage: %s FILE", argv[0]);
	setvbuf(stdout, NULL, _IOLBF, 0);

	r = pinbroker_new("example holder", NULL, &h.pb);
	if (r < 0)
		errx(1, "pinbroker_new: %s", strerror(-r));
	check(&h, pinbroker_set_revoke_callback(h.pb, on_revoke, &h));
	check(&h, pinbroker_connect(h.pb));
	check(&h, pinbroker_open_file(h.pb, argv[1], PINBROKER_WRITE, &h.file));
	r = io_uring_queue_init(8, &h.ring, 0);
	if (r < 0)
		errx(1, "io_uring_queue_init: %s", strerror(-r));
	/* An io_uring cannot be sent over a socket, so the broker fetches it. */
	check(&h, pinbroker_add_context_remote(h.pb, h.ring.ring_fd, NULL, &h.context));

	hold(&h);
	serve(&h);

	/* Before the ring is closed: the broker's copy would keep it. */
	check(&h, pinbroker_remove_context(h.context));
	check(&h, pinbroker_close_file(h.file));
	io_uring_queue_exit(&h.ring);
	pinbroker_unref(h.pb);
	return 0;
}
