/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A minimal holder: keeps the whole of a file pinned as a fixed buffer of an io_uring, lets go when
 * somebody wants the pages, and pins again what is left of the file afterwards.
 *
 *     cc holder.c $(pkg-config --cflags --libs libpinbroker liburing)
 *     ./a.out /dev/shm/data & python3 -c 'import os; os.truncate("/dev/shm/data", 4096)'
 */

#include <errno.h>
#include <inttypes.h>
#include <liburing.h>
#include <pinbroker.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define RETRY_MSEC 100

static pinbroker *pb;
static pinbroker_file *file;
static pinbroker_context *context;
static struct io_uring ring;

static uint64_t pin; /* 0: none */
static void *map;
static size_t size;

static volatile sig_atomic_t stopping;

static void on_signal(int sig)
{
	stopping = 1;
}

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, pinbroker_last_error(pb)->message);
	exit(EXIT_FAILURE);
}

static void let_go(void)
{
	if (pin == 0)
		return;
	/* An io_uring's proof is "claimed": first the buffer goes, then Unpin says that it has
	 * gone. Where the proof is "provable" (RDMA) it is the other way round. */
	io_uring_unregister_buffers(&ring);
	munmap(map, size);
	if (pinbroker_unpin(pb, &pin, 1, NULL, NULL) < 0)
		die("Cannot let go of the pin");
	printf("let go of pin %" PRIu64 "\n", pin);
	pin = 0;
}

/* pinbroker_dispatch() calls this. If it cannot be done at once (requests that use the buffer have
 * to end first), it may be done later, but before notice->deadline_usec. */
static void on_revoke(pinbroker *p, const struct pinbroker_notice *notice, void *userdata)
{
	printf("%s of %s, by %s (pid %d)\n", pinbroker_cause_name(notice->cause), notice->path,
		notice->comm ? notice->comm : "somebody", (int)notice->pid);
	/* We have one pin; a program with many looks which are in notice->pins. */
	let_go();
}

/* Registers what has been reserved, and says so. */
static int register_buffer(void)
{
	struct iovec iov;
	int r;

	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	if (map == MAP_FAILED)
		return -errno;
	iov = (struct iovec){map, size};
	r = io_uring_register_buffers(&ring, &iov, 1);
	if (r < 0)
		munmap(map, size);
	else
		r = pinbroker_bind(pb, pin, 0);
	/* A revocation came between Pin and Bind: its notice is on the way, and let_go() will do.
	 */
	return r == -ESTALE ? 0 : r;
}

/* Returns whether to try again later. */
static int take_hold(void)
{
	struct pinbroker_range range = {0};
	struct stat st;
	int r;

	if (fstat(pinbroker_file_get_fd(file), &st) < 0 || st.st_size == 0)
		return 1;
	range.length = size = (size_t)st.st_size;
	r = pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, "example", &pin);
	/* The truncate has not gone through yet, or the lease could not be taken again yet, or the
	 * file was shortened between the fstat() and here. */
	if (r == -EAGAIN || r == -EBUSY || r == -ERANGE || r == -ESTALE)
		return 1;
	if (r < 0)
		die("Cannot pin the file");
	r = register_buffer();
	if (r < 0) {
		fprintf(stderr, "Cannot register the file with the io_uring: error %d\n", -r);
		exit(EXIT_FAILURE);
	}
	printf("holding %zu bytes with pin %" PRIu64 "\n", size, pin);
	return 0;
}

static void run(void)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(pb), .events = POLLIN};

	while (!stopping) {
		int again = pin == 0 && take_hold();

		if (poll(&pfd, 1, again ? RETRY_MSEC : -1) > 0 && pinbroker_dispatch(pb) < 0)
			die("Cannot go on");
	}
}

int main(int argc, char *argv[])
{
	struct sigaction sa = {.sa_handler = on_signal};

	if (argc != 2) {
		fprintf(stderr, "holder FILE\n");
		return EXIT_FAILURE;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);

	if (pinbroker_new("example holder", NULL, &pb) < 0)
		return EXIT_FAILURE;
	pinbroker_set_revoke_callback(pb, on_revoke, NULL);
	if (pinbroker_connect(pb) < 0)
		die("Cannot connect");
	if (pinbroker_open_file(pb, argv[1], PINBROKER_WRITE, &file) < 0)
		die("Cannot open the file");
	if (io_uring_queue_init(8, &ring, 0) < 0)
		return EXIT_FAILURE;
	/* An io_uring cannot be sent over a socket, so the broker fetches it. */
	if (pinbroker_add_context_remote(pb, ring.ring_fd, NULL, &context) < 0)
		die("Cannot hand over the io_uring");

	run();

	let_go();
	if (pinbroker_remove_context(context) < 0 || pinbroker_close_file(file) < 0)
		die("Cannot clean up");
	io_uring_queue_exit(&ring);
	pinbroker_unref(pb);
	return EXIT_SUCCESS;
}
