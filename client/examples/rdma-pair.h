/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * What rdma-server.c and rdma-client.c share: a queue pair to the other side of a TCP connection,
 * over which they also tell each other what there is to write to.
 */

#include <errno.h>
#include <infiniband/verbs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PORT 1 /* of the device */

struct address {
	union ibv_gid gid;
	uint32_t queue_pair;
	uint16_t lid;
	uint16_t reserved;
};

/* From the server: what may be written to. length 0: nothing any more; the client stops, and
 * answers with one byte when none of its writes is under way. */
struct offer {
	uint64_t address;
	uint64_t length;
	uint32_t key;
	uint32_t reserved;
};

struct pair {
	struct ibv_cq *queue;
	struct ibv_qp *qp;
};

static inline void fail(const char *what)
{
	perror(what);
	exit(EXIT_FAILURE);
}

static inline struct ibv_context *device_open(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = NULL;

	if (list)
		errno = 0;
	for (struct ibv_device **d = list; d && *d && !context; d++)
		if (strcmp(ibv_get_device_name(*d), name) == 0)
			context = ibv_open_device(*d);
	if (!context) {
		fprintf(stderr, "Cannot open an RDMA device %s: %s. See ibv_devices.\n", name,
			errno ? strerror(errno) : "there is none");
		exit(EXIT_FAILURE);
	}
	ibv_free_device_list(list);
	return context;
}

/* On Ethernet (RoCE) the address is a GID: the last one of version 2 that an IPv4 address gave, or
 * of version 2 at all. */
static inline int gid_find(struct ibv_context *context, union ibv_gid *ret)
{
	static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
	struct ibv_gid_entry entries[64];
	ssize_t n = ibv_query_gid_table(context, entries, 64, 0);
	int found = 0, is_mapped = 0;

	for (ssize_t i = 0; i < n; i++) {
		int m = memcmp(entries[i].gid.raw, mapped, sizeof(mapped)) == 0;

		if (entries[i].gid_type != IBV_GID_TYPE_ROCE_V2 || entries[i].port_num != PORT ||
			m < is_mapped)
			continue;
		*ret = entries[i].gid;
		found = (int)entries[i].gid_index;
		is_mapped = m;
	}
	return found;
}

static inline int listen_at(const char *port)
{
	struct sockaddr_in6 address = {
		.sin6_family = AF_INET6,
		.sin6_port = htons((uint16_t)atoi(port)),
	};
	int s = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);

	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
	if (bind(s, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(s, 1) < 0)
		fail("Cannot listen at the port");
	return s;
}

static inline void send_all(int s, const void *data, size_t size)
{
	/* That the other side is gone is seen when something is to be received. */
	(void)!send(s, data, size, MSG_NOSIGNAL);
}

static inline int receive_all(int s, void *data, size_t size)
{
	return recv(s, data, size, MSG_WAITALL) == (ssize_t)size ? 0 : -1;
}

static inline int pair_start(struct ibv_qp *qp, const struct ibv_port_attr *port, int gid_index,
	const struct address *peer)
{
	struct ibv_qp_attr a = {
		.qp_state = IBV_QPS_INIT,
		.port_num = PORT,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
	};

	if (ibv_modify_qp(qp, &a,
		    IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) != 0)
		return -1;
	a = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTR,
		.path_mtu = port->active_mtu,
		.dest_qp_num = peer->queue_pair,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr =
			{
				.dlid = peer->lid,
				.port_num = PORT,
				.is_global = port->link_layer == IBV_LINK_LAYER_ETHERNET,
				.grh = {.dgid = peer->gid,
					.sgid_index = (uint8_t)gid_index,
					.hop_limit = 64},
			},
	};
	if (ibv_modify_qp(qp, &a,
		    IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) != 0)
		return -1;
	a = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTS,
		.timeout = 14,
		.retry_cnt = 7,
		.rnr_retry = 7,
		.max_rd_atomic = 1,
	};
	return ibv_modify_qp(qp, &a,
		IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

static inline void pair_disconnect(struct pair *pair)
{
	if (pair->qp)
		ibv_destroy_qp(pair->qp);
	if (pair->queue)
		ibv_destroy_cq(pair->queue);
	*pair = (struct pair){0};
}

/* Connects a new queue pair with the one at the other end of the socket. */
static inline int pair_connect(struct pair *pair, struct ibv_pd *pd, int s)
{
	struct ibv_qp_init_attr init = {
		.qp_type = IBV_QPT_RC,
		.cap = {.max_send_wr = 4, .max_recv_wr = 4, .max_send_sge = 1, .max_recv_sge = 1},
	};
	struct address own = {.reserved = 0}, peer;
	struct ibv_port_attr port;
	int gid_index;

	if (ibv_query_port(pd->context, PORT, &port) != 0)
		return -1;
	pair->queue = ibv_create_cq(pd->context, 16, NULL, NULL, 0);
	if (!pair->queue)
		return -1;
	init.send_cq = init.recv_cq = pair->queue;
	pair->qp = ibv_create_qp(pd, &init);
	if (!pair->qp)
		return -1;
	gid_index = gid_find(pd->context, &own.gid);
	own.queue_pair = pair->qp->qp_num;
	own.lid = port.lid;
	send_all(s, &own, sizeof(own));
	if (receive_all(s, &peer, sizeof(peer)) < 0)
		return -1;
	return pair_start(pair->qp, &port, gid_index, &peer) == 0 ? 0 : -1;
}
