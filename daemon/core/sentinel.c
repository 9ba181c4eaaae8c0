/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/sentinel.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "protocol/macro.h"

#define SIGNALS_PER_TURN 64
#define RETRY_MSEC       100 /* a process that could not be forked is tried again */

/* The kernel's own calls: those of the C library leave two signals out, which a client can choose
 * as well. */

static int set_blocked(uint64_t mask, uint64_t *ret_before)
{
	return (int)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, ret_before, sizeof(mask));
}

static int open_signals(uint64_t mask)
{
	return (int)syscall(SYS_signalfd4, -1, &mask, sizeof(mask), SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Returns 0, -EAGAIN if there is no room, or what ended the broker. */
static int send_hint(int fd, const struct hint *hint, int flags)
{
	ssize_t n = send(fd, hint, sizeof(*hint), flags | MSG_NOSIGNAL);

	return n < 0 ? -errno : 0;
}

/* Waits for any of the two, the second of which is the socket: it ends with the broker. */
static void wait_for_any(struct pollfd pollfds[static 2], int timeout_msec)
{
	if (poll(pollfds, 2, timeout_msec) < 0 && errno != EINTR)
		_exit(EXIT_FAILURE);
	if (pollfds[1].revents & (POLLHUP | POLLERR))
		_exit(EXIT_SUCCESS);
}

/* Ends with its parent, which may have ended on the way here. */
static void end_with(pid_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
		_exit(EXIT_FAILURE);
}

static int drop_descriptors(int kept)
{
	if (kept > 0 && close_range(0, (unsigned)kept - 1, 0) < 0)
		return -errno;
	return close_range((unsigned)kept + 1, ~0U, 0) < 0 ? -errno : 0;
}

/* ---- The sentinel ---- */

static bool is_among(
	const struct signalfd_siginfo *si, const struct signalfd_siginfo *before, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (before[i].ssi_signo == si->ssi_signo && before[i].ssi_fd == si->ssi_fd)
			return true;
	return false;
}

/* Passes on what is pending, once for each file. Returns false if there was no room for something.
 */
static bool pass_on(int signals, int fd)
{
	struct signalfd_siginfo si[SIGNALS_PER_TURN];
	ssize_t size = read(signals, si, sizeof(si));
	size_t n = size > 0 ? (size_t)size / sizeof(si[0]) : 0;

	for (size_t i = 0; i < n; i++) {
		const struct hint hint = {HINT_SIGNAL, (int)si[i].ssi_signo, si[i].ssi_fd};

		if (!is_among(&si[i], si, i) && send_hint(fd, &hint, MSG_DONTWAIT) < 0)
			return false;
	}
	return true;
}

static _Noreturn void listen_for_breaks(int fd, pid_t keeper)
{
	const struct hint missed = {.kind = HINT_MISSED};
	struct pollfd pollfds[2] = {{.events = POLLIN}, {.fd = fd}};
	bool complete = true;

	end_with(keeper);
	(void)prctl(PR_SET_NAME, "pb-sentinel");
	if (drop_descriptors(fd) < 0 || (pollfds[0].fd = open_signals(UINT64_MAX)) < 0)
		_exit(EXIT_FAILURE);
	for (;;) {
		pollfds[1].events = complete ? 0 : POLLOUT;
		wait_for_any(pollfds, -1);
		if (!complete)
			complete = send_hint(fd, &missed, MSG_DONTWAIT) >= 0;
		if (pollfds[0].revents & POLLIN)
			complete &= pass_on(pollfds[0].fd, fd);
	}
}

/* ---- The keeper ---- */

struct keeper {
	int fd; /* to the broker */
	pid_t pid, group;
	pid_t sentinel, spare; /* 0: none at present */
};

static pid_t fork_sentinel(const struct keeper *k)
{
	pid_t pid = fork();

	if (pid == 0)
		listen_for_breaks(k->fd, k->pid);
	return pid > 0 ? pid : 0;
}

/* One that is stopped is of no more use than a dead one. It is not reaped yet. */
static bool has_ended(pid_t pid)
{
	siginfo_t si = {};

	if (waitid(P_PID, (id_t)pid, &si, WEXITED | WSTOPPED | WNOHANG | WNOWAIT) < 0 ||
		si.si_pid == 0)
		return false;
	if (si.si_code == CLD_STOPPED)
		(void)kill(pid, SIGKILL);
	return true;
}

static void reap(pid_t pid)
{
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

/* Returns false if there is nobody who could hear. */
static bool replace_sentinel(struct keeper *k)
{
	struct hint hint = {.kind = HINT_DEAF};
	bool replaced = k->spare > 0 && setpgid(k->spare, k->group) >= 0;

	if (replaced) {
		reap(k->sentinel);
		k->sentinel = k->spare;
		k->spare = 0;
		hint.kind = HINT_REPLACED;
	}
	(void)send_hint(k->fd, &hint, 0);
	return replaced;
}

/* Sees to it that there are both. Returns false if that has to be tried again later. */
static bool complete(struct keeper *k)
{
	do {
		if (k->spare > 0 && has_ended(k->spare)) {
			reap(k->spare);
			k->spare = 0;
		}
		if (k->spare == 0)
			k->spare = fork_sentinel(k);
		if (!has_ended(k->sentinel))
			return k->spare > 0;
	} while (replace_sentinel(k));
	return false;
}

static _Noreturn void keep(struct keeper *k)
{
	struct pollfd pollfds[2] = {{.events = POLLIN}, {.fd = k->fd}};
	struct signalfd_siginfo si;

	pollfds[0].fd = open_signals(1ULL << (SIGCHLD - 1));
	if (pollfds[0].fd < 0)
		_exit(EXIT_FAILURE);
	for (;;) {
		int timeout = complete(k) ? -1 : RETRY_MSEC;

		wait_for_any(pollfds, timeout);
		(void)!read(pollfds[0].fd, &si, sizeof(si));
	}
}

static int drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};

	return syscall(SYS_capset, &header, data) < 0 ? -errno : 0;
}

static _Noreturn void run_keeper(int fd, pid_t broker)
{
	struct keeper k = {.fd = fd, .pid = getpid()};
	struct hint hint = {.kind = HINT_STARTED};
	int r;

	(void)prctl(PR_SET_NAME, "pb-keeper");
	signal(SIGCHLD,
		SIG_DFL); /* where it was ignored, dead children would not wait to be reaped */
	r = drop_descriptors(fd);
	if (r >= 0)
		r = drop_capabilities();
	end_with(broker);
	if (r >= 0) {
		k.sentinel = fork_sentinel(&k);
		r = k.sentinel > 0 && setpgid(k.sentinel, k.sentinel) >= 0 ? 0 : -errno;
	}
	k.group = k.sentinel;
	hint.signal = -r;
	hint.fd = k.group;
	if (send_hint(fd, &hint, 0) < 0 || r < 0)
		_exit(EXIT_FAILURE);
	keep(&k);
}

/* ---- The broker ---- */

static int wait_for_start(struct sentinel *s)
{
	struct hint hint;
	ssize_t n;

	do
		n = recv(s->fd, &hint, sizeof(hint), 0);
	while (n < 0 && errno == EINTR);
	if (n != (ssize_t)sizeof(hint))
		return n < 0 ? -errno : -ECHILD;
	s->group = hint.fd;
	return -hint.signal;
}

int sentinel_start(struct sentinel *ret)
{
	struct sentinel s = {};
	pid_t broker = getpid();
	uint64_t before;
	int fds[2], r;

	*ret = (struct sentinel){.fd = -1};
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) < 0)
		return -errno;
	/* no signal finds them unprepared */
	if (set_blocked(UINT64_MAX, &before) < 0) {
		r = -errno;
		safe_close(fds[0]);
		safe_close(fds[1]);
		return r;
	}
	s.fd = fds[0];
	s.keeper = fork();
	r = s.keeper < 0 ? -errno : 0;
	if (s.keeper == 0)
		run_keeper(fds[1], broker);
	(void)set_blocked(before, NULL);
	safe_close(fds[1]);
	if (r >= 0)
		r = wait_for_start(&s);
	if (r < 0)
		sentinel_stop(&s);
	else
		*ret = s;
	return r;
}

void sentinel_stop(struct sentinel *s)
{
	if (s->fd < 0)
		return;
	s->fd = safe_close(s->fd);
	s->group = 0;
	if (s->keeper > 0)
		reap(s->keeper);
}

int sentinel_receive(const struct sentinel *s, struct hint *ret)
{
	ssize_t n = recv(s->fd, ret, sizeof(*ret), MSG_DONTWAIT);

	if (n == (ssize_t)sizeof(*ret))
		return 1;
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	return n < 0 ? -errno : -EPIPE;
}
