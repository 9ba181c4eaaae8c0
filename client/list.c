/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <string.h>

/* Null, where there is nothing to list, is passed over. */
/* clang-format off */
#define EACH(tag, field, T)                                                                        \
	struct each_##tag {                                                                        \
		int (*callback)(const struct T *info, void *userdata);                             \
		void *userdata;                                                                    \
	};                                                                                         \
	static int each_##tag(const void *p, void *userdata)                                       \
	{                                                                                          \
		const struct msg_list_##tag##_out *out = p;                                        \
		const struct each_##tag *each = userdata;                                          \
		struct T info;                                                                     \
                                                                                                   \
		if (!out->field)                                                                   \
			return 0;                                                                  \
		convert_##field##_info(out->field, &info);                                         \
		return each->callback(&info, each->userdata);                                      \
	}
/* clang-format on */

static void convert_pin_info(const struct msg_pin_info *m, struct pinbroker_pin_info *ret)
{
	*ret = (struct pinbroker_pin_info){
		.pin = (uint64_t)m->pin,
		.client = (uint64_t)m->client,
		.file = (uint64_t)m->file,
		.context = (uint64_t)m->context,
		.path = m->path,
		.offset = (uint64_t)m->offset,
		.length = (uint64_t)m->length,
		.access = (enum pinbroker_access)m->access,
		.handle = known(m->handle),
		.label = m->label,
		.state = (enum pinbroker_pin_state)m->state,
		.revocation = known(m->revocation),
		.on_demand = m->onDemand,
	};
}

static void convert_client_info(const struct msg_client_info *m, struct pinbroker_client_info *ret)
{
	*ret = (struct pinbroker_client_info){
		.client = (uint64_t)m->client,
		.pid = (pid_t)m->pid,
		.uid = (uid_t)m->uid,
		.comm = m->comm,
		.unit = m->unit,
		.name = m->name,
		.bus_name = m->busName,
		.alive = m->alive,
		.connected = m->connected,
		.n_files = (uint64_t)m->files,
		.n_contexts = (uint64_t)m->contexts,
		.n_pins = (uint64_t)m->pins,
		.pinned_bytes = (uint64_t)m->pinnedBytes,
	};
}

static void convert_context_info(
	const struct msg_context_info *m, struct pinbroker_context_info *ret)
{
	*ret = (struct pinbroker_context_info){
		.context = (uint64_t)m->context,
		.client = (uint64_t)m->client,
		.kind = m->kind,
		.device = m->device,
		.label = m->label,
		.forcible = m->forcible,
		.proof = (enum pinbroker_proof)m->proof,
		.n_pins = (uint64_t)m->pins,
	};
}

static void convert_revocation_info(
	const struct msg_revocation_info *m, struct pinbroker_revocation_info *ret)
{
	*ret = (struct pinbroker_revocation_info){
		.revocation = (uint64_t)m->revocation,
		.file = known(m->file),
		.path = m->path,
		.cause = (enum pinbroker_cause)m->conflict.cause,
		.offset = (uint64_t)m->conflict.offset,
		.length = (uint64_t)m->conflict.length,
		.size = known(m->conflict.size),
		.pid = known_pid(m->conflict.pid),
		.uid = known_uid(m->conflict.uid),
		.comm = m->conflict.comm,
		.reason = m->conflict.reason,
		.state = (enum pinbroker_revocation_state)m->state,
		.start_usec = (uint64_t)m->startUSec,
		.deadline_usec = (uint64_t)m->deadlineUSec,
		.end_usec = known(m->endUSec),
		.n_pins = (uint64_t)m->pins,
		.n_remaining = (uint64_t)m->remaining,
		.has_proof = m->proof != ENUM_NULL,
		.proof = m->proof != ENUM_NULL ? (enum pinbroker_proof)m->proof
					       : PINBROKER_PROOF_PRESUMED,
	};
}

EACH(pins, pin, pinbroker_pin_info)
EACH(files, file, pinbroker_file_info)
EACH(clients, client, pinbroker_client_info)
EACH(contexts, context, pinbroker_context_info)
EACH(revocations, revocation, pinbroker_revocation_info)

/* Nothing has the last number, nor one that is greater. */
static int64_t any_or(uint64_t id)
{
	return id == 0 ? INT_NULL : id > INT64_MAX ? INT64_MAX : (int64_t)id;
}

