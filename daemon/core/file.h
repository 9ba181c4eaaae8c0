/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include <systemd/sd-event.h>

#include "daemon/core/change.h"
#include "daemon/core/pin.h"
#include "daemon/core/sharing.h"
#include "daemon/kernel/backing.h"
#include "daemon/kernel/inotify.h"
#include "daemon/kernel/lease.h"
#include "daemon/manager/fd-store.h"
#include "protocol/interface.h"

struct broker;
struct open_request;
struct probe;
struct revocation;
struct settle_job;
struct use;

/* (st_dev, st_ino) */
struct inode_key {
	uint64_t device, inode;
};

/*
 * A data file: one inode, the broker's own description of it, and the lease on that. It lives while
 * somebody uses it. file_update() is the one place that decides what becomes of the lease.
 */
struct file {
	uint64_t id;
	struct broker *broker; /* broker::files, by id and inode; by the lease's fd, if it has one */
	struct inode_key key;
	char *path; /* owned; as it was when opened, for people */
	uint64_t mount;        /* that the description was opened through; 0: not known */
	uint64_t mount_device; /* of the file system, where mounts are listed */
	char file_system[32];
	struct backing backing;
	uint64_t device_size; /* of a device-DAX, for which fstat() says 0 */
	struct lease lease; /* its fd < 0: being opened */
	bool opening;       /* an open request is at work on it; others wait */
	struct open_request *retrying; /* the one, while it waits to try the lease again, or NULL */
	STAILQ_HEAD(, open_request) waiting; /* for that one */

	struct pin_ranges pins;
	unsigned n_pins;
	unsigned n_on_demand; /* of them */
	unsigned n_wanted;    /* of them, those that a revocation wants gone */
	LIST_HEAD(, use) uses; /* owned by the clients */
	unsigned n_uses;

	uint64_t withdrawn; /* the revocation with which an administrator wants it closed, or 0 */
	struct revocation *revocation; /* the one that a break of the lease has started, or NULL */
	bool unguarded;                /* it has pins, but no lease */
	bool exposed;                  /* … and some of them hold pages */
	struct store_copy copy;        /* the service manager's, of the description */
	struct sharing sharing;        /* sharing.c's: who was given the description */
	struct lease recorded;         /* what was last written into the state */
	struct change change;          /* what is done to it all the same */
	struct settle_job *settle;     /* the job that opens the file as a reader would, or NULL */
	struct watched watched;        /* by inotify */
	uint64_t retry_usec;           /* the present back-off */
	sd_event_source *timer;        /* settling, or taking the lease again */

	RB_ENTRY(file) by_id, by_inode, by_fd;
};

/* Those of its pins that hold pages. */
static inline unsigned file_n_pinning(const struct file *file)
{
	return file->n_pins - file->n_on_demand;
}

/* A file that is being opened. */
int file_new(struct broker *broker, const struct probe *probe, struct file **ret);
struct file *file_free(struct file *file);
/* Frees it if nobody uses it any more, or it is withdrawn and nobody pins it. */
void file_collect(struct file *file);
/*
 * An administrator wants it gone from here, as before an umount: nothing more is pinned, and once the last
 * pin has ended the broker closes its own descriptors. Its clients are told when they next name it.
 * To be called when the revocation of its pins has been started; may free it.
 */
void file_withdraw(struct file *file, uint64_t revocation);

/* Gives it a description to carry the lease, taken over, and tries the lease: 0, or what lease_take()
 * says, with the description in place all the same. */
int file_set_description(struct file *file, int fd, enum access access);
/* Lets the lease go, to open the file otherwise. */
void file_give_lease(struct file *file);
/* Tries once more. */
int file_try_lease(struct file *file);
/* Takes the description away, lease and all, and returns it. */
int file_take_description(struct file *file);

/* One of the run before: its description, with the lease as it was then. When its pins are there again, it goes
 * on. */
void file_resume(struct file *file, const struct lease *lease);
void file_go_on(struct file *file);

/* Has the service manager keep a copy of the description, if it has none. */
void file_keep(struct file *file);

/* Readers= of the configuration, as far as the kernel lets it be. */
bool file_admits_readers(const struct broker *broker);

/* Looks at the lease and does what follows. To be called whenever anything may have changed. */
void file_update(struct file *file);
/* It has been opened as a reader would, to settle its lease: with success? */
void file_settle_done(struct file *file, bool opened);
/* Something of it, up to `end`, has been pinned. */
void file_pinned(struct file *file, uint64_t end);
/* inotify saw something. */
void file_touched(struct file *file, uint32_t mask);
/* The revocation that a break started has ended: the lease may go. lost: with pins alive. */
void file_revocation_ended(struct file *file, bool lost);

/* Tries to have the lease, now. */
bool file_ensure_lease(struct file *file);

/* Its size, or negative errno. */
int64_t file_size(const struct file *file);

void file_info(const struct file *file, struct msg_file_info *ret);
