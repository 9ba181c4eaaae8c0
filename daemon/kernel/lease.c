/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/lease.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "daemon/kernel/process.h"
#include "protocol/macro.h"

#ifndef F_GETOWNER_UIDS
#define F_GETOWNER_UIDS 17 /* linux/fcntl.h, which does not go together with fcntl.h */
#endif

static pid_t sentinel_group; /* 0: there is no sentinel */

void lease_set_sentinel(pid_t group)
{
	sentinel_group = group;
}

static struct f_owner_ex lease_owner(const struct lease *lease)
{
	return lease_is_shared(lease) && sentinel_group > 0
		       ? (struct f_owner_ex){ F_OWNER_PGRP, sentinel_group }
		       : (struct f_owner_ex){ F_OWNER_PID, getpid() };
}

int lease_own(const struct lease *lease)
{
	const struct f_owner_ex owner = lease_owner(lease);

	return fcntl(lease->fd, F_SETOWN_EX, &owner) < 0 ||
			       fcntl(lease->fd, F_SETSIG, LEASE_SIGNAL) < 0
		       ? -errno
		       : 0;
}

int lease_take(struct lease *lease)
{
	int r;

	assert(lease->state == LEASE_NONE);

	/* The owner would be the calling thread otherwise; and F_UNLCK clears F_SETSIG. */
	r = lease_own(lease);
	if (r < 0)
		return r;
	if (fcntl(lease->fd, F_SETLEASE, lease->access == ACCESS_WRITE ? F_WRLCK : F_RDLCK) < 0)
		return -errno;
	lease->state = lease->access == ACCESS_WRITE ? LEASE_WRITE : LEASE_READ;
	lease->unheard = false;
	lease->looked_usec = now_usec();
	return 0;
}

/* With the lease goes who hears of it. */
static bool has_no_owner(const struct lease *lease)
{
	struct f_owner_ex owner;

	return fcntl(lease->fd, F_GETSIG) == 0 &&
	       fcntl(lease->fd, F_GETOWN_EX, &owner) >= 0 && owner.pid == 0;
}

enum lease_tampering lease_inspect(const struct lease *lease, uid_t *ret_uid)
{
	const struct f_owner_ex expected = lease_owner(lease);
	int signal = fcntl(lease->fd, F_GETSIG);
	struct f_owner_ex owner;
	uid_t uids[2];
	bool owned, known, ours;

	if (lease->state == LEASE_NONE || fcntl(lease->fd, F_GETOWN_EX, &owner) < 0)
		return LEASE_UNTOUCHED;
	/* F_SETOWN to the same once more shows only there: from then on the kernel asks what its caller may. */
	known = fcntl(lease->fd, F_GETOWNER_UIDS, uids) >= 0;
	ours = !known || (uids[0] == getuid() && uids[1] == geteuid());
	owned = ours && owner.type == expected.type && owner.pid == expected.pid;
	if (owned && signal == LEASE_SIGNAL)
		return LEASE_UNTOUCHED;
	/* the lease has gone, which lease_look() sees */
	if (owner.pid == 0 && signal == 0 && fcntl(lease->fd, F_GETLEASE) == F_UNLCK)
		return LEASE_UNTOUCHED;
	(void)lease_own(lease);
	if (owned)
		return LEASE_RESIGNALLED;
	/* F_SETOWN to nobody leaves the uids of before */
	if (!known || (ours && owner.pid == 0))
		return LEASE_DISOWNED;
	*ret_uid = uids[0];
	return LEASE_REOWNED;
}

int lease_resume(struct lease *lease, uint64_t since_usec)
{
	int type;

	/* a process that has ended can be signalled no more */
	(void)lease_own(lease);
	if (lease->state == LEASE_NONE) /* it may have been killed on the way here */
		(void)fcntl(lease->fd, F_SETLEASE, F_UNLCK);
	if (!lease_is_held(lease))
		return 0;
	type = fcntl(lease->fd, F_GETLEASE);
	if (type != F_RDLCK && type != F_WRLCK) {
		/* under break, or taken away already */
		lease->state = LEASE_BREAKING;
		lease->broken_usec = since_usec;
		return 0;
	}
	/* The same once more changes nothing but the descriptor in the signal. What readers have
	 * broken or are breaking cannot be asked for again. */
	return type == F_WRLCK || lease->access == ACCESS_READ
		       ? fcntl(lease->fd, F_SETLEASE, type) < 0
		       : 1;
}

