/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/varlink/call.h"

#include <sys/pidfd.h>

#include "daemon/core/broker.h"
#include "daemon/varlink/peer.h"
#include "protocol/macro.h"

/* AddContext. */

struct context_new_job {
	struct job job;
	struct peer *peer; /* reference */
	struct config *config; /* reference */
	int fd;            /* owned; -1: to be fetched */
	int remote;        /* its number in the client */
	bool charged;      /* one LIMIT_DESCRIPTORS */
	char *label;
	struct process process; /* a copy */
	const struct context_ops *ops;
	struct context_description description;
	struct refusal refusal;
	int result;
};

static void context_new_free(struct context_new_job *j)
{
	if (j->fd < 0 && j->charged)
		user_discharge(j->peer->user, LIMIT_DESCRIPTORS, 1);
	offload_close(j->peer->broker->offload, j->peer->user, j->fd);
	process_clear(&j->process);
	free(j->label);
	peer_unref(j->peer);
	config_unref(j->config);
	free(j);
}

static int fetch_remote(struct context_new_job *j)
{
	/* A setuid program's descriptors are not its starter's to hand out. */
	if (!process_is_same(&j->process))
		return refuse(&j->refusal, REFUSAL_NOT_ALLOWED, "process",
			      "Process %d is not what connected any more.", j->process.pid);
	j->fd = pidfd_getfd(j->process.pidfd, j->remote, 0);
	if (j->fd >= 0)
		return 0;
	if (errno == EBADF)
		return refuse_parameter(&j->refusal, "remoteDescriptor");
	if (errno == EPERM)
		return refuse(&j->refusal, REFUSAL_NOT_ALLOWED, "ptrace",
			      "This broker may not take descriptors from process %d.",
			      j->process.pid);
	return -errno;
}

static void context_new_run(struct job *job)
{
	struct context_new_job *j = container_of(job, struct context_new_job, job);

	j->result = j->fd < 0 ? fetch_remote(j) : 0;
	if (j->result == 0)
		j->result = context_identify(
			j->fd, j->config, &j->ops, &j->description, &j->refusal);
}

static void reply_context(struct peer *peer, const struct context *context)
{
	struct msg_context_info info;

	context_info(context, &info);
	peer_hold(peer);
	peer_reply(peer, &schema_msg_add_context_out,
		   &(struct msg_add_context_out){
			   .context = info.context,
			   .kind = info.kind,
			   .device = info.device,
			   .forcible = info.forcible,
			   .proof = info.proof,
		   },
		   NULL, 0);
}

static void context_new_done(struct job *job)
{
	struct context_new_job *j = container_of(job, struct context_new_job, job);
	struct peer *peer = j->peer;
	struct context *context;
	int r = j->result;

	if (!peer->connection || !peer->session.client) {
		context_new_free(j);
		return;
	}
	if (r == 0)
		r = context_new(peer->session.client, j->ops, &j->description, j->fd, j->label, &context,
				&j->refusal);
	if (r == 0) {
		if (j->remote >= 0)
			context_set_remote(context, j->remote);
		j->fd = -1;
		j->charged = false;
		context_keep(context);
		reply_context(peer, context);
	} else {
		peer_refuse(peer, r, &j->refusal);
	}
	peer_done(peer);
	context_new_free(j);
}

/* One that was sent has been charged already. */
static int charge_remote(struct context_new_job *j, struct refusal *ret_refusal)
{
	struct user *user = j->peer->user;

	if (j->fd < 0 && user_charge(user, LIMIT_DESCRIPTORS, 1) < 0)
		return refuse_limit(ret_refusal, user, LIMIT_DESCRIPTORS);
	j->charged = true;
	return 0;
}

int call_add_context(struct call *call, const union call_in *in)
{
	const struct msg_add_context_in *add = &in->add_context;
	struct client *client = call_client(call);
	struct context_description description;
	const struct context_ops *ops;
	struct context_new_job *j;
	struct context *context;
	int r, fd = -1;

	if (!client)
		return REFUSED;
	if ((add->fileDescriptor == INT_NULL) == (add->remoteDescriptor == INT_NULL))
		return refuse_parameter(&call->refusal, "fileDescriptor");
	if (add->remoteDescriptor != INT_NULL &&
	    (add->remoteDescriptor < 0 || add->remoteDescriptor > INT32_MAX))
		return refuse_parameter(&call->refusal, "remoteDescriptor");
	if (!call_is_name(add->label))
		return refuse_parameter(&call->refusal, "label");
	if (add->fileDescriptor != INT_NULL) {
		r = call_take_fd(call, "fileDescriptor", add->fileDescriptor, &fd);
		if (r != 0)
			return r;
		r = context_identify_at_once(fd, &ops, &description, &call->refusal);
		if (r == 0)
			r = context_new(client, ops, &description, fd, add->label, &context,
					&call->refusal);
		if (r == 0) {
			context_keep(context);
			reply_context(call->peer, context);
		} else if (r != -EAGAIN) {
			call_give_fd_back(call, add->fileDescriptor, fd);
		}
		if (r != -EAGAIN)
			return r;
	}
	j = calloc(1, sizeof(*j));
	if (!j || (add->label && !(j->label = strdup(add->label))) ||
	    process_copy(&client->process, &j->process) < 0) {
		if (fd >= 0)
			call_give_fd_back(call, add->fileDescriptor, fd);
		if (j)
			free(j->label);
		free(j);
		return -ENOMEM;
	}
	j->peer = peer_ref(call->peer);
	j->config = config_ref(client->broker->config);
	j->fd = fd;
	j->remote = add->remoteDescriptor != INT_NULL ? (int)add->remoteDescriptor : -1;
	j->job.run = context_new_run;
	j->job.done = context_new_done;
	r = charge_remote(j, &call->refusal);
	if (r == 0 && offload_submit(client->broker->offload, client->user, &j->job) < 0)
		r = refuse_limit(&call->refusal, client->user, LIMIT_UNFINISHED);
	if (r != 0) {
		context_new_free(j);
		return r;
	}
	return CALL_PENDING;
}
