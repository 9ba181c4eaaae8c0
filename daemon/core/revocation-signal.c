/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/revocation.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>

#include "daemon/core/broker.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

/* Signals to holders that did not let go. */

struct signal_job {
	struct job job;
	struct broker *broker;
	uint64_t revocation;
	enum revocation_state rung;
	int signal;
	bool reached;
	struct process process; /* a copy */
	size_t n_fds;
	struct signal_fd {
		struct context *context; /* whose descriptor it is, and which waits for the job */
		int fd;
	} fds[];
};

static void signal_run(struct job *job)
{
	struct signal_job *j = container_of(job, struct signal_job, job);

	if (process_is_manager(j->process.pid))
		return;
	for (size_t i = 0; i < j->n_fds; i++)
		if (process_holds(j->process.pid, j->fds[i].fd)) {
			/* The holder can make the search long, and meanwhile become another user. */
			j->reached = process_is_same(&j->process) &&
				     pidfd_send_signal(j->process.pidfd, j->signal, NULL, 0) >= 0;
			return;
		}
}

static void signal_done(struct job *job)
{
	struct signal_job *j = container_of(job, struct signal_job, job);
	struct log_fields fields = {
		.revocation = j->revocation,
		.pid = j->process.pid,
		.uid = &j->process.uid,
		.unit = j->process.unit,
	};

	if (j->reached)
		log_event(LOG_WARNING, MESSAGE_REVOKE_ESCALATED, &fields,
			  "Sent SIG%s to %s (pid %d), which did not let go of its pins.",
			  sigabbrev_np(j->signal), j->process.comm, j->process.pid);
	else
		log_event(LOG_WARNING, MESSAGE_REVOKE_ESCALATED, &fields,
			  "%s (pid %d) did not let go of its pins, and was sent no signal: it is not "
			  "the process that connected any more, does not hold the context, or is the "
			  "service manager.",
			  j->process.comm, j->process.pid);
	for (size_t i = 0; i < j->n_fds; i++)
		context_release(j->fds[i].context, j->broker);
	revocation_job_done(j->broker, j->revocation, j->rung, j->reached);
	process_clear(&j->process);
	free(j);
}

int revocation_signal(struct revocation *rev, struct client *client, int sig)
{
	struct signal_job *j;
	struct context *context;

	j = calloc(1, sizeof(*j) + client->n_contexts * sizeof(struct signal_fd));
	if (!j)
		return -ENOMEM;
	if (process_copy(&client->process, &j->process) < 0) {
		free(j);
		return -ENOMEM;
	}
	j->broker = rev->broker;
	j->revocation = rev->id;
	j->rung = rev->state;
	j->signal = sig;
	LIST_FOREACH(context, &client->contexts, of_client)
		if (context->n_pins > 0 && context->fd >= 0 && !context->reaping)
			j->fds[j->n_fds++] = (struct signal_fd){ context_hold(context),
								 context->fd };
	j->job.run = signal_run;
	j->job.done = signal_done;
	offload_submit_signal(rev->broker->offload, client->user, &j->job);
	return 1;
}
