/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "call.h"

#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "access.h"
#include "broker.h"
#include "bus.h"
#include "log.h"
#include "macro.h"
#include "notice.h"
#include "open.h"
#include "peer.h"

/* The methods of org.pinbroker: from a message to the broker and back. Nothing is decided here. */

#define NAME_MAX_BYTES 256 /* names and labels that clients give */

static struct client *client_of(struct call *call)
{
	struct peer *peer = call->peer;

	if (peer->client && !peer->watching)
		return peer->client;
	refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "hello", "Call Hello or Resume first.");
	return NULL;
}

static bool is_name(const char *name)
{
	return !name || strlen(name) < NAME_MAX_BYTES;
}

/* Takes the descriptor that a parameter names, each only once. */
static int take_fd(struct call *call, const char *parameter, int64_t index, int *ret)
{
	if (index < 0 || (uint64_t)index >= call->fds->n_fds || call->fds->fds[index] < 0)
		return refuse_parameter(&call->refusal, parameter);
	*ret = TAKE_FD(call->fds->fds[index]);
	return 0;
}

static void give_fd_back(struct call *call, int64_t index, int fd)
{
	call->fds->fds[index] = fd;
}

/* --- Hello, Resume, Watch --- */

struct hello_job {
	struct job job;
	struct peer *peer; /* reference */
	char *name, *bus_name;
	struct process process; /* a copy, being described */
	int result;
};

static void hello_free(struct hello_job *j)
{
	process_clear(&j->process);
	free(j->name);
	free(j->bus_name);
	peer_unref(j->peer);
	free(j);
}

static void hello_reply(struct peer *peer, const struct client *client)
{
	static const char *features[] = { "io_uring", "af_xdp", "opaque" };
	struct msg_hello_out out = {
		.client = (int64_t)client->id,
		.token = client->token,
		.version = PINBROKER_VERSION,
		.features = { features, ELEMENTS(features) },
	};

	peer_reply(peer, &schema_msg_hello_out, &out, NULL, 0);
}

/* The bus has said whose name it is: r is 0, REFUSED, or an errno if it could not be asked. */
static void hello_verified(int r, struct refusal *refusal, void *userdata)
{
	struct hello_job *j = userdata;
	struct peer *peer = j->peer;

	if (peer->connection && peer->client) {
		if (r == REFUSED)
			peer_refuse(peer, r, refusal);
		else
			hello_reply(peer, peer->client);
		peer_done(peer);
	}
	hello_free(j);
}

static void hello_done(struct job *job)
{
	struct hello_job *j = container_of(job, struct hello_job, job);
	struct peer *peer = j->peer;
	struct refusal refusal;
	struct client *client = peer->client;
	int r = j->result;

	if (!peer->connection) {
		hello_free(j);
		return;
	}
	if (r >= 0 && !client) {
		r = client_new(peer->broker, peer->user, &j->process, &client, &refusal);
		if (r == 0)
			peer_set_client(peer, client);
	}
	if (r != 0) {
		peer_refuse(peer, r, &refusal);
		peer_done(peer);
		hello_free(j);
		return;
	}
	free(client->name);
	client->name = TAKE_PTR(j->name);
	free(client->bus_name);
	client->bus_name = TAKE_PTR(j->bus_name);
	client->bus_name_verified = false;
	if (client->bus_name && peer->broker->bus &&
	    bus_verify_client(peer->broker->bus, client, hello_verified, j) >= 0)
		return;
	hello_verified(0, NULL, j);
}

static void hello_run(struct job *job)
{
	struct hello_job *j = container_of(job, struct hello_job, job);

	j->result = process_describe(&j->process);
}