EXPORT int pinbroker_list_pins(pinbroker *pb, uint64_t file, uint64_t client,
	int (*callback)(const struct pinbroker_pin_info *info, void *userdata), void *userdata)
{
	struct msg_list_pins_in in = {.file = any_or(file), .client = any_or(client)};
	struct each_pins each = {callback, userdata};
	struct msg_list_pins_out out;

	return transient_stream(pb, METHOD_ListPins, &in, &out, each_pins, &each);
}

EXPORT int pinbroker_list_files(pinbroker *pb,
	int (*callback)(const struct pinbroker_file_info *info, void *userdata), void *userdata)
{
	struct each_files each = {callback, userdata};
	struct msg_list_files_out out;

	return transient_stream(pb, METHOD_ListFiles, NULL, &out, each_files, &each);
}

EXPORT int pinbroker_list_clients(pinbroker *pb,
	int (*callback)(const struct pinbroker_client_info *info, void *userdata), void *userdata)
{
	struct each_clients each = {callback, userdata};
	struct msg_list_clients_out out;

	return transient_stream(pb, METHOD_ListClients, NULL, &out, each_clients, &each);
}

EXPORT int pinbroker_list_contexts(pinbroker *pb, uint64_t client,
	int (*callback)(const struct pinbroker_context_info *info, void *userdata), void *userdata)
{
	struct msg_list_contexts_in in = {.client = any_or(client)};
	struct each_contexts each = {callback, userdata};
	struct msg_list_contexts_out out;

	return transient_stream(pb, METHOD_ListContexts, &in, &out, each_contexts, &each);
}

EXPORT int pinbroker_list_revocations(pinbroker *pb,
	int (*callback)(const struct pinbroker_revocation_info *info, void *userdata),
	void *userdata)
{
	struct each_revocations each = {callback, userdata};
	struct msg_list_revocations_out out;

	return transient_stream(pb, METHOD_ListRevocations, NULL, &out, each_revocations, &each);
}

static bool copy_backing(const struct msg_backing *m, struct pinbroker_preflight_info *ret)
{
	ret->numa_node = PINBROKER_UNKNOWN;
	if (!m)
		return true;
	ret->has_backing = true;
	ret->backing = (enum pinbroker_backing)m->kind;
	ret->numa_node = known(m->numaNode);
	return text_copy(m->deviceName, &ret->device_name) &&
	       text_copy(m->namespace, &ret->nvdimm_namespace) &&
	       text_copy(m->region, &ret->nvdimm_region);
}

EXPORT int pinbroker_preflight(
	pinbroker *pb, int fd, enum pinbroker_access access, struct pinbroker_preflight_info **ret)
{
	struct msg_preflight_in in = {.fileDescriptor = 0, .access = (int)access};
	struct msg_preflight_out out;
	_cleanup_(reply_done) struct reply reply = {};
	struct pinbroker_preflight_info *p;
	int r;

	if (access != PINBROKER_READ && access != PINBROKER_WRITE)
		return error_set(pb, -EINVAL, "There is no such access.");
	r = transient_call(pb, METHOD_Preflight, &in, &fd, 1, &out, &reply);
	if (r < 0)
		return r;
	p = calloc(1, sizeof(*p));
	if (!p)
		return error_set(pb, -ENOMEM, "Out of memory.");
	if (!text_copy(out.fileSystem, &p->file_system) || !text_copy(out.reason, &p->reason) ||
		!text_copy(out.pinReason, &p->pin_reason) || !copy_backing(out.backing, p)) {
		pinbroker_preflight_free(p);
		return error_set(pb, -ENOMEM, "Out of memory.");
	}
	p->leasable = out.leasable;
	p->dax = out.dax;
	p->lease_break_usec = (uint64_t)out.leaseBreakUSec;
	p->settle_usec = (uint64_t)out.settleUSec;
	p->pinnable = (enum pinbroker_pinnable)out.pinnable;
	*ret = p;
	return 0;
}

EXPORT struct pinbroker_preflight_info *pinbroker_preflight_free(
	struct pinbroker_preflight_info *preflight)
{
	if (!preflight)
		return NULL;
	free((char *)preflight->file_system);
	free((char *)preflight->reason);
	free((char *)preflight->pin_reason);
	free((char *)preflight->device_name);
	free((char *)preflight->nvdimm_namespace);
	free((char *)preflight->nvdimm_region);
	free(preflight);
	return NULL;
}
