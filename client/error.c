/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "internal.h"
#include "protocol/service.h"
#include "protocol/utf8.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Per thread, so that one thread's failure does not hide another's. */
static _Thread_local struct {
	uint64_t owner; /* its serial, 0: none */
	struct pinbroker_error public;
	char name[128];
	char cause[64];
	char message[2048];
} last;

static const struct pinbroker_error no_error = {
	.message = "No call has failed.",
	.until_usec = PINBROKER_UNKNOWN,
	.revocation = PINBROKER_UNKNOWN,
};

static const struct {
	const char *name;
	int error;
} refusals[] = {
	{INTERFACE_NAME ".NotLeasable", -EMEDIUMTYPE},
	{INTERFACE_NAME ".Busy", -EBUSY},
	{INTERFACE_NAME ".NotAllowed", -EACCES},
	{INTERFACE_NAME ".NoSuchObject", -ENOENT},
	{INTERFACE_NAME ".LimitExceeded", -EDQUOT},
	{INTERFACE_NAME ".Revoked", -ESTALE},
	{INTERFACE_NAME ".RangeConflict", -EAGAIN},
	{INTERFACE_NAME ".BeyondEndOfFile", -ERANGE},
	{INTERFACE_NAME ".NotSupported", -EOPNOTSUPP},
	{SERVICE_NAME ".InvalidParameter", -EINVAL},
	{SERVICE_NAME ".MethodNotFound", -ENOSYS},
	{SERVICE_NAME ".MethodNotImplemented", -ENOSYS},
	{SERVICE_NAME ".InterfaceNotFound", -ENOSYS},
	{SERVICE_NAME ".PermissionDenied", -EACCES},
	{SERVICE_NAME ".ExpectedMore", -EPROTO},
};

int error_number(const char *name)
{
	for (size_t i = 0; i < ELEMENTS(refusals); i++)
		if (strcmp(name, refusals[i].name) == 0)
			return refusals[i].error;
	return -EREMOTEIO;
}

static void error_start(const pinbroker *pb, int error)
{
	last.owner = pb->serial;
	last.public = no_error;
	last.public.error = error;
	last.public.message = last.message;
	last.message[0] = 0;
}

static void copy(char *to, size_t size, const char *from)
{
	snprintf(to, size, "%s", from ?: "");
}

/* Names of files and what the broker says may hold anything; a message is for a terminal, too. */
static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
	size_t n = strlen(last.message);
	char text[sizeof(last.message)];
	va_list ap;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	utf8_escape(last.message + n, sizeof(last.message) - n, text);
}

int error_set(const pinbroker *pb, int error, const char *format, ...)
{
	char text[sizeof(last.message)];
	va_list ap;

	/* The arguments may point into what is about to be overwritten. */
	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	error_start(pb, error);
	say("%s", text);
	return error;
}

int error_about(int r, const char *what, const char *name)
{
	char text[sizeof(last.message)];

	copy(text, sizeof(text), last.message);
	last.message[0] = 0;
	say("%s %s: %s", what, *name ? name : "''", text);
	return r;
}

static void say_time(int64_t usec)
{
	uint64_t now = now_usec();

	if (usec == INT_NULL || (uint64_t)usec <= now)
		return;
	last.public.until_usec = (uint64_t)usec;
	say(" Try again in %.1f s.", (double)((uint64_t)usec - now) / USEC_PER_SEC);
}

static void say_cause(const char *cause, const char *message)
{
	copy(last.cause, sizeof(last.cause), cause);
	last.public.cause = last.cause;
	say("%s", message);
}

static void say_not_leasable(const void *p)
{
	const struct msg_not_leasable *e = p;

	say_cause(e->cause, e->message);
	if (e->fileSystem && !strstr(e->message, e->fileSystem))
		say(" (The file system is %s.)", e->fileSystem);
}

static void say_busy(const void *p)
{
	const struct msg_busy *e = p;

	say_cause(e->cause, e->message);
	say_time(e->untilUSec);
}

static void say_not_allowed(const void *p)
{
	const struct msg_not_allowed *e = p;

	say_cause(e->cause, e->message);
}

static void say_no_such_object(const void *p)
{
	const struct msg_no_such_object *e = p;

	say("There is no %s %" PRId64 " that is yours.", e->type, e->id);
}

static void say_limit_exceeded(const void *p)
{
	const struct msg_limit_exceeded *e = p;

	say("The limit %s=%" PRId64 " is reached: %" PRId64
	    " in use. Let go of something, or have "
	    "the limit raised in pinbroker.conf.",
		e->limit, e->maximum, e->used);
}

