/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"

#include <fcntl.h>
#include <string.h>

struct pinbroker_file {
	pinbroker *pb;                   /* a reference */
	int fd;                          /* owned */
	struct pinbroker_file_info info; /* its texts are owned */
};

struct pinbroker_context {
	pinbroker *pb; /* a reference */
	uint64_t id;
	char *kind;   /* owned */
	char *device; /* owned */
	bool forcible;
	enum pinbroker_proof proof;
};

static int no_memory(const pinbroker *pb)
{
	return error_set(pb, -ENOMEM, "Out of memory.");
}

/* ---- Files ---- */

static void pinbroker_file_freep(pinbroker_file **f)
{
	pinbroker_file_free(*f);
}

/* The texts belonged to the broker's reply. */
static bool file_copy_texts(struct pinbroker_file_info *info)
{
	const char **texts[] = {&info->path, &info->file_system, &info->device_name,
		&info->nvdimm_namespace, &info->nvdimm_region};
	bool copied = true;

	/* Each is tried, so that what is freed is ours. */
	for (size_t i = 0; i < ELEMENTS(texts); i++)
		copied &= text_copy(*texts[i], texts[i]);
	return copied;
}

static int file_new(pinbroker *pb, const struct msg_open_file_out *out, struct reply *reply,
	pinbroker_file **ret)
{
	_cleanup_(pinbroker_file_freep) pinbroker_file *f = NULL;

	if (out->fileDescriptor < 0 || (size_t)out->fileDescriptor >= reply->fds.n_fds)
		return error_set(pb, -EPROTO, "The broker sent no descriptor for the file.");
	f = calloc(1, sizeof(*f));
	if (!f)
		return no_memory(pb);
	f->pb = pinbroker_ref(pb);
	f->fd = TAKE_FD(reply->fds.fds[out->fileDescriptor]);
	convert_file_info(&out->info, &f->info);
	f->info.file = (uint64_t)out->file;
	if (!file_copy_texts(&f->info))
		return no_memory(pb);
	*ret = TAKE_PTR(f);
	return 0;
}

/* What the broker gave, and could not be taken, goes back to it. */
static void file_give_back(pinbroker *pb, int64_t id)
{
	_cleanup_(reply_done) struct reply reply = {};
	struct msg_close_file_in in = {.file = id};

	broker_call(pb, METHOD_CloseFile, &in, NULL, 0, NULL, &reply);
}

EXPORT int pinbroker_open_file_fd(
	pinbroker *pb, int fd, enum pinbroker_access access, pinbroker_file **ret)
{
	struct msg_open_file_in in = {.fileDescriptor = 0, .access = (int)access};
	struct msg_open_file_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	if (access != PINBROKER_READ && access != PINBROKER_WRITE)
		return error_set(pb, -EINVAL, "There is no such access.");
	r = broker_call(pb, METHOD_OpenFile, &in, &fd, 1, &out, &reply);
	if (r < 0)
		return r;
	r = file_new(pb, &out, &reply, ret);
	if (r < 0)
		file_give_back(pb, out.file);
	return r;
}

EXPORT int pinbroker_open_file(
	pinbroker *pb, const char *path, enum pinbroker_access access, pinbroker_file **ret)
{
	_cleanup_(close_fdp) int fd = -1;
	int r;

	r = check_usable(pb);
	if (r < 0)
		return r;
	fd = open(path, O_PATH | O_CLOEXEC);
	if (fd < 0) {
		r = -errno;
		error_set(pb, r, "%s.%s", strerror(-r), limit_advice(-r));
	} else {
		r = pinbroker_open_file_fd(pb, fd, access, ret);
	}
	return r < 0 ? error_about(r, "Cannot open", path) : r;
}

EXPORT uint64_t pinbroker_file_get_id(const pinbroker_file *file)
{
	return file->info.file;
}

EXPORT int pinbroker_file_get_fd(const pinbroker_file *file)
{
	return file->fd;
}

EXPORT const struct pinbroker_file_info *pinbroker_file_get_info(const pinbroker_file *file)
{
	return &file->info;
}