static int call_hello(struct call *call, const union call_in *in)
{
	const struct msg_hello_in *hello = &in->hello;
	struct peer *peer = call->peer;
	struct hello_job *j;

	if (peer->watching)
		return refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "watching",
			      "This connection is a stream of notices.");
	if (!is_name(hello->name))
		return refuse_parameter(&call->refusal, "name");
	if (hello->busName && !bus_name_is_unique(hello->busName))
		return refuse_parameter(&call->refusal, "busName");
	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	j->peer = peer_ref(peer);
	j->process.pidfd = -1;
	if ((hello->name && !(j->name = strdup(hello->name))) ||
	    (hello->busName && !(j->bus_name = strdup(hello->busName))) ||
	    process_copy(&peer->process, &j->process) < 0) {
		hello_free(j);
		return -ENOMEM;
	}
	j->job.run = hello_run;
	j->job.done = hello_done;
	if (offload_submit(peer->broker->offload, peer->user, &j->job) < 0) {
		hello_free(j);
		return refuse_limit(&call->refusal, peer->user, LIMIT_UNFINISHED);
	}
	return CALL_PENDING;
}

/* Only the process that said Hello, with the token, may take its client up. */
static struct client *prove_client(struct call *call, int64_t id, const char *token)
{
	struct peer *peer = call->peer;
	struct client *client = broker_find_client(peer->broker, (uint64_t)id);

	if (!client || client->dead || client->process.uid != peer->process.uid ||
	    client->process.pid != peer->process.pid || !client_check_token(client, token)) {
		refuse_no_such(&call->refusal, "client", (uint64_t)id);
		return NULL;
	}
	if (peer->client) {
		refuse(&call->refusal, REFUSAL_NOT_ALLOWED, "hello",
		       "This connection speaks for client %llu already.",
		       (unsigned long long)peer->client->id);
		return NULL;
	}
	return client;
}

struct notices {
	struct msg_notice *items;
	size_t n;
};

/* The notice's strings live on, its list of pins does not. */
static int collect_notice(const struct msg_notice *notice, void *userdata)
{
	struct notices *notices = userdata;
	struct msg_notice *items, *copy;
	size_t size = notice->pins.n_items * sizeof(int64_t);

	items = realloc(notices->items, (notices->n + 1) * sizeof(*items));
	if (!items)
		return -ENOMEM;
	notices->items = items;
	copy = &items[notices->n];
	*copy = *notice;
	copy->pins.items = malloc(size);
	if (!copy->pins.items)
		return -ENOMEM;
	memcpy(copy->pins.items, notice->pins.items, size);
	notices->n++;
	return 0;
}

static int call_resume(struct call *call, const union call_in *in)
{
	struct client *client = prove_client(call, in->resume.client, in->resume.token);
	struct notices notices = {};
	int r;

	if (!client)
		return REFUSED;
	r = notice_for_each(client, collect_notice, &notices);
	if (r >= 0) {
		struct msg_resume_out out = { .notices = { notices.items, notices.n } };

		peer_set_client(call->peer, client);
		peer_reply(call->peer, &schema_msg_resume_out, &out, NULL, 0);
	}
	for (size_t i = 0; i < notices.n; i++)
		free(notices.items[i].pins.items);
	free(notices.items);
	return r;
}

static int watch_notice(const struct msg_notice *notice, void *userdata)
{
	peer_reply_more(userdata, &schema_msg_watch_out, &(struct msg_watch_out){ *notice });
	return 0;
}

static int call_watch(struct call *call, const union call_in *in)
{
	struct client *client = prove_client(call, in->watch.client, in->watch.token);
	int r;

	if (!client)
		return REFUSED;
	/* What began before somebody watched is told first. */
	r = notice_for_each(client, watch_notice, call->peer);
	if (r < 0)
		return r;
	peer_set_client(call->peer, client);
	call->peer->watching = true;
	return CALL_PENDING;
}

/* --- files --- */

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
		peer_reply(peer, &schema_msg_open_file_out, &out, &result->fd, 1);
		peer_done(peer);
	}
	peer_unref(peer);
}

