/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <sys/types.h>

/*
 * The owner of leases whose description clients share. A client can choose the signal of such a
 * break (F_SETSIG), SIGKILL and SIGSTOP too, and the kernel delivers it, because root has set the
 * owner. So the owner is a process group with one small process in it, which passes on what it
 * hears:
 *
 *     broker ── keeper ──┬─ sentinel, alone in the group: sends hints to the broker
 *                        └─ spare
 *
 * When the sentinel has died or is stopped, the keeper moves the spare into the group before it
 * reaps the dead one. So the group stays, and no lease has to be set anew; the broker looks at all
 * of them.
 *
 * All three keep the broker's uid, which pending signals are charged to. They have no capability
 * and no descriptor of the broker's, block every signal, and end with the broker.
 */

struct sentinel {
	int fd;       /* owned; where hints come from; -1: there is no sentinel */
	pid_t keeper; /* a child */
	pid_t group;
};

enum hint_kind {
	HINT_SIGNAL,   /* a signal was heard: where to look, nothing more */
	HINT_MISSED,   /* signals were heard, for which there was no room in the socket */
	HINT_REPLACED, /* the sentinel was killed or stopped; another one hears from now on */
	HINT_DEAF,     /* … and there is no other one for the moment; repeated until there is */
	HINT_STARTED,  /* the first of all: the group */
};

struct hint {
	enum hint_kind kind;
	int signal; /* HINT_SIGNAL; HINT_STARTED: 0, or an errno */
	int fd;     /* HINT_SIGNAL: si_fd; HINT_STARTED: the group */
};

/* Forks the keeper, and waits until the sentinel listens. To be called by the main thread while
 * there is no other, and while there is little memory to copy. */
int sentinel_start(struct sentinel *ret);
/* Ends them. */
void sentinel_stop(struct sentinel *sentinel);

/* Takes the next hint. Returns 1; 0 if there is none at present; negative errno if there will be no
 * more. */
int sentinel_receive(const struct sentinel *sentinel, struct hint *ret);
