/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * A holder with a loop of its own: an io_uring stores what comes from standard input in the memory
 * of a file, while epoll waits for the ring, the broker and signals alike. When somebody wants the
 * pages, the request that uses them is cancelled, and the pin goes once it has ended.
 *
 *     cc epoll.c $(pkg-config --cflags --libs libpinbroker liburing)
 *     cat | ./a.out /dev/shm/data
 */

#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <liburing.h>
#include <pinbroker.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

enum event { EVENT_BROKER, EVENT_RING, EVENT_SIGNAL };
enum request { REQUEST_READ = 1, REQUEST_CANCEL };

struct capture {
	pinbroker *pb;
	pinbroker_file *file;
	pinbroker_context *context;
	struct io_uring ring;
	char *map;
	size_t size, at;
	uint64_t pin;  /* 0: none */
	bool reading;  /* a request uses the memory */
	bool stopping; /* there shall be no further one */
};

static void check(struct capture *c, int r)
{
	if (r < 0)
		errx(1, "%s", pinbroker_last_error(c->pb)->message);
}

static void check_ring(const char *what, int r)
{
	if (r < 0)
		errx(1, "%s: %s", what, strerror(-r));
}

static void hold(struct capture *c)
{
	struct pinbroker_range range = {0};
	struct iovec iov;
	struct stat st;
	int r;

	if (fstat(pinbroker_file_get_fd(c->file), &st) < 0)
		err(1, "fstat");
	if (st.st_size == 0)
		errx(1, "The file is empty.");
	c->size = range.length = (size_t)st.st_size;
	check(c, pinbroker_pin(c->pb, c->file, c->context, &range, 1, PINBROKER_WRITE, "example",
			 &c->pin));
	c->map = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_SHARED,
		pinbroker_file_get_fd(c->file), 0);
	if (c->map == MAP_FAILED)
		err(1, "mmap");
	iov.iov_base = c->map;
	iov.iov_len = c->size;
	check_ring("io_uring_register_buffers (see pinbrokerctl preflight)",
		io_uring_register_buffers(&c->ring, &iov, 1));
	r = pinbroker_bind(c->pb, c->pin, 0);
	/* Ended by force already, if this took very long: the notice of it is on the way. */
	if (r != -ESTALE)
		check(c, r);
	printf("holding %zu bytes with pin %" PRIu64 "\n", c->size, c->pin);
}

/* The queue has room: there is one read at a time, and one cancel for it. */
static void submit_read(struct capture *c)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&c->ring);

	io_uring_prep_read_fixed(
		sqe, STDIN_FILENO, c->map + c->at, (unsigned)(c->size - c->at), (__u64)-1, 0);
	io_uring_sqe_set_data64(sqe, REQUEST_READ);
	check_ring("io_uring_submit", io_uring_submit(&c->ring));
	c->reading = true;
}

static void submit_cancel(struct capture *c)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&c->ring);

	io_uring_prep_cancel64(sqe, REQUEST_READ, 0);
	io_uring_sqe_set_data64(sqe, REQUEST_CANCEL);
	check_ring("io_uring_submit", io_uring_submit(&c->ring));
}

/* Only what does not use the memory any more may go. */
static void let_go(struct capture *c)
{
	check_ring("io_uring_unregister_buffers", io_uring_unregister_buffers(&c->ring));
	munmap(c->map, c->size);
	check(c, pinbroker_unpin(c->pb, &c->pin, 1, NULL, NULL));
	printf("let go of pin %" PRIu64 "\n", c->pin);
	c->pin = 0;
}

static void stop(struct capture *c)
{
	if (c->stopping)
		return;
	c->stopping = true;
	if (c->reading)
		submit_cancel(c);
}

static void on_read(struct capture *c, int res)
{
	c->reading = false;
	if (res > 0) {
		printf("stored %d bytes at %zu\n", res, c->at);
		c->at += (size_t)res;
	} else if (res != -EINTR && res != -ECANCELED) {
		check_ring("read", res);
		c->stopping = true; /* the end of the input */
	}
	if (c->at == c->size)
		c->stopping = true;
}

static void on_ring(struct capture *c, int event_fd)
{
	struct io_uring_cqe *cqe;
	eventfd_t n;

	eventfd_read(event_fd, &n);
	while (io_uring_peek_cqe(&c->ring, &cqe) == 0) {
		uint64_t request = io_uring_cqe_get_data64(cqe);
		int res = cqe->res;

		io_uring_cqe_seen(&c->ring, cqe);
		if (request == REQUEST_READ)
			on_read(c, res);
	}
}

/* The request may take until notice->deadline_usec to end. If that is too little, more can be asked
 * for with pinbroker_extend(), but the kernel's lease-break-time is the limit. */
static void on_revoke(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	if (!notice->update)
		printf("%s of %s\n", pinbroker_cause_name(notice->cause), notice->path);
	stop(userdata);
}

static void watch(int epoll_fd, int fd, enum event event)
{
	struct epoll_event e = {.events = EPOLLIN, .data.u32 = event};

	if (fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e) < 0)
		err(1, "epoll_ctl");
}

static void serve(struct capture *c, int epoll_fd, int event_fd)
{
	struct epoll_event e;

	for (;;) {
		if (!c->reading && c->stopping)
			return;
		if (!c->reading)
			submit_read(c);
		if (epoll_wait(epoll_fd, &e, 1, -1) < 1) {
			if (errno != EINTR)
				err(1, "epoll_wait");
			continue;
		}
		if (e.data.u32 == EVENT_BROKER)
			check(c, pinbroker_dispatch(c->pb));
		else if (e.data.u32 == EVENT_RING)
			on_ring(c, event_fd);
		else
			stop(c);
	}
}

int main(int argc, char *argv[])
{
	int epoll_fd, event_fd, signal_fd, r;
	struct capture c = {0};
	sigset_t signals;

	if (argc != 2)
		errx(64, "usage: %s FILE", argv[0]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);

	r = pinbroker_new("example capture", NULL, &c.pb);
	if (r < 0)
		errx(1, "pinbroker_new: %s", strerror(-r));
	check(&c, pinbroker_set_revoke_callback(c.pb, on_revoke, &c));
	check(&c, pinbroker_connect(c.pb));
	check(&c, pinbroker_open_file(c.pb, argv[1], PINBROKER_WRITE, &c.file));
	check_ring("io_uring_queue_init", io_uring_queue_init(8, &c.ring, 0));
	check(&c, pinbroker_add_context_remote(c.pb, c.ring.ring_fd, NULL, &c.context));

	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC);
	watch(epoll_fd, pinbroker_get_fd(c.pb), EVENT_BROKER);
	watch(epoll_fd, event_fd, EVENT_RING);
	watch(epoll_fd, signal_fd, EVENT_SIGNAL);
	check_ring("io_uring_register_eventfd", io_uring_register_eventfd(&c.ring, event_fd));

	hold(&c);
	serve(&c, epoll_fd, event_fd);
	let_go(&c);

	check(&c, pinbroker_remove_context(c.context));
	check(&c, pinbroker_close_file(c.file));
	io_uring_queue_exit(&c.ring);
	pinbroker_unref(c.pb);
	close(signal_fd);
	close(event_fd);
	close(epoll_fd);
	return 0;
}