static int call_open_file(struct call *call, const union call_in *in)
{
	const struct msg_open_file_in *open_file = &in->open_file;
	struct client *client = client_of(call);
	int r, fd = -1;

	if (!client)
		return REFUSED;
	r = take_fd(call, "fileDescriptor", open_file->fileDescriptor, &fd);
	if (r != 0)
		return r;
	r = open_start(client, fd, (enum access)open_file->access, open_done,
		       peer_ref(call->peer), &call->refusal);
	if (r != 0) {
		give_fd_back(call, open_file->fileDescriptor, fd);
		peer_unref(call->peer);
		return r;
	}
	return CALL_PENDING;
}

static int call_close_file(struct call *call, const union call_in *in)
{
	struct client *client = client_of(call);
	struct file *file;
	struct use *use;

	if (!client)
		return REFUSED;
	file = broker_find_file(client->broker, (uint64_t)in->close_file.file);
	use = file ? client_find_use(client, file) : NULL;
	if (!use)
		return refuse_no_such(&call->refusal, "file", (uint64_t)in->close_file.file);
	if (use->n_pins > 0)
		return refuse(&call->refusal, REFUSAL_BUSY, "pinned",
			      "%u pins of yours are on %s: unpin them first.", use->n_pins,
			      file->path);
	use_free(use);
	peer_reply(call->peer, &schema_msg_close_file_out, NULL, NULL, 0);
	return 0;
}

struct preflight_job {
	struct job job;
	struct peer *peer; /* reference */
	int fd;            /* owned */
	enum access access;
	struct probe probe; /* owned */
	struct refusal refusal;
	int result;
};

static void preflight_run(struct job *job)
{
	struct preflight_job *j = container_of(job, struct preflight_job, job);
	const struct config *config = &j->peer->broker->config;
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
	bool settles = j->access == ACCESS_WRITE && peer->broker->config.readers == READERS_WAIT;
	char message[300];
	struct msg_preflight_out out = {
		.leasable = j->result == 0,
		.dax = j->probe.dax,
		.leaseBreakUSec = (int64_t)lease_break_usec(),
		.settleUSec = settles ? (int64_t)lease_break_usec() : 0,
	};

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
	free(j);
}

static int call_preflight(struct call *call, const union call_in *in)
{
	struct peer *peer = call->peer;
	struct preflight_job *j;
	int r;

	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	r = take_fd(call, "fileDescriptor", in->preflight.fileDescriptor, &j->fd);
	if (r == 0) {
		j->access = (enum access)in->preflight.access;
		j->peer = peer;
		j->job.run = preflight_run;
		j->job.done = preflight_done;
		if (offload_submit(peer->broker->offload, peer->user, &j->job) < 0) {
			give_fd_back(call, in->preflight.fileDescriptor, j->fd);
			r = refuse_limit(&call->refusal, peer->user, LIMIT_UNFINISHED);
		}
	}
	if (r != 0) {
		free(j);
		return r;
	}
	peer_ref(peer);
	return CALL_PENDING;
}

/* --- contexts --- */

struct context_new_job {
	struct job job;
	struct peer *peer; /* reference */
	int fd;            /* owned; -1: to be fetched */
	int remote;        /* its number in the client */
	char *label;
	struct process process; /* a copy */
	const struct context_ops *ops;
	struct context_description description;
	struct refusal refusal;
	int result;
};

static void context_new_free(struct context_new_job *j)
{
	offload_close(j->peer->broker->offload, j->peer->user, j->fd);
	process_clear(&j->process);
	free(j->label);
	peer_unref(j->peer);
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
		j->result = context_identify(j->fd, &j->ops, &j->description, &j->refusal);
}

