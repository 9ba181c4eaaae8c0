/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/refusal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "daemon/util/user.h"
#include "protocol/interface.h"
#include "protocol/macro.h"

int refuse(struct refusal *ret, enum refusal_kind kind, const char *cause, const char *format, ...)
{
	va_list ap;

	*ret = (struct refusal){ .kind = kind, .cause = cause, .until_usec = INT_NULL };
	va_start(ap, format);
	vsnprintf(ret->message, sizeof(ret->message), format, ap);
	va_end(ap);
	return REFUSED;
}

int refuse_no_such(struct refusal *ret, const char *type, uint64_t id)
{
	*ret = (struct refusal){ .kind = REFUSAL_NO_SUCH_OBJECT, .cause = type, .id = (int64_t)id };
	return REFUSED;
}

int refuse_parameter(struct refusal *ret, const char *parameter)
{
	*ret = (struct refusal){ .kind = REFUSAL_INVALID_PARAMETER, .cause = parameter };
	return REFUSED;
}

int refuse_revoked(struct refusal *ret, uint64_t revocation, uint64_t pin)
{
	*ret = (struct refusal){
		.kind = REFUSAL_REVOKED,
		.id = (int64_t)revocation,
		.pin = (int64_t)pin,
	};
	return REFUSED;
}

int refuse_limit(struct refusal *ret, const struct user *user, int limit)
{
	*ret = (struct refusal){
		.kind = REFUSAL_LIMIT_EXCEEDED,
		.cause = limit_name(limit),
		.maximum = (int64_t)user_maximum(user, limit),
		.used = (int64_t)user->used[limit],
	};
	return REFUSED;
}

const char *refusal_name(const struct refusal *refusal)
{
	static const char *const names[] = {
		[REFUSAL_NOT_LEASABLE] = "NotLeasable",
		[REFUSAL_BUSY] = "Busy",
		[REFUSAL_NOT_ALLOWED] = "NotAllowed",
		[REFUSAL_NO_SUCH_OBJECT] = "NoSuchObject",
		[REFUSAL_LIMIT_EXCEEDED] = "LimitExceeded",
		[REFUSAL_REVOKED] = "Revoked",
		[REFUSAL_RANGE_CONFLICT] = "RangeConflict",
		[REFUSAL_BEYOND_END_OF_FILE] = "BeyondEndOfFile",
		[REFUSAL_NOT_SUPPORTED] = "NotSupported",
		[REFUSAL_INVALID_PARAMETER] = "InvalidParameter",
	};

	return names[refusal->kind];
}

const char *refusal_message(const struct refusal *f, char buffer[static 300])
{
	switch (f->kind) {
	case REFUSAL_NO_SUCH_OBJECT:
		snprintf(buffer, 300, "There is no %s %" PRIu64 ".", f->cause, (uint64_t)f->id);
		break;
	case REFUSAL_LIMIT_EXCEEDED:
		snprintf(buffer, 300, "%s=%" PRIi64 " reached (%" PRIi64 " in use).", f->cause,
			 f->maximum, f->used);
		break;
	case REFUSAL_REVOKED:
		if (f->pin == 0)
			snprintf(buffer, 300,
				 "It was withdrawn by revocation %" PRIi64 ": open or add it anew.", f->id);
		else
			snprintf(buffer, 300,
				 "Pin %" PRIi64 " was revoked (revocation %" PRIi64 ").", f->pin, f->id);
		break;
	case REFUSAL_RANGE_CONFLICT:
		snprintf(buffer, 300,
			 "The range at %" PRIi64 " of %" PRIi64
			 " byte%s overlaps revocation %" PRIi64 ", which is running.",
			 f->offset, f->length, PLURAL(f->length), f->id);
		break;
	case REFUSAL_BEYOND_END_OF_FILE:
		snprintf(buffer, 300,
			 "The range at %" PRIi64 " of %" PRIi64
			 " byte%s does not lie within the file's %" PRIi64 " byte%s.",
			 f->offset, f->length, PLURAL(f->length), f->size, PLURAL(f->size));
		break;
	case REFUSAL_INVALID_PARAMETER:
		snprintf(buffer, 300, "Parameter %s is not valid.", f->cause);
		break;
	default:
		snprintf(buffer, 300, "%s", f->message);
	}
	return buffer;
}