static void say_revoked(const void *p)
{
	const struct msg_revoked *e = p;

	last.public.revocation = (uint64_t)e->revocation;
	if (e->pins.n_items == 0) {
		say("The broker has closed the file or context on an administrator's word, or "
		    "because its "
		    "device is going away (revocation %" PRId64 "). Open or add it anew.",
			e->revocation);
		return;
	}
	say(e->pins.n_items == 1 ? "Pin" : "Pins");
	for (size_t i = 0; i < e->pins.n_items && i < 8; i++)
		say("%s %" PRId64, i > 0 ? "," : "", e->pins.items[i]);
	if (e->pins.n_items > 8)
		say(" and %zu more", e->pins.n_items - 8);
	say(" went, or must go, by revocation %" PRId64 ".", e->revocation);
}

static void say_range_conflict(const void *p)
{
	const struct msg_range_conflict *e = p;

	last.public.revocation = (uint64_t)e->revocation;
	say("The range overlaps what revocation %" PRId64 " is about (from %" PRId64, e->revocation,
		e->offset);
	if (e->length > 0)
		say(", %" PRId64 " byte%s)", e->length, PLURAL(e->length));
	else
		say(" to the end of the file)");
	say(". Try again when that has ended.");
}

static void say_beyond_end_of_file(const void *p)
{
	const struct msg_beyond_end_of_file *e = p;

	say("The range of %" PRId64 " byte%s from %" PRId64
	    " does not lie within the file, which has %" PRId64 " byte%s.",
		e->length, PLURAL(e->length), e->offset, e->size, PLURAL(e->size));
}

static void say_not_supported(const void *p)
{
	const struct msg_not_supported *e = p;

	say_cause(e->cause, e->message);
}

static void say_invalid_parameter(const void *p)
{
	const struct msg_invalid_parameter *e = p;

	say("The broker does not accept the value of %s.", e->parameter);
}

static void say_method_not_found(const void *p)
{
	const struct msg_method_not_found *e = p;

	say("This broker does not know the method %s; it may be an older version.", e->method);
}

static void say_permission_denied(const void *p)
{
	say("The broker denies permission.");
}

union any_error {
	struct msg_not_leasable not_leasable;
	struct msg_busy busy;
	struct msg_not_allowed not_allowed;
	struct msg_no_such_object no_such_object;
	struct msg_limit_exceeded limit_exceeded;
	struct msg_revoked revoked;
	struct msg_range_conflict range_conflict;
	struct msg_beyond_end_of_file beyond_end_of_file;
	struct msg_not_supported not_supported;
	struct msg_invalid_parameter invalid_parameter;
	struct msg_method_not_found method_not_found;
};

static const struct {
	const char *name;
	const struct schema *schema;
	void (*say)(const void *fields);
} sentences[] = {
	{INTERFACE_NAME ".NotLeasable", &schema_msg_not_leasable, say_not_leasable},
	{INTERFACE_NAME ".Busy", &schema_msg_busy, say_busy},
	{INTERFACE_NAME ".NotAllowed", &schema_msg_not_allowed, say_not_allowed},
	{INTERFACE_NAME ".NoSuchObject", &schema_msg_no_such_object, say_no_such_object},
	{INTERFACE_NAME ".LimitExceeded", &schema_msg_limit_exceeded, say_limit_exceeded},
	{INTERFACE_NAME ".Revoked", &schema_msg_revoked, say_revoked},
	{INTERFACE_NAME ".RangeConflict", &schema_msg_range_conflict, say_range_conflict},
	{INTERFACE_NAME ".BeyondEndOfFile", &schema_msg_beyond_end_of_file, say_beyond_end_of_file},
	{INTERFACE_NAME ".NotSupported", &schema_msg_not_supported, say_not_supported},
	{SERVICE_NAME ".InvalidParameter", &schema_msg_invalid_parameter, say_invalid_parameter},
	{SERVICE_NAME ".MethodNotFound", &schema_msg_method_not_found, say_method_not_found},
	{SERVICE_NAME ".PermissionDenied", &schema_msg_permission_denied, say_permission_denied},
};

static void say_unknown(const char *name, json_object *parameters)
{
	say("The broker answered %s", name);
	if (parameters && json_object_object_length(parameters) > 0)
		say(" %s", json_object_to_json_string_ext(parameters, JSON_C_TO_STRING_PLAIN));
	say(".");
}

int error_from_reply(const pinbroker *pb, const char *name, json_object *parameters)
{
	union any_error fields;
	const char *field;

	error_start(pb, error_number(name));
	copy(last.name, sizeof(last.name), name);
	last.public.name = last.name;

	for (size_t i = 0; i < ELEMENTS(sentences); i++) {
		if (strcmp(name, sentences[i].name) != 0)
			continue;
		if (schema_read(sentences[i].schema, parameters, SCHEMA_IGNORE_UNKNOWN, &fields,
			    &field) < 0)
			break;
		sentences[i].say(&fields);
		schema_clear(sentences[i].schema, &fields);
		return last.public.error;
	}
	say_unknown(name, parameters);
	return last.public.error;
}

EXPORT const struct pinbroker_error *pinbroker_last_error(pinbroker *pb)
{
	return pb && last.owner == pb->serial ? &last.public : &no_error;
}