static void reply_context(struct peer *peer, const struct context *context)
{
	struct msg_context_info info;

	context_info(context, &info);
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

	if (!peer->connection || !peer->client) {
		context_new_free(j);
		return;
	}
	if (r == 0)
		r = context_new(peer->client, j->ops, &j->description, j->fd, j->label, &context,
				&j->refusal);
	if (r == 0) {
		j->fd = -1;
		reply_context(peer, context);
	} else {
		peer_refuse(peer, r, &j->refusal);
	}
	peer_done(peer);
	context_new_free(j);
}

static int call_add_context(struct call *call, const union call_in *in)
{
	const struct msg_add_context_in *add = &in->add_context;
	struct client *client = client_of(call);
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
	if (!is_name(add->label))
		return refuse_parameter(&call->refusal, "label");
	if (add->fileDescriptor != INT_NULL) {
		r = take_fd(call, "fileDescriptor", add->fileDescriptor, &fd);
		if (r != 0)
			return r;
		r = context_identify_at_once(fd, &ops, &description, &call->refusal);
		if (r == 0)
			r = context_new(client, ops, &description, fd, add->label, &context,
					&call->refusal);
		if (r == 0)
			reply_context(call->peer, context);
		else if (r != -EAGAIN)
			give_fd_back(call, add->fileDescriptor, fd);
		if (r != -EAGAIN)
			return r;
	}
	j = calloc(1, sizeof(*j));
	if (!j || (add->label && !(j->label = strdup(add->label))) ||
	    process_copy(&client->process, &j->process) < 0) {
		if (fd >= 0)
			give_fd_back(call, add->fileDescriptor, fd);
		if (j)
			free(j->label);
		free(j);
		return -ENOMEM;
	}
	j->peer = peer_ref(call->peer);
	j->fd = fd;
	j->remote = (int)add->remoteDescriptor;
	j->job.run = context_new_run;
	j->job.done = context_new_done;
	if (offload_submit(client->broker->offload, client->user, &j->job) < 0) {
		context_new_free(j);
		return refuse_limit(&call->refusal, client->user, LIMIT_UNFINISHED);
	}
	return CALL_PENDING;
}

static int call_remove_context(struct call *call, const union call_in *in)
{
	struct client *client = client_of(call);
	struct context *context;

	if (!client)
		return REFUSED;
	context = client_find_context(client, in->remove_context.context, &call->refusal);
	if (!context)
		return REFUSED;
	if (context->n_pins > 0)
		return refuse(&call->refusal, REFUSAL_BUSY, "pinned",
			      "%u pins are on it: unpin them first.", context->n_pins);
	context_free(context);
	peer_reply(call->peer, &schema_msg_remove_context_out, NULL, NULL, 0);
	return 0;
}

/* --- pins --- */

static int call_pin(struct call *call, const union call_in *in)
{
	const struct msg_pin_in *pin = &in->pin;
	struct client *client = client_of(call);
	int64_t ids[PIN_RANGES_MAX];
	int r;

	if (!client)
		return REFUSED;
	if (!is_name(pin->label))
		return refuse_parameter(&call->refusal, "label");
	r = client_pin(client, (uint64_t)pin->file, (uint64_t)pin->context, pin->ranges.items,
		       pin->ranges.n_items, (enum access)pin->access, pin->label, ids,
		       &call->refusal);
	if (r == 0)
		peer_reply(call->peer, &schema_msg_pin_out,
			   &(struct msg_pin_out){ .pins = { ids, pin->ranges.n_items } }, NULL, 0);
	return r;
}

struct bind_job {
	struct job job;
	struct peer *peer;       /* reference */
	struct context *context; /* held */
	struct broker *broker;
	int fd;
	uint64_t pin;
	int64_t handle;
	struct handle_identity identity;
	int result;
};

static void bind_run(struct job *job)
{
	struct bind_job *j = container_of(job, struct bind_job, job);

	j->result = j->context->ops->read_handle(j->fd, j->handle, &j->identity);
}

