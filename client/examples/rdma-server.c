/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Lets a client write into a file with RDMA, and keeps to the rules: when somebody wants the pages,
 * it tells the client, deregisters the file, and, when the truncate has gone through, offers what
 * is left of it anew.
 *
 *     cc rdma-server.c -o rdma-server $(pkg-config --cflags --libs libpinbroker-verbs)
 *     ./rdma-server rxe0 7471 /dev/shm/data
 *     ./rdma-client rxe0 localhost 7471
 */

#include "rdma-pair.h"

#include <errno.h>
#include <pinbroker-verbs.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#define RETRY_MSEC 100

static pinbroker *pb;
static pinbroker_file *file;
static struct ibv_pd *pd;

static struct ibv_mr *region; /* NULL: none */
static void *map;
static size_t size;

static int client = -1;
static struct pair pair;

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

/* ---- The client ---- */

static void client_offer(void)
{
	struct offer offer = {0};

	if (client < 0)
		return;
	if (region)
		offer = (struct offer){(uintptr_t)map, size, region->rkey, 0};
	send_all(client, &offer, sizeof(offer));
}

static void client_leave(void)
{
	pair_disconnect(&pair);
	close(client);
	client = -1;
	printf("client gone\n");
}

static void client_arrive(int listener)
{
	client = accept(listener, NULL, NULL);
	if (client < 0)
		return;
	if (pair_connect(&pair, pd, client) < 0) {
		client_leave();
		return;
	}
	printf("client\n");
	if (region)
		client_offer();
}

/* Waits until the client has stopped, or msec have passed. */
static void client_stop(int msec)
{
	struct pollfd pfd = {.fd = client, .events = POLLIN};
	char answer;

	client_offer();
	if (poll(&pfd, 1, msec) == 1 && recv(client, &answer, 1, MSG_DONTWAIT) == 1)
		printf("client has stopped\n");
	else
		printf("client has not stopped\n");
}

/* ---- The file ---- */

static void let_go(int patience_msec)
{
	struct ibv_mr *mr = region;

	if (!mr)
		return;
	region = NULL;
	/* What the client writes after that fails with a remote access error. */
	if (client >= 0)
		client_stop(patience_msec);
	if (pinbroker_dereg_mr(pb, mr) < 0)
		die("Cannot deregister the file");
	munmap(map, size);
	printf("let go\n");
}

static int msec_until(uint64_t usec)
{
	struct timespec t;
	uint64_t now;

	clock_gettime(CLOCK_MONOTONIC, &t);
	now = (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
	return usec > now ? (int)((usec - now) / 1000) : 0;
}

/* pinbroker_dispatch() calls this. */
static void on_revoke(pinbroker *p, const struct pinbroker_notice *notice, void *userdata)
{
	printf("%s of %s, by %s (pid %d)\n", pinbroker_cause_name(notice->cause), notice->path,
		notice->comm ? notice->comm : "somebody", (int)notice->pid);
	/* Whoever removes it waits until it is closed. */
	if (notice->cause == PINBROKER_CAUSE_DEVICE)
		stopping = 1;
	for (size_t i = 0; i < notice->n_pins; i++)
		if (region && pinbroker_find_mr(pb, notice->pins[i]) == region)
			let_go(msec_until(notice->deadline_usec) / 2);
}

/* Returns whether to try again later. */
static int take_hold(void)
{
	struct stat st;

	if (fstat(pinbroker_file_get_fd(file), &st) < 0 || st.st_size == 0)
		return 1;
	size = (size_t)st.st_size;
	map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	if (map == MAP_FAILED)
		fail("Cannot map the file");
	region = pinbroker_reg_mr(
		pb, file, 0, pd, map, size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	if (region) {
		printf("holding %zu bytes\n", size);
		client_offer();
		return 0;
	}
	munmap(map, size);
	/* The truncate has not gone through yet, or the lease could not be taken again yet, or the
	 * file was shortened between the fstat() and here. */
	if (errno != EAGAIN && errno != EBUSY && errno != ERANGE && errno != ESTALE)
		fail("Cannot register the file");
	return 1;
}

/* ---- */

static void run(int listener)
{
	while (!stopping) {
		int again = !region && take_hold();
		struct pollfd pfd[] = {
			{.fd = pinbroker_get_fd(pb), .events = POLLIN},
			{.fd = client < 0 ? listener : client, .events = POLLIN},
		};
		char answer;

		if (poll(pfd, 2, again ? RETRY_MSEC : -1) <= 0)
			continue;
		if (pfd[1].revents && client < 0)
			client_arrive(listener);
		else if (pfd[1].revents && recv(client, &answer, 1, MSG_DONTWAIT) <= 0)
			client_leave();
		if (pfd[0].revents && pinbroker_dispatch(pb) < 0)
			die("Cannot go on");
	}
}

int main(int argc, char *argv[])
{
	struct sigaction sa = {.sa_handler = on_signal};
	struct ibv_context *device;
	int listener;

	if (argc != 4) {
		fprintf(stderr, "usage: %s DEVICE PORT FILE\n", argv[0]);
		return 64;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);

	device = device_open(argv[1]);
	pd = ibv_alloc_pd(device);
	if (!pd)
		fail(argv[1]);
	listener = listen_at(argv[2]);
	if (pinbroker_new("example RDMA server", NULL, &pb) < 0)
		return EXIT_FAILURE;
	pinbroker_set_revoke_callback(pb, on_revoke, NULL);
	if (pinbroker_connect(pb) < 0)
		die("Cannot connect");
	if (pinbroker_open_file(pb, argv[3], PINBROKER_WRITE, &file) < 0)
		die("Cannot serve it");

	run(listener);

	let_go(RETRY_MSEC);
	if (client >= 0)
		client_leave();
	ibv_dealloc_pd(pd);
	if (pinbroker_close_device(pb, device) < 0 || pinbroker_close_file(file) < 0)
		die("Cannot clean up");
	pinbroker_unref(pb);
	return EXIT_SUCCESS;
}
