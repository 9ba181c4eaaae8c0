/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/settle.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "daemon/core/broker.h"
#include "daemon/kernel/process.h"
#include "protocol/macro.h"

#define LISTENED_USEC (600 * USEC_PER_SEC)

struct settle_job {
	struct job job;
	struct broker *broker;
	uint64_t file;
	int fd;                    /* owned; a dup */
	_Atomic(pid_t) opening_tid; /* the thread that is in open(); 0: none */
	bool opened;
};

static void run(struct job *job)
{
	struct settle_job *j = container_of(job, struct settle_job, job);
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", j->fd);
	atomic_store(&j->opening_tid, gettid());
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
	atomic_store(&j->opening_tid, 0);
	j->opened = fd >= 0;
	safe_close(fd);
}

static void done(struct job *job)
{
	struct settle_job *j = container_of(job, struct settle_job, job);
	struct file *file = broker_find_file(j->broker, j->file);

	/* It may be the last of a large file that has no name any more. */
	offload_close(j->broker->offload, NULL, j->fd);
	if (file) {
		file->settle = NULL;
		file_settle_done(file, j->opened);
	}
	free(j);
}

int settle_start(struct file *file)
{
	struct settle_job *j;

	j = calloc(1, sizeof(*j));
	if (!j)
		return -ENOMEM;
	j->fd = fcntl(file->lease.fd, F_DUPFD_CLOEXEC, 3);
	if (j->fd < 0) {
		free(j);
		return -errno;
	}
	j->job.run = run;
	j->job.done = done;
	j->broker = file->broker;
	j->file = file->id;
	file->settle = j;
	offload_submit_uncharged(file->broker->offload, OFFLOAD_SETTLES, NULL, &j->job);
	return 0;
}

/* One that has just not been given the processor is not: it can run. */
bool settle_is_held(const struct settle_job *j)
{
	pid_t tid = atomic_load(&j->opening_tid);
	struct process_stat stat;

	return tid != 0 && process_read_stat(getpid(), tid, &stat) >= 0 &&
	       (stat.state == 'D' || stat.state == 'S') && atomic_load(&j->opening_tid) == tid;
}

uint64_t listened_until(const struct listened *l, uint64_t device)
{
	for (size_t i = 0; i < LISTENED_MAX; i++)
		if (l->places[i].device == device && l->places[i].until_usec > now_usec())
			return l->places[i].until_usec;
	return 0;
}

void listened_note(struct listened *l, uint64_t device)
{
	size_t i = 0;

	while (i < LISTENED_MAX && l->places[i].device != device)
		i++;
	if (i == LISTENED_MAX)
		i = l->next++ % LISTENED_MAX;
	l->places[i].device = device;
	l->places[i].until_usec = now_usec() + LISTENED_USEC;
}
