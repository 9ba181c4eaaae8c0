/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "daemon/util/user.h"

/* pinbroker.conf and the drop-ins beside it. */

#define CONFIG_FILE "/etc/pinbroker/pinbroker.conf"

enum leases { LEASES_OWNER, LEASES_WRITERS };
enum readers { READERS_WAIT, READERS_ADMIT };

struct config {
	unsigned n_refs; /* jobs on the pool read it: it is replaced as a whole, never changed */

	/* [Revocation] */
	uint64_t revoke_grace_usec; /* RevokeGraceSec=10s */
	int signal_on_timeout;      /* SignalOnTimeout=SIGBUS, a signal's name, or "none": 0 */
	uint64_t signal_grace_usec; /* SignalGraceSec=5s */
	bool force_unmap;           /* ForceUnmap=no */

	/* [Files] */
	enum leases leases;           /* Leases=writers */
	enum readers readers;         /* Readers=wait */
	bool require_open_descriptor; /* RequireOpenDescriptor=no */
	char **file_systems; /* FileSystems=ext2 ext3 ext4 xfs btrfs tmpfs hugetlbfs; NULL-terminated */

	/* [Limits], "infinity": UINT64_MAX */
	uint64_t limits[LIMIT_COUNT]; /* MaxClientsPerUser=256 MaxFilesPerUser=1024
					 MaxContextsPerUser=256 MaxPinsPerUser=131072
					 MaxPinnedBytesPerUser=infinity MaxUnfinishedPerUser=64
					 MaxDescriptorsPerUser=infinity MaxQueuedBytesPerUser=64M */
};

/*
 * Reads `path`, or, if NULL, CONFIG_FILE, and then the *.conf files in `path`.d in the order of their
 * names. What is missing keeps its default. An unknown section or key, or a value that is wrong, is
 * logged as a warning with file and line, and the default (or what an earlier line said) stays. A
 * CONFIG_FILE that does not exist is fine; a `path` that was given and cannot be read is an error:
 * returns negative errno. Time spans are "500ms", "10s", "1min 30s", or a bare number of seconds; sizes
 * "64G" with K, M, G, T to the base 1024; booleans as systemd has them.
 */
int config_load(const char *path, struct config *ret);
void config_clear(struct config *config);

/* The same, allocated, with one reference for the caller. References are taken and given on the
 * loop alone. */
int config_read(const char *path, struct config **ret);
struct config *config_ref(struct config *config);
struct config *config_unref(struct config *config); /* accepts NULL, returns NULL */
