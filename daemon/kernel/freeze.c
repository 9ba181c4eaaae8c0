/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/freeze.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/pidfd.h>
#include <sys/queue.h>

#include "daemon/kernel/search.h"
#include "protocol/macro.h"

/* Scans, before those who fork faster than they are stopped are given up. */
#define ROUNDS_MAX 8

/* A process that is to stand still. Jobs for several of its contexts may want that at a time: the
 * last to be done lets it go on. */
struct standstill {
	pid_t pid;
	unsigned n_wanted;
	bool by_us;
	LIST_ENTRY(standstill) link;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static LIST_HEAD(, standstill) standstills = LIST_HEAD_INITIALIZER(standstills);

struct holder {
	pid_t pid;
	int pidfd; /* owned */
	struct standstill *standstill;
};

static struct standstill *standstill_get(pid_t pid)
{
	struct standstill *s;

	pthread_mutex_lock(&lock);
	LIST_FOREACH(s, &standstills, link)
		if (s->pid == pid)
			break;
	if (!s) {
		s = calloc(1, sizeof(*s));
		if (s) {
			s->pid = pid;
			LIST_INSERT_HEAD(&standstills, s, link);
		}
	}
	if (s)
		s->n_wanted++;
	pthread_mutex_unlock(&lock);
	return s;
}

static void standstill_put(struct standstill *s, int pidfd)
{
	pthread_mutex_lock(&lock);
	if (--s->n_wanted == 0) {
		if (s->by_us)
			(void)pidfd_send_signal(pidfd, SIGCONT, NULL, 0);
		LIST_REMOVE(s, link);
		free(s);
	}
	pthread_mutex_unlock(&lock);
}

/* The rule of kill(2): what the client could do itself hurts nobody. */
static bool may_stop(const struct holders *holders, pid_t pid)
{
	struct uids u;

	return holders->uid == 0 ||
	       (process_uids(pid, &u) == 0 && (u.real == holders->uid || u.saved == holders->uid));
}

/* Stops it unless it is stopped, and waits until it is. */
static int holder_stop(const struct holders *holders, struct holder *h)
{
	int r;

	pthread_mutex_lock(&lock);
	r = process_is_stopped(h->pid);
	/* Looking at its threads can take long, and it may have become another user meanwhile. */
	if (r == 0 && !may_stop(holders, h->pid))
		r = pidfd_send_signal(h->pidfd, 0, NULL, 0) < 0 ? -errno : -EPERM;
	if (r == 0) {
		r = pidfd_send_signal(h->pidfd, SIGSTOP, NULL, 0) < 0 ? -errno : 0;
		h->standstill->by_us |= r == 0;
	}
	pthread_mutex_unlock(&lock);
	return r != 0 ? r : process_wait_stopped(h->pid, holders->end_usec);
}

/* Takes pidfd over. */
static int add(struct holders *holders, pid_t pid, int pidfd)
{
	struct holder h = { .pid = pid, .pidfd = pidfd };

	if (holders->n == holders->n_allocated) {
		size_t n = holders->n_allocated * 2 + 4;
		struct holder *list = realloc(holders->list, n * sizeof(*list));

		if (!list)
			goto no_memory;
		holders->list = list;
		holders->n_allocated = n;
	}
	h.standstill = standstill_get(pid);
	if (!h.standstill)
		goto no_memory;
	holders->list[holders->n++] = h;
	return holder_stop(holders, &h);

no_memory:
	safe_close(pidfd);
	return -ENOMEM;
}

static bool is_listed(const struct holders *holders, pid_t pid)
{
	for (size_t i = 0; i < holders->n; i++)
		if (holders->list[i].pid == pid)
			return true;
	return false;
}

static int stop_process(struct holders *holders, pid_t pid)
{
	_cleanup_(close_fdp) int pidfd = pidfd_open(pid, 0);
	int r;

	if (pidfd < 0)
		return -errno;
	/* The number may have been another's before. */
	r = search_process(pid, holders->fd);
	if (r <= 0)
		return r < 0 ? r : -ESRCH;
	if (!may_stop(holders, pid))
		return -EPERM;
	return add(holders, pid, TAKE_FD(pidfd));
}

static int on_holder(pid_t pid, void *userdata)
{
	struct holders *holders = userdata;
	int r;

	/* The service manager cannot be stopped, and need not be: it stores descriptors, and uses
	 * none. */
	if (process_is_manager(pid) || is_listed(holders, pid))
		return 0;
	r = stop_process(holders, pid);
	if (r == -ESRCH)
		return 0;
	holders->result = r;
	return r < 0;
}

int holders_stop(int fd, const struct process *client, bool client_alive, uint64_t timeout_usec,
		 struct holders *ret)
{
	struct search search = { .fd = fd, .holder = client, .found = on_holder, .userdata = ret };
	size_t n_before;
	int r;

	*ret = (struct holders){
		.fd = fd,
		.uid = client->uid,
		.end_usec = now_usec() + timeout_usec,
	};
	if (client_alive && process_is_manager(client->pid))
		return -EPERM;
	if (client_alive) {
		int pidfd = fcntl(client->pidfd, F_DUPFD_CLOEXEC, 3);

		r = pidfd < 0 ? -errno : add(ret, client->pid, pidfd);
		if (r < 0 && r != -ESRCH)
			return r;
	}
	/* Those who run meanwhile may fork: until a scan finds nobody else. */
	for (unsigned i = 0; i < ROUNDS_MAX; i++) {
		n_before = ret->n;
		r = search_run(&search);
		if (r != 0)
			return r < 0 ? r : ret->result;
		if (search.unseen != 0)
			return -EACCES;
		if (ret->n == n_before)
			return 0;
	}
	return -ETIMEDOUT;
}

void holders_continue(struct holders *holders)
{
	for (size_t i = 0; i < holders->n; i++) {
		struct holder *h = &holders->list[i];

		standstill_put(h->standstill, h->pidfd);
		safe_close(h->pidfd);
	}
	free(holders->list);
}

static int continue_left(pid_t pid, void *userdata)
{
	const struct holders *holders = userdata;
	int pidfd = pidfd_open(pid, 0);

	if (pidfd >= 0 && !process_is_manager(pid) && process_is_stopped(pid) > 0 && may_stop(holders, pid))
		(void)pidfd_send_signal(pidfd, SIGCONT, NULL, 0);
	safe_close(pidfd);
	return 0;
}

void holders_continue_left(int fd, const struct process *client)
{
	struct holders holders = { .fd = fd, .uid = client->uid };
	struct search search = { .fd = fd, .found = continue_left, .userdata = &holders };

	if (process_is_same(client))
		(void)continue_left(client->pid, &holders);
	(void)search_run(&search);
}
