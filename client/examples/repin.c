/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Keeps whatever there is of a file pinned as a fixed buffer of an io_uring: lets go when somebody
 * wants the pages, and pins again what the file has become, also if it was empty or away for a
 * time. SIGINT or SIGTERM ends it.
 *
 *     cc repin.c $(pkg-config --cflags --libs libpinbroker liburing)
 *     ./a.out /dev/shm/data & python3 -c 'import os; os.truncate("/dev/shm/data", 4096)'
 */

#define _GNU_SOURCE 1 /* ppoll() */
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <liburing.h>
#include <pinbroker.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

struct holder {
	const char *path;
	pinbroker *pb;
	pinbroker_context *context;
	struct io_uring ring;
	pinbroker_file *file; /* NULL: not open */
	void *map;            /* NULL: not mapped */
	size_t size;
	uint64_t pin; /* 0: none */
	bool told;    /* that the file is empty */
};

static volatile sig_atomic_t stopping;

static void on_signal(int sig)
{
	stopping = 1;
}

static void check(struct holder *h, int r)
{
	if (r < 0)
		errx(1, "%s", pinbroker_last_error(h->pb)->message);
}

/* Busy, being revoked, shorter than a moment ago, or gone and perhaps to come again. */
static bool is_passing(int r)
{
	return r == -EBUSY || r == -EAGAIN || r == -ESTALE || r == -ERANGE || r == -ENOENT;
}

/* Undoes what there is of it. The path may name another file by the next time. */
static void let_go(struct holder *h)
{
	/* With a proof that is "claimed" the buffer goes first, as in holder.c. */
	if (h->map) {
		io_uring_unregister_buffers(&h->ring);
		munmap(h->map, h->size);
		h->map = NULL;
	}
	if (h->pin != 0) {
		check(h, pinbroker_unpin(h->pb, &h->pin, 1, NULL, NULL));
		printf("let go of pin %" PRIu64 "\n", h->pin);
		h->pin = 0;
	}
	if (h->file) {
		check(h, pinbroker_close_file(h->file));
		h->file = NULL;
	}
}

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	struct holder *h = userdata;

	for (size_t i = 0; i < notice->n_pins; i++)
		if (notice->pins[i] == h->pin)
			let_go(h);
}

static void register_buffer(struct holder *h)
{
	struct iovec iov;
	int r;

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
}

/* Returns a negative errno of those that pass. */
static int pin_file(struct holder *h)
{
	struct pinbroker_range range = {0};
	struct stat st;
	int r;

	r = pinbroker_open_file(h->pb, h->path, PINBROKER_WRITE, &h->file);
	if (r < 0)
		return r;
	if (fstat(pinbroker_file_get_fd(h->file), &st) < 0)
		err(1, "fstat");
	if (st.st_size == 0)
		return -ERANGE;
	h->size = range.length = (size_t)st.st_size;
	/* From here on the file cannot become shorter without a notice. */
	return pinbroker_pin(
		h->pb, h->file, h->context, &range, 1, PINBROKER_WRITE, "example", &h->pin);
}

/* Returns whether the file is pinned now. */
static bool take_hold(struct holder *h)
{
	int r;

	r = pin_file(h);
	if (r < 0) {
		if (!is_passing(r))
			check(h, r);
		if (!h->told)
			printf("waiting\n");
		h->told = true;
		let_go(h);
		return false;
	}
	register_buffer(h);
	printf("holding %zu bytes with pin %" PRIu64 "\n", h->size, h->pin);
	h->told = false;
	return true;
}

static void serve(struct holder *h, const sigset_t *mask)
{
	static const struct timespec moment = {.tv_nsec = 100 * 1000 * 1000};
	struct pollfd pfd = {.fd = pinbroker_get_fd(h->pb), .events = POLLIN};

	while (!stopping) {
		bool held = h->pin != 0 || take_hold(h);

		/* Signals come in here only. */
		if (ppoll(&pfd, 1, held ? NULL : &moment, mask) < 0 && errno != EINTR)
			err(1, "ppoll");
		check(h, pinbroker_dispatch(h->pb));
	}
	let_go(h);
}

int main(int argc, char *argv[])
{
	struct sigaction sa = {.sa_handler = on_signal};
	struct holder h = {0};
	sigset_t stop, mask;
	int r;

	if (argc != 2)
		errx(64, "usage: %s FILE", argv[0]);
	h.path = argv[1];
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigemptyset(&stop);
	sigaddset(&stop, SIGINT);
	sigaddset(&stop, SIGTERM);
	sigprocmask(SIG_BLOCK, &stop, &mask);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);

	r = pinbroker_new("example re-pinner", NULL, &h.pb);
	if (r < 0)
		errx(1, "pinbroker_new: %s", strerror(-r));
	check(&h, pinbroker_set_revoke_callback(h.pb, on_revoke, &h));
	check(&h, pinbroker_connect(h.pb));
	r = io_uring_queue_init(8, &h.ring, 0);
	if (r < 0)
		errx(1, "io_uring_queue_init: %s", strerror(-r));
	check(&h, pinbroker_add_context_remote(h.pb, h.ring.ring_fd, NULL, &h.context));

	serve(&h, &mask);

	check(&h, pinbroker_remove_context(h.context));
	io_uring_queue_exit(&h.ring);
	pinbroker_unref(h.pb);
	return 0;
}
