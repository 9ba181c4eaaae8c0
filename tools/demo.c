/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/pinbroker.h"

/*
 * The main job, told twice: a truncate under pinned pages without the broker and with it. What it claims
 * it has checked, and exits with 1 otherwise; with 2 if it could not be checked.
 */

#define NOT_AS_CLAIMED 1
#define CANNOT_TELL    2

#define PAGE      4096
#define PAGES     4096
#define SIZE      ((size_t)PAGES * PAGE)
#define HOLD_MSEC 300 /* that the holder takes its time, to be seen */

static const char text[] = "written by the hardware";
static const char *file;
static uint64_t begin;

static uint64_t usec_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

__attribute__((format(printf, 2, 3))) static void say(const char *who, const char *format, ...)
{
	char line[300];
	va_list ap;

	va_start(ap, format);
	vsnprintf(line, sizeof(line), format, ap);
	va_end(ap);
	printf("%8.1f ms  %-9s %6d  %s\n", (double)(usec_now() - begin) / 1000, who, getpid(), line);
	fflush(stdout);
}

__attribute__((format(printf, 2, 3))) static void check(bool true_, const char *format, ...)
{
	va_list ap;

	if (true_)
		return;
	va_start(ap, format);
	fputs("demo: not as claimed: ", stderr);
	vfprintf(stderr, format, ap);
	fputc('\n', stderr);
	va_end(ap);
	exit(NOT_AS_CLAIMED);
}

/* For what the claims are looked at with. error: an errno, or 0 if there is none to tell. */
__attribute__((format(printf, 3, 4))) static void need(bool true_, int error, const char *format, ...)
{
	va_list ap;

	if (true_)
		return;
	va_start(ap, format);
	fputs("demo: cannot tell: failed to ", stderr);
	vfprintf(stderr, format, ap);
	fprintf(stderr, "%s%s\n", error ? ": " : "", error ? strerror(error) : "");
	va_end(ap);
	exit(CANNOT_TELL);
}

/* Pages under long-term pins on the whole machine. */
static long pinned(void)
{
	long value, acquired = 0, released = 0;
	char key[64];
	FILE *f;
	int fd;

	fd = open("/proc/sys/vm/stat_refresh", O_RDONLY | O_CLOEXEC);
	need(fd >= 0, errno, "bring the pin counters up to date (/proc/sys/vm/stat_refresh)");
	(void)!read(fd, key, sizeof(key));
	close(fd);
	f = fopen("/proc/vmstat", "re");
	need(f, errno, "read the pin counters (/proc/vmstat)");
	while (fscanf(f, "%63s %ld", key, &value) == 2) {
		acquired = strcmp(key, "nr_foll_pin_acquired") == 0 ? value : acquired;
		released = strcmp(key, "nr_foll_pin_released") == 0 ? value : released;
	}
	fclose(f);
	return acquired - released;
}

/* Returns what the counters really say. */
static long expect_pinned(long base, long pages, const char *when)
{
	long n = pinned() - base;

	check(labs(n - pages) <= 8,
	      "%s %ld pages are pinned: it is %ld (the counters are the whole machine's)", when, pages, n);
	return n;
}

/* What the hardware does: data comes in from elsewhere, and into the registered buffer. */
static void write_through_ring(struct io_uring *ring, void *buffer, const char *data)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct io_uring_cqe *cqe;
	int fds[2];

	need(pipe(fds) == 0, errno, "make a pipe");
	need(write(fds[1], data, strlen(data)) == (ssize_t)strlen(data), errno, "write to a pipe");
	io_uring_prep_read_fixed(sqe, fds[0], buffer, (unsigned)strlen(data), 0, 0);
	io_uring_submit(ring);
	check(io_uring_wait_cqe(ring, &cqe) == 0 && cqe->res == (int)strlen(data),
	      "the write into the buffer succeeds");
	io_uring_cqe_seen(ring, cqe);
	close(fds[0]);
	close(fds[1]);
}

/* As any reader does: where there still is a lease, the open waits until the broker has released it. */
static char *read_file(size_t *ret_size)
{
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	size_t n = 0, size;
	struct stat st;
	ssize_t k = 1;
	char *bytes;

	need(fd >= 0 && fstat(fd, &st) == 0, errno, "open %s to read it", file);
	size = (size_t)st.st_size;
	bytes = malloc(size + 1);
	need(bytes, errno, "allocate %zu bytes", size);
	while (k > 0 && n < size) {
		k = read(fd, bytes + n, size - n);
		need(k >= 0, errno, "read %s", file);
		n += (size_t)k;
	}
	need(n == size, 0, "read %s to its end: %zu of %zu bytes", file, n, size);
	close(fd);
	*ret_size = size;
	return bytes;
}

