/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/open.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "daemon/core/broker.h"
#include "daemon/core/observer.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* A file that was just closed by somebody takes a moment until the kernel knows. */
#define LEASE_TRIES      6
#define LEASE_TRIES_MORE 9 /* the service manager may have to close its copy first */
#define LEASE_RETRY_USEC (2 * USEC_PER_MSEC)

enum step {
	STEP_PROBE,  /* what is it? */
	STEP_OPEN,   /* nobody has it: open it, both the description for the lease and the reader's */
	STEP_REOPEN, /* one more description of a file that is open, for reading if it is leased */
	STEP_CHECK,  /* may the client have a copy of the leased description? */
};

struct open_request {
	struct job job;
	struct broker *broker;
	struct user *user;  /* reference */
	struct config *config; /* reference; as it was when the call came */
	uint64_t client_id; /* it may end meanwhile */
	struct process process; /* a copy */
	int fd;                 /* owned; what the client sent */
	enum access access;
	enum step step;
	struct probe probe; /* owned */
	bool owns_file;     /* file->opening is ours */
	uint64_t file;
	int leased_fd, client_fd; /* owned; opened by the pool */
	unsigned n_charged;       /* LIMIT_DESCRIPTORS, for these two */
	unsigned n_tries;
	sd_event_source *retry;
	struct open_result result;
	void (*done)(struct open_result *result, void *userdata);
	void *userdata;
	STAILQ_ENTRY(open_request) waiting;
};

static void request_free(struct open_request *q)
{
	struct offload *offload = q->broker->offload;

	sd_event_source_disable_unref(q->retry);
	offload_close(offload, q->user, q->fd);
	/* what these have been charged goes with them */
	q->n_charged -= (unsigned)(q->leased_fd >= 0) + (unsigned)(q->client_fd >= 0);
	offload_close(offload, q->user, q->leased_fd);
	offload_close(offload, q->user, q->client_fd);
	user_discharge(q->user, LIMIT_DESCRIPTORS, q->n_charged);
	probe_clear(&q->probe);
	process_clear(&q->process);
	user_unref(q->user);
	config_unref(q->config);
	free(q);
}

static void find_way(struct open_request *q);

/* The file has been opened, or not: those that wait for it go on. */
static void wake_waiting(struct file *file)
{
	STAILQ_HEAD(, open_request) woken = STAILQ_HEAD_INITIALIZER(woken);
	struct open_request *q;

	STAILQ_CONCAT(&woken, &file->waiting);
	while ((q = STAILQ_FIRST(&woken))) {
		STAILQ_REMOVE_HEAD(&woken, waiting);
		find_way(q);
	}
}

static void finish(struct open_request *q, int r)
{
	struct file *file = q->owns_file ? broker_find_file(q->broker, q->file) : NULL;

	q->result.r = r;
	q->result.fd = r == 0 ? TAKE_FD(q->client_fd) : -1;
	q->n_charged -= q->result.fd >= 0;
	q->result.file = q->file;
	if (file) {
		file->opening = false;
		file->retrying = NULL;
		if (r != 0 && file->lease.fd >= 0)
			file_touched(file, 0); /* a conversion that failed: go on trying for the lease */
		file_update(file);
		if (file->n_uses > 0)
			file_keep(file);
		wake_waiting(file);
		file_collect(file);
	}
	q->done(&q->result, q->userdata);
	request_free(q);
}

/* Writers do, as there can be only one description under a write lease. */
static bool shares_description(const struct open_request *q)
{
	return q->access == ACCESS_WRITE && backing_needs_lease(&q->probe.backing);
}

static void run(struct job *job)
{
	struct open_request *q = container_of(job, struct open_request, job);
	const struct config *config = q->config;
	struct refusal *refusal = &q->result.refusal;
	int r = 0;

	switch (q->step) {
	case STEP_PROBE:
		r = access_probe(q->fd, &q->process, config->file_systems, &q->probe, refusal);
		if (r == 0 && config->require_open_descriptor)
			r = access_check_descriptor(q->fd, q->access, refusal);
		if (r == 0)
			r = access_check_open(q->fd, &q->process, q->access, refusal);
		if (r == 0)
			r = access_check_lease(q->fd, &q->process, &q->probe, config->leases,
					       refusal);
		break;
	case STEP_OPEN:
		r = access_open(q->fd, &q->process, q->access, &q->probe, &q->leased_fd, refusal);
		if (r == 0 && !shares_description(q))
			r = access_open(q->fd, &q->process, q->access, &q->probe, &q->client_fd,
					refusal);
		break;
	case STEP_REOPEN:
		r = access_open(q->fd, &q->process, q->access, &q->probe, &q->client_fd, refusal);
		break;
	case STEP_CHECK:
		r = access_check_open(q->fd, &q->process, ACCESS_WRITE, refusal);
		break;
	}
	q->result.r = r;
}

static void go_on(struct open_request *q);

static void submit(struct open_request *q, enum step step)
{
	q->step = step;
	q->result.r = -ECANCELED; /* unless it runs */
	offload_submit_force(q->broker->offload, q->user, &q->job);
}

