/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/core/selection.h"
#include "daemon/util/refusal.h"

struct broker;
struct inode_key;

/*
 * Revocations on an administrator's word. reason: for people, may be empty. timeout_usec: the time to
 * let go; 0: RevokeGraceSec=. Each returns 0 and the revocation's id, REFUSED, or negative errno.
 */
int admin_revoke_pins(struct broker *broker, const uint64_t *pins, size_t n_pins,
		      const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
		      struct refusal *ret_refusal);
int admin_revoke_file(struct broker *broker, uint64_t file, const char *reason,
		      uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
int admin_revoke_inode(struct broker *broker, uint64_t device, uint64_t inode, const char *reason,
		       uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
/* The path as listed: that is a label, which several files can have. now: what the path is for whoever gives it,
 * NULL: nothing that he can reach. */
int admin_revoke_path(struct broker *broker, const char *path, const struct inode_key *now,
		      const char *reason, uint64_t timeout_usec, uint64_t *ret_id,
		      struct refusal *ret_refusal);
int admin_revoke_client(struct broker *broker, uint64_t client, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
/* Every file at or below a directory, by the paths as listed. The files are withdrawn, as before an umount. */
int admin_revoke_mount(struct broker *broker, const char *path, const char *reason,
		       uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
/* Every file of a file system, but for what was opened through certain mounts of it. Withdrawn likewise. */
int admin_revoke_mounts(struct broker *broker, const struct mounts *mounts, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
/* Every pin through contexts of a device, and of files that it holds: a block device, a device-DAX, an NVDIMM
 * namespace or region. Contexts and files are withdrawn, as before its removal. */
int admin_revoke_device(struct broker *broker, const char *device, const char *reason,
			uint64_t timeout_usec, uint64_t *ret_id, struct refusal *ret_refusal);
/* The same for one that is being removed, by its number. */
void admin_remove_device(struct broker *broker, dev_t number);