static bool file_contains(const char *data)
{
	size_t size;
	char *bytes = read_file(&size);
	bool found = memmem(bytes, size, data, strlen(data)) != NULL;

	free(bytes);
	return found;
}

static bool file_begins(const char *data)
{
	size_t size;
	char *bytes = read_file(&size);
	bool begins = size >= strlen(data) && memcmp(bytes, data, strlen(data)) == 0;

	free(bytes);
	return begins;
}

static void make_file(void)
{
	int fd = open(file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	need(fd >= 0 && ftruncate(fd, SIZE) == 0, errno, "make %s", file);
	close(fd);
}

/* Truncates in a process of its own; returns how long it was blocked. */
static uint64_t truncate_elsewhere(off_t size)
{
	int fds[2];
	uint64_t usec = 0;
	pid_t pid;

	need(pipe(fds) == 0, errno, "make a pipe");
	pid = fork();
	need(pid >= 0, errno, "fork");
	if (pid == 0) {
		prctl(PR_SET_NAME, "admin");
		say("admin", "truncate(\"%s\", %ld) …", file, (long)size);
		usec = usec_now();
		need(truncate(file, size) == 0, errno, "truncate %s", file);
		usec = usec_now() - usec;
		say("admin", "… went through, after %.1f ms", (double)usec / 1000);
		(void)!write(fds[1], &usec, sizeof(usec));
		_exit(0);
	}
	close(fds[1]);
	need(read(fds[0], &usec, sizeof(usec)) == sizeof(usec), 0, "hear from the admin");
	close(fds[0]);
	waitpid(pid, NULL, 0);
	return usec;
}

static void without(void)
{
	long base = pinned();
	struct io_uring ring;
	struct iovec iov = { .iov_len = SIZE };
	uint64_t usec;
	int fd, r;
	long n;

	puts("\nWithout the broker:\n");
	make_file();
	fd = open(file, O_RDWR | O_CLOEXEC);
	iov.iov_base = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	need(iov.iov_base != MAP_FAILED, errno, "map %s", file);
	r = io_uring_queue_init(8, &ring, 0);
	need(r == 0, -r, "make an io_uring");
	r = io_uring_register_buffers(&ring, &iov, 1);
	need(r == 0, -r, "register the file's pages with an io_uring");
	n = expect_pinned(base, PAGES, "after registration");
	say("holder", "registered %d pages of %s; the kernel's counters: %ld pinned", PAGES, file, n);

	usec = truncate_elsewhere(0);
	check(usec < HOLD_MSEC * 1000, "nothing holds the truncate up");
	n = expect_pinned(base, PAGES, "after the truncate");
	say("holder", "still %ld pages pinned, which are not the file's any more", n);
	need(truncate(file, SIZE) == 0, errno, "make %s as long as before", file);
	write_through_ring(&ring, iov.iov_base, text);
	say("holder", "wrote \"%s\" into the buffer: success", text);
	check(memcmp(iov.iov_base, text, strlen(text)) != 0, "the mapping does not show it either");
	check(!file_contains(text), "the write is lost");
	say("holder", "read all %zu bytes of the file: it is nowhere. The write is LOST", SIZE);

	io_uring_queue_exit(&ring);
	munmap(iov.iov_base, SIZE);
	close(fd);
	for (int i = 0; i < 1000 && pinned() - base > 8; i++)
		poll(NULL, 0, 1); /* the ring frees them a little later */
	n = expect_pinned(base, 0, "after the ring's end");
	say("holder", "closed the ring; %ld pages pinned", n);
	unlink(file);
}

struct holder {
	struct io_uring ring;
	struct iovec iov;
	pinbroker_file *file;
	pinbroker_context *context;
	uint64_t pin;
	bool told, let_go;
};

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holder *h = userdata;

	h->told = true;
	if (!n->update) {
		say("holder", "notice on the bus: let go of pin %lu (%s), %.1f s left",
		    n->pins[0], pinbroker_cause_name(n->cause),
		    (double)(n->deadline_usec - usec_now()) / 1e6);
		return;
	}
	say("holder", "notice on the bus: it is %s (pid %d), truncating to %lu bytes", n->comm,
	    n->pid, n->size);
	poll(NULL, 0, HOLD_MSEC); /* what a real holder has to finish */
	write_through_ring(&h->ring, h->iov.iov_base, text);
	say("holder", "wrote \"%s\" into the buffer, as the last thing", text);
	check(io_uring_unregister_buffers(&h->ring) == 0, "the buffer can be unregistered");
	check(pinbroker_unpin(pb, &h->pin, 1, NULL, NULL) == 0, "the pin can be let go");
	say("holder", "unregistered the buffer, and unpinned");
	h->let_go = true;
}

