/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/kernel/backing.h"
#include "daemon/kernel/process.h"
#include "daemon/util/config.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

/*
 * What a client's descriptor of a data file is, and opening it as that client. All of it runs on the
 * offload pool, with the client's credentials and without CAP_DAC_*: the kernel decides what a client may
 * open.
 */

struct probe {
	dev_t device;
	ino_t inode;
	uint64_t mount;      /* its identifier */
	dev_t mount_device;  /* of the file system, where mounts are listed */
	uid_t owner;
	uint64_t size;
	struct backing backing;
	char *path; /* owned; as /proc tells it */
	char file_system[32];
};

/*
 * Finds out what a descriptor is, touching it only in ways that no file system can delay, unless the client's
 * mount table does not have its mount: then the file is asked. REFUSED with *ret_refusal if it is neither
 * a regular file on one of `file_systems`, nor a device-DAX; ret_refusal->file_system is set even then, where
 * it is known.
 */
int access_probe(int fd, const struct process *client, char *const *file_systems,
		 struct probe *ret, struct refusal *ret_refusal);
void probe_clear(struct probe *probe);

/* REFUSED if the client may not have a lease put on the file: see Leases= in pinbroker.conf. */
int access_check_lease(int fd, const struct process *client, const struct probe *probe,
		       enum leases leases, struct refusal *ret_refusal);

/* REFUSED if the descriptor does not itself prove the access: RequireOpenDescriptor=. */
int access_check_descriptor(int fd, enum access access, struct refusal *ret_refusal);

/* REFUSED if the client may not open the file so; opens nothing. */
int access_check_open(int fd, const struct process *client, enum access access,
		      struct refusal *ret_refusal);

/* Opens the file anew as the client, never waiting for anybody's lease. REFUSED if the client may not,
 * or if somebody else's lease is in the way. */
int access_open(int fd, const struct process *client, enum access access,
		const struct probe *probe, int *ret_fd, struct refusal *ret_refusal);
