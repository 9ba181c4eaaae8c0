/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * The other side of rdma-server.c: writes a growing number to the beginning of the server's file
 * until it is stopped, or told to stop. With "stubborn" it does not do as it is told, and sees what
 * comes of it.
 *
 *     cc rdma-client.c -o rdma-client $(pkg-config --cflags --libs libibverbs)
 */

#include "rdma-pair.h"

#include <inttypes.h>
#include <poll.h>

#define PAUSE_MSEC 10 /* between writes */

static struct ibv_pd *pd;
static struct ibv_mr *own;
static uint64_t number;

static int dial(const char *host, const char *port)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
	int s = -1;

	if (getaddrinfo(host, port, &hints, &list) != 0)
		return -1;
	for (struct addrinfo *a = list; a && s < 0; a = a->ai_next) {
		s = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
		if (s >= 0 && connect(s, a->ai_addr, a->ai_addrlen) < 0) {
			close(s);
			s = -1;
		}
	}
	freeaddrinfo(list);
	return s;
}

/* Writes, and waits until it is done. */
static enum ibv_wc_status write_number(struct pair *pair, const struct offer *offer)
{
	struct ibv_sge from = {(uintptr_t)&number, sizeof(number), own->lkey};
	struct ibv_send_wr work = {
		.sg_list = &from,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = {.remote_addr = offer->address, .rkey = offer->key},
	};
	struct ibv_send_wr *bad;
	struct ibv_wc done;
	int n;

	number++;
	if (ibv_post_send(pair->qp, &work, &bad) != 0)
		return IBV_WC_GENERAL_ERR;
	while ((n = ibv_poll_cq(pair->queue, 1, &done)) == 0)
		;
	return n < 0 ? IBV_WC_GENERAL_ERR : done.status;
}

/* Writes until there is news from the server, or an error. */
static enum ibv_wc_status write_on(struct pair *pair, int s, const struct offer *offer)
{
	struct pollfd pfd = {.fd = s, .events = POLLIN};
	enum ibv_wc_status status;

	do
		status = write_number(pair, offer);
	while (status == IBV_WC_SUCCESS && poll(&pfd, 1, PAUSE_MSEC) == 0);
	return status;
}

/* Until the connection ends or a write fails. */
static void serve(struct pair *pair, int s, int stubborn)
{
	enum ibv_wc_status status = IBV_WC_SUCCESS;
	struct offer offer = {0}, news;

	while (status == IBV_WC_SUCCESS && receive_all(s, &news, sizeof(news)) == 0) {
		if (news.length == 0)
			printf("told to stop at %" PRIu64 "\n", number);
		else
			printf("writing to %" PRIu64 " bytes\n", news.length);
		if (news.length > 0 || !stubborn)
			offer = news;
		if (news.length == 0 && !stubborn)
			send_all(s, "", 1);
		if (offer.length >= sizeof(number))
			status = write_on(pair, s, &offer);
	}
	if (status != IBV_WC_SUCCESS)
		printf("write %" PRIu64 ": %s\n", number, ibv_wc_status_str(status));
}

int main(int argc, char *argv[])
{
	struct ibv_context *device;
	int s;

	if (argc != 4 && !(argc == 5 && strcmp(argv[4], "stubborn") == 0)) {
		fprintf(stderr, "usage: %s DEVICE HOST PORT [stubborn]\n", argv[0]);
		return 64;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	device = device_open(argv[1]);
	pd = ibv_alloc_pd(device);
	own = pd ? ibv_reg_mr(pd, &number, sizeof(number), 0) : NULL;
	if (!own)
		fail(argv[1]);

	/* A queue pair that has seen an error is of no further use. */
	while ((s = dial(argv[2], argv[3])) >= 0) {
		struct pair pair = {0};

		if (pair_connect(&pair, pd, s) == 0)
			serve(&pair, s, argc == 5);
		pair_disconnect(&pair);
		close(s);
	}
	printf("no server at %s:%s\n", argv[2], argv[3]);

	ibv_dereg_mr(own);
	ibv_dealloc_pd(pd);
	ibv_close_device(device);
	return EXIT_SUCCESS;
}