static void need_call(pinbroker *pb, int r, const char *what)
{
	need(r >= 0, 0, "%s: %s", what, r < 0 ? pinbroker_last_error(pb)->message : "");
}

static void holder_pin(struct holder *h, pinbroker *pb)
{
	struct pinbroker_range range = { 0, SIZE };
	int r;

	need_call(pb, pinbroker_open_file(pb, file, PINBROKER_WRITE, &h->file), "open the file");
	h->iov.iov_base = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
			       pinbroker_file_get_fd(h->file), 0);
	need(h->iov.iov_base != MAP_FAILED, errno, "map %s", file);
	r = io_uring_queue_init(8, &h->ring, 0);
	need(r == 0, -r, "make an io_uring");
	need_call(pb, pinbroker_add_context_remote(pb, h->ring.ring_fd, "demo", &h->context),
		  "give the io_uring to the broker");
	need_call(pb,
		  pinbroker_pin(pb, h->file, h->context, &range, 1, PINBROKER_WRITE, "demo", &h->pin),
		  "pin");
	r = io_uring_register_buffers(&h->ring, &h->iov, 1);
	need(r == 0, -r, "register the file's pages with an io_uring");
	need_call(pb, pinbroker_bind(pb, h->pin, 0), "bind the pin");
}

static void holder_main(const char *socket, const char *bus, int ready)
{
	struct holder holder = { .iov.iov_len = SIZE }, *h = &holder;
	pinbroker *pb;
	int r;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	r = pinbroker_new("demo", socket, &pb);
	need(r == 0, -r, "prepare a connection to the broker");
	need_call(pb, pinbroker_set_channels(pb, PINBROKER_CHANNEL_BUS), "choose the bus for notices");
	need_call(pb, pinbroker_set_bus_address(pb, bus), "set the address of the bus");
	need_call(pb, pinbroker_set_revoke_callback(pb, on_revoke, h), "set the callback");
	need_call(pb, pinbroker_connect(pb), "connect");
	holder_pin(h, pb);
	say("holder", "registered %d pages of %s as pin %lu", PAGES, file, h->pin);
	(void)!write(ready, "r", 1);
	while (!h->let_go) {
		struct pollfd pfd = { .fd = pinbroker_get_fd(pb), .events = POLLIN };

		check(poll(&pfd, 1, 20000) == 1, "the notice comes");
		need_call(pb, pinbroker_dispatch(pb), "read the notice");
	}
	_exit(0);
}

static void with(const char *socket, const char *bus)
{
	long base = pinned();
	struct stat st;
	uint64_t usec;
	long n;
	int ready[2], status;
	pid_t pid;
	char c;

	puts("\nWith the broker:\n");
	make_file();
	need(pipe(ready) == 0, errno, "make a pipe");
	pid = fork();
	need(pid >= 0, errno, "fork");
	if (pid == 0)
		holder_main(socket, bus, ready[1]);
	close(ready[1]);
	need(read(ready[0], &c, 1) == 1, 0, "have the holder pin");
	n = expect_pinned(base, PAGES, "after registration");
	say("demo", "the kernel's counters: %ld pinned", n);
	usec = truncate_elsewhere(PAGE);
	n = expect_pinned(base, 0, "as the truncate returns");
	say("demo", "the kernel's counters: %ld pinned", n);
	check(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0,
	      "the holder is content");
	check(usec >= HOLD_MSEC * 1000, "the truncate waited for the holder");
	check(stat(file, &st) == 0 && st.st_size == PAGE, "the file is as long as was asked for");
	check(file_begins(text), "what the hardware wrote last is in the file");
	say("demo", "read the file: \"%s\" is there, and the file is %d bytes long", text, PAGE);
	unlink(file);
}

int main(int argc, char *argv[])
{
	if (argc != 4) {
		fprintf(stderr, "demo SOCKET BUS-ADDRESS FILE\n");
		return CANNOT_TELL;
	}
	begin = usec_now();
	file = argv[3];
	setvbuf(stdout, NULL, _IOLBF, 0); /* the processes write in turn */
	puts("    time     who          pid");
	without();
	with(argv[1], argv[2]);
	puts("\nAll of this was checked: the lost write, the time blocked, the pin counters, the bytes.");
	return 0;
}
