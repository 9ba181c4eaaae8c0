/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include "daemon/core/broker.h"
#include "daemon/core/open.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* OpenFile and Preflight. */

static void open_done(struct open_result *result, void *userdata)
{
	struct peer *peer = userdata;
	struct file *file = result->r == 0 ? broker_find_file(peer->broker, result->file) : NULL;

	if (!peer->connection) {
		offload_close(peer->broker->offload, peer->user, result->fd);
	} else if (result->r != 0) {
		peer_refuse(peer, result->r, &result->refusal);
		peer_done(peer);
	} else {
		struct msg_open_file_out out = { .file = (int64_t)result->file };

		file_info(file, &out.info);
		peer_hold(peer);
		peer_reply(peer, &schema_msg_open_file_out, &out, &result->fd, 1);
		peer_done(peer);
	}
	peer_unref(peer);
}

int call_open_file(struct call *call, const union call_in *in)
{
	const struct msg_open_file_in *open_file = &in->open_file;
	struct client *client = call_client(call);
	int r, fd = -1;

	if (!client)
		return REFUSED;
	r = call_take_fd(call, "fileDescriptor", open_file->fileDescriptor, &fd);
	if (r != 0)
		return r;
	r = open_start(client, fd, (enum access)open_file->access, open_done,
		       peer_ref(call->peer), &call->refusal);
	if (r != 0) {
		call_give_fd_back(call, open_file->fileDescriptor, fd);
		peer_unref(call->peer);
		return r;
	}
	return CALL_PENDING;
}

struct preflight_job {
	struct job job;
	struct peer *peer; /* reference */
	struct config *config; /* reference */
	int fd;            /* owned */
	enum access access;
	struct probe probe; /* owned */
	struct refusal refusal;
	int result;
};

static void preflight_run(struct job *job)
{
	struct preflight_job *j = container_of(job, struct preflight_job, job);
	const struct config *config = j->config;
	const struct process *process = &j->peer->process;

	j->result = access_probe(j->fd, process, config->file_systems, &j->probe, &j->refusal);
	if (j->result == 0)
		j->result = access_check_open(j->fd, process, j->access, &j->refusal);
	if (j->result == 0)
		j->result = access_check_lease(j->fd, process, &j->probe, config->leases,
					       &j->refusal);
}

static void preflight_done(struct job *job)
{
	struct preflight_job *j = container_of(job, struct preflight_job, job);
	struct peer *peer = j->peer;
	bool settles = j->access == ACCESS_WRITE && backing_needs_lease(&j->probe.backing) &&
		       !file_admits_readers(peer->broker) &&
		       listened_until(&peer->broker->listened, j->probe.mount_device) == 0;
	uint64_t break_usec = lease_break_usec();
	struct msg_backing backing;
	char message[300];
	struct msg_preflight_out out = {
		.leasable = j->result == 0,
		.dax = j->probe.backing.kind == BACKING_FSDAX,
		.pinnable = PINNABLE_UNKNOWN,
		.leaseBreakUSec = break_usec != USEC_INFINITY ? (int64_t)break_usec : 0,
		.settleUSec = settles ? (int64_t)break_usec : 0,
	};

	if (j->probe.path) {
		backing_info(&j->probe.backing, &backing);
		out.backing = &backing;
		out.pinnable = backing_pinnable(&j->probe.backing, j->access, &out.pinReason);
	}
	if (j->result == REFUSED) {
		out.reason = refusal_message(&j->refusal, message);
		out.fileSystem = j->refusal.file_system[0] ? j->refusal.file_system : NULL;
	} else if (j->result < 0) {
		out.reason = strerror(-j->result);
	} else {
		out.fileSystem = j->probe.file_system;
	}
	if (peer->connection) {
		peer_reply(peer, &schema_msg_preflight_out, &out, NULL, 0);
		peer_done(peer);
	}
	probe_clear(&j->probe);
	offload_close(peer->broker->offload, peer->user, j->fd);
	peer_unref(peer);
	config_unref(j->config);
	free(j);
}

int call_preflight(struct call *call, const union call_in *in)
{
	struct peer *peer = call->peer;
	struct preflight_job *j;
	int r;

	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	r = call_take_fd(call, "fileDescriptor", in->preflight.fileDescriptor, &j->fd);
	if (r == 0) {
		j->access = (enum access)in->preflight.access;
		j->peer = peer;
		j->config = config_ref(peer->broker->config);
		j->job.run = preflight_run;
		j->job.done = preflight_done;
		if (offload_submit(peer->broker->offload, peer->user, &j->job) < 0) {
			call_give_fd_back(call, in->preflight.fileDescriptor, j->fd);
			r = refuse_limit(&call->refusal, peer->user, LIMIT_UNFINISHED);
		}
	}
	if (r != 0) {
		config_unref(j->config);
		free(j);
		return r;
	}
	peer_ref(peer);
	return CALL_PENDING;
}
