/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <assert.h>
#include <string.h>

static_assert((int)PINBROKER_READ == ACCESS_READ && (int)PINBROKER_WRITE == ACCESS_WRITE, "");
static_assert((int)PINBROKER_PROOF_PROVABLE == PROOF_PROVABLE &&
		      (int)PINBROKER_PROOF_PRESUMED == PROOF_PRESUMED,
	"");
static_assert((int)PINBROKER_CAUSE_MODIFY == CAUSE_MODIFY &&
		      (int)PINBROKER_CAUSE_LOST == CAUSE_LOST,
	"");
static_assert(
	(int)PINBROKER_LEASE_NONE == LEASE_NONE && (int)PINBROKER_LEASE_BREAKING == LEASE_BREAKING,
	"");
static_assert((int)PINBROKER_BACKING_PAGE_CACHE == BACKING_PAGE_CACHE &&
		      (int)PINBROKER_BACKING_DEVICE_DAX == BACKING_DEVICE_DAX,
	"");
static_assert((int)PINBROKER_PINNABLE_NO == PINNABLE_NO &&
		      (int)PINBROKER_PINNABLE_UNKNOWN == PINNABLE_UNKNOWN,
	"");
static_assert(
	(int)PINBROKER_PIN_RESERVED == PIN_RESERVED && (int)PINBROKER_PIN_LEAVING == PIN_LEAVING,
	"");
static_assert((int)PINBROKER_REVOCATION_NOTIFIED == REVOCATION_NOTIFIED &&
		      (int)PINBROKER_REVOCATION_LOST == REVOCATION_LOST,
	"");

EXPORT const char *pinbroker_access_name(enum pinbroker_access access)
{
	return enumeration_name(&enumeration_access, (int)access);
}

EXPORT const char *pinbroker_proof_name(enum pinbroker_proof proof)
{
	return enumeration_name(&enumeration_proof, (int)proof);
}

EXPORT const char *pinbroker_cause_name(enum pinbroker_cause cause)
{
	return enumeration_name(&enumeration_cause, (int)cause);
}

EXPORT const char *pinbroker_lease_state_name(enum pinbroker_lease_state state)
{
	return enumeration_name(&enumeration_lease_state, (int)state);
}

EXPORT const char *pinbroker_backing_name(enum pinbroker_backing backing)
{
	return enumeration_name(&enumeration_backing_kind, (int)backing);
}

EXPORT const char *pinbroker_pinnable_name(enum pinbroker_pinnable pinnable)
{
	return enumeration_name(&enumeration_pinnable, (int)pinnable);
}

EXPORT const char *pinbroker_pin_state_name(enum pinbroker_pin_state state)
{
	return enumeration_name(&enumeration_pin_state, (int)state);
}

EXPORT const char *pinbroker_revocation_state_name(enum pinbroker_revocation_state state)
{
	return enumeration_name(&enumeration_revocation_state, (int)state);
}

bool text_copy(const char *text, const char **ret)
{
	*ret = text ? strdup(text) : NULL;
	return *ret || !text;
}

uint64_t known(int64_t value)
{
	return value == INT_NULL ? PINBROKER_UNKNOWN : (uint64_t)value;
}

pid_t known_pid(int64_t value)
{
	return value == INT_NULL ? 0 : (pid_t)value;
}

uid_t known_uid(int64_t value)
{
	return value == INT_NULL ? PINBROKER_NO_UID : (uid_t)value;
}

void convert_file_info(const struct msg_file_info *m, struct pinbroker_file_info *ret)
{
	*ret = (struct pinbroker_file_info){
		.file = (uint64_t)m->file,
		.path = m->path,
		.file_system = m->fileSystem,
		.device = (uint64_t)m->device,
		.inode = (uint64_t)m->inode,
		.size = (uint64_t)m->size,
		.access = (enum pinbroker_access)m->access,
		.lease = (enum pinbroker_lease_state)m->lease,
		.settled_usec = known(m->settledUSec),
		.exposed = m->exposed,
		.n_clients = (uint64_t)m->clients,
		.n_pins = (uint64_t)m->pins,
		.backing = (enum pinbroker_backing)m->backing.kind,
		.device_name = m->backing.deviceName,
		.nvdimm_namespace = m->backing.namespace,
		.nvdimm_region = m->backing.region,
		.numa_node = known(m->backing.numaNode),
	};
}

/* The pins are the message's own array: its ids are positive, so their bits are the same unsigned.
 */
void convert_notice(const struct msg_notice *m, struct pinbroker_notice *ret)
{
	*ret = (struct pinbroker_notice){
		.revocation = (uint64_t)m->revocation,
		.client = (uint64_t)m->client,
		.file = (uint64_t)m->file,
		.path = m->path,
		.pins = (const uint64_t *)m->pins.items,
		.n_pins = m->pins.n_items,
		.cause = (enum pinbroker_cause)m->conflict.cause,
		.offset = (uint64_t)m->conflict.offset,
		.length = (uint64_t)m->conflict.length,
		.size = known(m->conflict.size),
		.pid = known_pid(m->conflict.pid),
		.uid = known_uid(m->conflict.uid),
		.comm = m->conflict.comm,
		.reason = m->conflict.reason,
		.deadline_usec = (uint64_t)m->deadlineUSec,
	};
}