EXPORT int pinbroker_close_file(pinbroker_file *file)
{
	struct msg_close_file_in in = {.file = (int64_t)file->info.file};
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_call(file->pb, METHOD_CloseFile, &in, NULL, 0, NULL, &reply);
	if (r < 0)
		return r;
	pinbroker_file_free(file);
	return 0;
}

EXPORT pinbroker_file *pinbroker_file_free(pinbroker_file *file)
{
	if (!file)
		return NULL;
	safe_close(file->fd);
	free((char *)file->info.path);
	free((char *)file->info.file_system);
	free((char *)file->info.device_name);
	free((char *)file->info.nvdimm_namespace);
	free((char *)file->info.nvdimm_region);
	pinbroker_unref(file->pb);
	free(file);
	return NULL;
}

/* ---- Contexts ---- */

static void pinbroker_context_freep(pinbroker_context **c)
{
	pinbroker_context_free(*c);
}

static int context_new(
	pinbroker *pb, const struct msg_add_context_out *out, pinbroker_context **ret)
{
	_cleanup_(pinbroker_context_freep) pinbroker_context *c = NULL;

	c = calloc(1, sizeof(*c));
	if (!c)
		return no_memory(pb);
	c->pb = pinbroker_ref(pb);
	c->id = (uint64_t)out->context;
	c->forcible = out->forcible;
	c->proof = (enum pinbroker_proof)out->proof;
	c->kind = strdup(out->kind);
	c->device = out->device ? strdup(out->device) : NULL;
	if (!c->kind || (out->device && !c->device))
		return no_memory(pb);
	*ret = TAKE_PTR(c);
	return 0;
}

static void context_give_back(pinbroker *pb, int64_t id)
{
	_cleanup_(reply_done) struct reply reply = {};
	struct msg_remove_context_in in = {.context = id};

	broker_call(pb, METHOD_RemoveContext, &in, NULL, 0, NULL, &reply);
}

static int context_add(pinbroker *pb, const struct msg_add_context_in *in, const int *fds,
	size_t n_fds, pinbroker_context **ret)
{
	struct msg_add_context_out out;
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_call(pb, METHOD_AddContext, in, fds, n_fds, &out, &reply);
	if (r < 0)
		return r;
	r = context_new(pb, &out, ret);
	if (r < 0)
		context_give_back(pb, out.context);
	return r;
}

EXPORT int pinbroker_add_context(pinbroker *pb, int fd, const char *label, pinbroker_context **ret)
{
	struct msg_add_context_in in = {
		.fileDescriptor = 0,
		.remoteDescriptor = INT_NULL,
		.label = label,
	};

	return context_add(pb, &in, &fd, 1, ret);
}

EXPORT int pinbroker_add_context_remote(
	pinbroker *pb, int fd, const char *label, pinbroker_context **ret)
{
	struct msg_add_context_in in = {
		.fileDescriptor = INT_NULL,
		.remoteDescriptor = fd,
		.label = label,
	};

	return context_add(pb, &in, NULL, 0, ret);
}

EXPORT uint64_t pinbroker_context_get_id(const pinbroker_context *context)
{
	return context->id;
}

EXPORT const char *pinbroker_context_get_kind(const pinbroker_context *context)
{
	return context->kind;
}

EXPORT const char *pinbroker_context_get_device(const pinbroker_context *context)
{
	return context->device;
}

EXPORT bool pinbroker_context_is_forcible(const pinbroker_context *context)
{
	return context->forcible;
}

EXPORT enum pinbroker_proof pinbroker_context_get_proof(const pinbroker_context *context)
{
	return context->proof;
}

EXPORT int pinbroker_remove_context(pinbroker_context *context)
{
	struct msg_remove_context_in in = {.context = (int64_t)context->id};
	_cleanup_(reply_done) struct reply reply = {};
	int r;

	r = broker_call(context->pb, METHOD_RemoveContext, &in, NULL, 0, NULL, &reply);
	if (r < 0)
		return r;
	pinbroker_context_free(context);
	return 0;
}

EXPORT pinbroker_context *pinbroker_context_free(pinbroker_context *context)
{
	if (!context)
		return NULL;
	free(context->kind);
	free(context->device);
	pinbroker_unref(context->pb);
	free(context);
	return NULL;
}