/* The client's part: its hold on the file. */
static int add_use(struct open_request *q, struct file *file, bool writable, uint64_t mount)
{
	struct client *client = broker_find_client(q->broker, q->client_id);
	struct use *use;
	int r;

	if (!client || client->dead)
		return -ECONNRESET;
	use = client_find_use(client, file);
	if (file->withdrawn != 0 || (use && use->revocation != 0))
		return refuse(&q->result.refusal, REFUSAL_BUSY, "revoking",
			      "%s is being withdrawn by an administrator.", file->path);
	if (!use) {
		r = client_add_use(client, file, q->access, writable, &use, &q->result.refusal);
		if (r != 0)
			return r;
		use->mount = mount;
	}
	if (use->mount != mount)
		use->mount = 0;
	use->writable |= writable;
	if (q->access == ACCESS_WRITE)
		use->access = ACCESS_WRITE;
	observe_use(use, OBSERVED_RECORDED);
	q->file = file->id;
	return 0;
}

static int share_description(struct open_request *q, struct file *file)
{
	int r;

	q->client_fd = fcntl(file->lease.fd, F_DUPFD_CLOEXEC, 3);
	r = q->client_fd < 0 ? -errno : add_use(q, file, true, file->mount);
	if (r == 0)
		sharing_add(file, q->user->uid);
	return r;
}

static int refuse_lease(struct open_request *q, int error)
{
	struct refusal *refusal = &q->result.refusal;

	switch (error) {
	case -EAGAIN:
		return refuse(refusal, REFUSAL_BUSY, "openElsewhere",
			      "%s is open elsewhere%s, which is in the way of a lease.",
			      q->probe.path, q->access == ACCESS_READ ? " for writing" : "");
	case -EACCES:
		return refuse(refusal, REFUSAL_NOT_ALLOWED, "notOwner",
			      "This broker has no CAP_LEASE, and can lease only what it owns.");
	case -EINVAL:
	case -EOPNOTSUPP:
		refuse(refusal, REFUSAL_NOT_LEASABLE, "kernel",
		       "The kernel grants no leases on this file system.");
		memcpy(refusal->file_system, q->probe.file_system, sizeof(refusal->file_system));
		return REFUSED;
	default:
		return error;
	}
}

static int on_retry(sd_event_source *source, uint64_t usec, void *userdata)
{
	go_on(userdata);
	return 0;
}

/* Waits a moment. Returns 0, or -EAGAIN when that has been done often enough, or nobody waits any more. */
static int wait_for_lease(struct open_request *q, struct file *file)
{
	uint64_t usec;
	int r;

	if (q->n_tries++ >= (store_is_busy(&q->broker->store) ? LEASE_TRIES_MORE : LEASE_TRIES) ||
	    !broker_find_client(q->broker, q->client_id))
		return -EAGAIN;
	usec = now_usec() + (LEASE_RETRY_USEC << q->n_tries) / 2;
	q->retry = sd_event_source_disable_unref(q->retry);
	r = sd_event_add_time(q->broker->event, &q->retry, CLOCK_MONOTONIC, usec, 1, on_retry, q);
	if (r >= 0)
		file->retrying = q;
	return r;
}

/* STEP_OPEN has come back: the lease. */
static void lease_file(struct open_request *q)
{
	struct file *file = broker_find_file(q->broker, q->file);
	int r;

	if (q->leased_fd >= 0) {
		/* a conversion has one already */
		offload_close(q->broker->offload, NULL, file_take_description(file));
		file->mount = q->probe.mount;
		r = file_set_description(file, TAKE_FD(q->leased_fd), q->access);
	} else {
		r = file_try_lease(file);
	}
	if (r == -EAGAIN) {
		r = wait_for_lease(q, file);
		if (r >= 0)
			return;
	}
	if (r == 0)
		r = shares_description(q) ? share_description(q, file)
					  : add_use(q, file, q->access == ACCESS_WRITE, q->probe.mount);
	else
		r = refuse_lease(q, r);
	if (r != 0 && file->n_uses == 0) /* nothing of it is to be kept */
		offload_close(q->broker->offload, NULL, file_take_description(file));
	finish(q, r);
}

/* Nobody has it open here. */
static void open_first(struct open_request *q)
{
	struct file *file;
	int r;

	r = file_new(q->broker, &q->probe, &file);
	if (r < 0) {
		finish(q, r);
		return;
	}
	q->owns_file = true;
	q->file = file->id;
	submit(q, STEP_OPEN);
}

static int refuse_settling(struct open_request *q, const struct file *file)
{
	refuse(&q->result.refusal, REFUSAL_BUSY, "settling",
	       "%s is leased for writing, and readers cannot be let in yet.", file->path);
	if (file->lease.state == LEASE_SETTLING)
		q->result.refusal.until_usec = (int64_t)file->lease.settled_usec;
	return REFUSED;
}

/* It is leased for reading, and wanted for writing: possible if it is the only client's own, and
 * nothing is pinned. */
