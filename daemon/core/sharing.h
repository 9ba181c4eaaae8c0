/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <sys/queue.h>
#include <sys/types.h>

#include "daemon/kernel/lease.h"
#include "daemon/util/refusal.h"

/*
 * Clients that share the leased description of a file can turn it against each other: choose the
 * signal of a break (F_SETSIG), or who hears of it (F_SETOWN), or give the lease up (F_SETLEASE).
 * Nothing tells of that. So descriptions that several uids were given are looked at every 100 ms,
 * others with each sweep. What was changed is put right, and the file is shared with no further
 * uid; and if it is known who did it, his clients of the file are disconnected and their pins
 * revoked at once, else all of the file's, with the time to let go.
 */

struct broker;
struct file;
struct sharings;

/* Of a file's description; all zero while nobody was given it. */
struct sharing {
	bool handed_out;  /* to a client of uid */
	bool several;     /* … and to one of another: sharings::files */
	bool tampered;    /* something was done to it: it is handed to no further uid */
	bool has_culprit; /* … and this is who did it */
	uid_t uid, culprit;
	enum lease_tampering seen; /* … of which nothing has followed yet */
	uid_t seen_uid;            /* LEASE_REOWNED: who did it */
	TAILQ_ENTRY(file) of_sharings;
};

int sharings_new(struct broker *broker, struct sharings **ret);
struct sharings *sharings_free(struct sharings *sharings);

/* May a client of that uid be given the description? 0, or REFUSED. */
int sharing_check(const struct file *file, uid_t uid, struct refusal *ret_refusal);
/* May he pin it? */
int sharing_check_pin(const struct file *file, uid_t uid, struct refusal *ret_refusal);
/* He was given it. */
void sharing_add(struct file *file, uid_t uid);
/* The run before left it so. */
void sharing_resume(struct file *file, bool several, bool tampered);
/* The file gets another description, or none. */
void sharing_clear(struct file *file);

/* Sees what has been done to the description, and puts it right; before the lease may be let go,
 * and the traces with it. What follows has to wait for sharing_look(). */
void sharing_inspect(struct file *file);
void sharing_stripped(struct file *file);
/* Looks at the lease, as file_update() does, and acts on what was seen. May free the file. Not to
 * be called while a client's call is being handled. */
void sharing_look(struct file *file);
