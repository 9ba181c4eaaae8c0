/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/path.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "daemon/bus/authorization.h"
#include "daemon/bus/bus.h"
#include "daemon/bus/credentials.h"
#include "daemon/bus/manager.h"
#include "daemon/core/admin.h"
#include "daemon/core/broker.h"
#include "protocol/macro.h"

struct lookup {
	struct job job;
	struct broker *broker;
	sd_bus_message *m; /* reference */
	const char *path, *reason; /* of the message */
	uint64_t timeout_usec;
	pid_t pid; /* of the caller */
	struct inode_key now;
	bool found;
};

static int open_path(const struct lookup *l)
{
	const struct open_how how = {
		.flags = O_PATH | O_CLOEXEC,
		.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
	};
	_cleanup_(close_fdp) int root = -1;
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/root", l->pid);
	root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	return root < 0 ? -1 : (int)syscall(SYS_openat2, root, l->path, &how, sizeof(how));
}

static void run(struct job *job)
{
	struct lookup *l = container_of(job, struct lookup, job);
	_cleanup_(close_fdp) int fd = open_path(l);
	struct statx stx;

	if (fd < 0 || syscall(SYS_statx, fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO,
			      &stx) < 0)
		return;
	l->now = (struct inode_key){makedev(stx.stx_dev_major, stx.stx_dev_minor), stx.stx_ino};
	l->found = true;
}

static void lookup_free(struct lookup *l)
{
	sd_bus_message_unref(l->m);
	free(l);
}

static void done(struct job *job)
{
	struct lookup *l = container_of(job, struct lookup, job);
	struct refusal refusal = {};
	uint64_t id;
	int r;

	r = admin_revoke_path(l->broker, l->path, l->found ? &l->now : NULL, l->reason,
			      l->timeout_usec, &id, &refusal);
	(void)bus_reply_revocation(l->m, r, id, &refusal);
	lookup_free(l);
}

static int submit(struct lookup *l, uid_t uid, struct refusal *ret_refusal)
{
	struct user *user;
	int r;

	r = user_get(l->broker->users, uid, &user);
	if (r < 0)
		return r;
	if (offload_submit(l->broker->offload, user, &l->job) < 0)
		r = refuse_limit(ret_refusal, user, LIMIT_UNFINISHED);
	user_unref(user);
	return r;
}

int bus_revoke_path(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct broker *broker = userdata;
	const struct bus_credentials *caller = bus_caller(broker->bus);
	struct refusal refusal = {};
	struct lookup *l;
	int r;

	l = calloc(1, sizeof(*l));
	if (!l)
		return -ENOMEM;
	l->job.run = run;
	l->job.done = done;
	l->broker = broker;
	l->pid = caller->pid;
	l->m = sd_bus_message_ref(m);
	r = sd_bus_message_read(m, "sst", &l->path, &l->reason, &l->timeout_usec);
	if (r >= 0)
		r = submit(l, caller->uid, &refusal);
	if (r == 0)
		return 1;
	lookup_free(l);
	return r < 0 ? r : bus_reply_revocation(m, r, 0, &refusal);
}