static void convert(struct open_request *q, struct file *file)
{
	struct client *client = broker_find_client(q->broker, q->client_id);

	if (file->n_pins > 0 || file->n_uses != 1 || !client || !client_find_use(client, file)) {
		finish(q, refuse(&q->result.refusal, REFUSAL_BUSY, "heldForReading",
				 "%s is held for reading by %u client%s with %u pin%s.", file->path,
				 file->n_uses, PLURAL(file->n_uses), file->n_pins,
				 PLURAL(file->n_pins)));
		return;
	}
	q->owns_file = true;
	q->file = file->id;
	file->opening = true;
	/* Opening it for writing would break it. */
	file_give_lease(file);
	submit(q, STEP_OPEN);
}

/* What the broker knows of the inode decides how the client gets its descriptor. */
static void find_way(struct open_request *q)
{
	struct inode_key key = { q->probe.device, q->probe.inode };
	struct file *file = broker_find_inode(q->broker, key);
	const struct lease *lease;

	if (!file) {
		open_first(q);
		return;
	}
	if (file->opening) {
		STAILQ_INSERT_TAIL(&file->waiting, q, waiting);
		return;
	}
	file_update(file);
	lease = &file->lease;
	q->file = file->id;
	if (lease->state == LEASE_BREAKING)
		finish(q, refuse(&q->result.refusal, REFUSAL_BUSY, "revoking",
				 "%s is being revoked.", file->path));
	else if (!backing_needs_lease(&file->backing))
		submit(q, STEP_REOPEN);
	else if (lease->access == ACCESS_WRITE)
		submit(q, STEP_CHECK);
	else if (q->access == ACCESS_READ)
		submit(q, STEP_REOPEN);
	else
		convert(q, file);
}

/* The file has changed meanwhile, or gone, and with it the use of what was opened. */
static void begin_anew(struct open_request *q)
{
	if (q->client_fd >= 0) {
		/* the charge of this one goes with it: there is to be another */
		user_charge_force(q->user, LIMIT_DESCRIPTORS, 1);
		q->client_fd = offload_close(q->broker->offload, q->user, q->client_fd);
	}
	find_way(q);
}

/* The step's work has been done. */
static void go_on(struct open_request *q)
{
	struct file *file = broker_find_file(q->broker, q->file);
	int r = q->result.r;

	switch (q->step) {
	case STEP_PROBE:
		if (r == 0)
			find_way(q);
		else
			finish(q, r);
		break;
	case STEP_OPEN:
		if (r == 0)
			lease_file(q);
		else
			finish(q, r);
		break;
	case STEP_CHECK:
		if (!file || file->opening || file->lease.access != ACCESS_WRITE) {
			begin_anew(q);
			break;
		}
		if (r == 0)
			r = sharing_check(file, q->user->uid, &q->result.refusal);
		if (r == 0) {
			finish(q, share_description(q, file));
		} else if (r != REFUSED || q->access == ACCESS_WRITE) {
			finish(q, r);
		} else if (file->lease.state == LEASE_SETTLED) {
			submit(q, STEP_REOPEN);
		} else {
			finish(q, refuse_settling(q, file));
		}
		break;
	case STEP_REOPEN:
		if (!file || file->opening)
			begin_anew(q);
		else
			finish(q, r == 0 ? add_use(q, file, q->access == ACCESS_WRITE, q->probe.mount) : r);
		break;
	}
}

void open_give_up(struct broker *broker)
{
	struct file *file;
	uint64_t after = 0;

	while ((file = broker_next_file(broker, after))) {
		after = file->id;
		if (file->retrying)
			finish(file->retrying, -ECANCELED);
	}
}

static void on_done(struct job *job)
{
	go_on(container_of(job, struct open_request, job));
}

static int charge_descriptors(struct open_request *q, struct refusal *ret_refusal)
{
	if (user_charge(q->user, LIMIT_DESCRIPTORS, 2) < 0)
		return refuse_limit(ret_refusal, q->user, LIMIT_DESCRIPTORS);
	q->n_charged = 2;
	return 0;
}

int open_start(struct client *client, int fd, enum access access,
	       void (*done)(struct open_result *result, void *userdata), void *userdata,
	       struct refusal *ret_refusal)
{
	struct open_request *q;
	int r;

	q = calloc(1, sizeof(*q));
	if (!q)
		return -ENOMEM;
	r = process_copy(&client->process, &q->process);
	if (r < 0) {
		free(q);
		return r;
	}
	q->broker = client->broker;
	q->user = user_ref(client->user);
	q->config = config_ref(client->broker->config);
	q->client_id = client->id;
	q->fd = fd;
	q->leased_fd = q->client_fd = -1;
	q->access = access;
	q->done = done;
	q->userdata = userdata;
	q->job.run = run;
	q->job.done = on_done;
	q->step = STEP_PROBE;
	q->result.r = -ECANCELED;
	r = charge_descriptors(q, ret_refusal);
	if (r == 0 && offload_submit(q->broker->offload, q->user, &q->job) < 0)
		r = refuse_limit(ret_refusal, client->user, LIMIT_UNFINISHED);
	if (r != 0) {
		q->fd = -1;
		request_free(q);
	}
	return r;
}