static void bind_done(struct job *job)
{
	struct bind_job *j = container_of(job, struct bind_job, job);
	struct peer *peer = j->peer;
	struct refusal refusal;
	struct pin *pin;
	int r = j->result == -ENOENT ? refuse_parameter(&refusal, "handle") : j->result;

	(void)context_release(j->context, j->broker);
	pin = broker_find_pin(j->broker, j->pin);
	if (r == 0)
		r = pin ? pin_bind(pin, j->handle, &j->identity, &refusal)
			: refuse_no_such(&refusal, "pin", j->pin);
	if (peer->connection) {
		if (r == 0)
			peer_reply(peer, &schema_msg_bind_out, NULL, NULL, 0);
		else
			peer_refuse(peer, r, &refusal);
		peer_done(peer);
	}
	peer_unref(peer);
	free(j);
}

static int call_bind(struct call *call, const union call_in *in)
{
	struct client *client = client_of(call);
	struct context *context;
	struct bind_job *j;
	struct pin *pin;
	int r;

	if (!client)
		return REFUSED;
	pin = client_find_pin(client, in->bind.pin, &call->refusal);
	if (!pin)
		return REFUSED;
	if (in->bind.handle < 0)
		return refuse_parameter(&call->refusal, "handle");
	context = pin->context;
	if (!context->ops->read_handle || context->fd < 0 || pin->over) {
		r = pin_bind(pin, in->bind.handle, &(struct handle_identity){}, &call->refusal);
		if (r == 0)
			peer_reply(call->peer, &schema_msg_bind_out, NULL, NULL, 0);
		return r;
	}
	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	j->broker = client->broker;
	j->fd = context->fd;
	j->pin = pin->id;
	j->handle = in->bind.handle;
	j->job.run = bind_run;
	j->job.done = bind_done;
	j->context = context_hold(context);
	if (offload_submit(client->broker->offload, client->user, &j->job) < 0) {
		(void)context_release(context, j->broker);
		free(j);
		return refuse_limit(&call->refusal, client->user, LIMIT_UNFINISHED);
	}
	j->peer = peer_ref(call->peer);
	return CALL_PENDING;
}

static int call_unpin(struct call *call, const union call_in *in)
{
	const struct ints *pins = &in->unpin.pins;
	struct client *client = client_of(call);
	_cleanup_(freep) int64_t *ended = NULL;
	size_t n_ended;
	int r;

	if (!client)
		return REFUSED;
	ended = calloc(pins->n_items + 1, sizeof(*ended));
	if (!ended)
		return -ENOMEM;
	r = client_unpin(client, pins->items, pins->n_items, ended, &n_ended, &call->refusal);
	if (r == 0)
		peer_reply(call->peer, &schema_msg_unpin_out,
			   &(struct msg_unpin_out){ .ended = { ended, n_ended } }, NULL, 0);
	return r;
}

static int call_extend(struct call *call, const union call_in *in)
{
	struct client *client = client_of(call);
	struct revocation *rev;
	uint64_t deadline;
	int r;

	if (!client)
		return REFUSED;
	if (in->extend.byUSec < 0)
		return refuse_parameter(&call->refusal, "byUSec");
	rev = broker_find_revocation(client->broker, (uint64_t)in->extend.revocation);
	if (!rev || !revocation_is_running(rev))
		return refuse_no_such(&call->refusal, "revocation",
				      (uint64_t)in->extend.revocation);
	r = revocation_extend(rev, client, (uint64_t)in->extend.byUSec, &deadline, &call->refusal);
	if (r == 0)
		peer_reply(call->peer, &schema_msg_extend_out,
			   &(struct msg_extend_out){ (int64_t)deadline }, NULL, 0);
	return r;
}

#define HANDLER(tag, name, kind, IN, OUT) [METHOD_##name] = call_##tag,
int (*const call_handlers[METHOD_COUNT])(struct call *call, const union call_in *in) = {
	INTERFACE_METHODS(HANDLER)
};