/* The kernel does not take one away that was whole a moment ago. */
static bool was_stripped(const struct lease *lease)
{
	return lease_is_shared(lease) && has_no_owner(lease) &&
	       now_usec() - lease->looked_usec < lease_break_usec();
}

/* Fails if somebody has the file open by now. */
static int regain(struct lease *lease)
{
	lease->state = LEASE_NONE;
	return lease_take(lease);
}

int lease_find_line(const struct lease *lease, struct lease_line *ret)
{
	_cleanup_(freep) char *info = NULL;
	unsigned major, minor;
	struct lease_line l;
	int r;

	/* those of the description itself: "lock: 1: LEASE  BREAKING  UNLCK 5531 00:1b:3 0 EOF" */
	r = proc_read(&info, "/proc/self/fdinfo/%d", lease->fd);
	if (r < 0)
		return r;
	for (char *p = info; (p = strstr(p, "\nlock:")); p++)
		if (sscanf(p, " lock: %*d: LEASE %*s %*s %d %x:%x:%" SCNu64, &l.pid, &major, &minor,
			   &l.inode) == 4) {
			l.device = makedev(major, minor);
			*ret = l;
			return 1;
		}
	return 0;
}

static bool is_gone(const struct lease *lease)
{
	struct lease_line line;

	return lease_find_line(lease, &line) == 0;
}

enum lease_event lease_look(struct lease *lease)
{
	int type;

	if (lease->state == LEASE_NONE)
		return LEASE_INTACT;
	/* Under break F_GETLEASE tells what the breaker wants it to become: F_UNLCK, as of a lease that is gone. */
	type = fcntl(lease->fd, F_GETLEASE);
	if (type != F_RDLCK && type != F_WRLCK && is_gone(lease)) {
		if (lease_is_held(lease) && was_stripped(lease) && regain(lease) >= 0)
			return LEASE_STRIPPED;
		lease->state = LEASE_NONE;
		lease->unheard = true;
		return LEASE_GONE;
	}
	if (lease->state == LEASE_BREAKING)
		return LEASE_INTACT;
	if (type != F_RDLCK && type != F_WRLCK) {
		lease->state = LEASE_BREAKING;
		lease->broken_usec = now_usec();
		lease->unheard = true;
		return LEASE_WRITER;
	}
	lease->looked_usec = now_usec();
	if (lease->state != LEASE_WRITE || type != F_RDLCK)
		return LEASE_INTACT;
	lease->unheard = true;
	return LEASE_READER;
}

bool lease_hear(struct lease *lease)
{
	bool unheard = lease->unheard;

	lease->unheard = false;
	return unheard;
}

void lease_settle(struct lease *lease, uint64_t break_usec)
{
	assert(lease->state == LEASE_WRITE);

	lease->state = LEASE_SETTLING;
	lease->settled_usec = now_usec() + break_usec;
}

void lease_settled(struct lease *lease)
{
	if (lease->state == LEASE_SETTLING)
		lease->state = LEASE_SETTLED;
}

int lease_give(struct lease *lease)
{
	if (lease->state == LEASE_NONE)
		return 0;
	lease->state = LEASE_NONE;
	return fcntl(lease->fd, F_SETLEASE, F_UNLCK) < 0 ? -errno : 0;
}

uint64_t lease_break_usec(void)
{
	static int fd = -1; /* stays open: it is read anew for each break, as it can be changed at any time */
	char buffer[32];
	uint64_t seconds;
	ssize_t n;

	if (fd < 0)
		fd = open("/proc/sys/fs/lease-break-time", O_RDONLY | O_CLOEXEC);
	n = pread(fd, buffer, sizeof(buffer) - 1, 0);
	if (n <= 0)
		return 45 * USEC_PER_SEC;
	buffer[n] = 0;
	seconds = strtoull(buffer, NULL, 10);
	return seconds > 0 ? seconds * USEC_PER_SEC : USEC_INFINITY;
}
