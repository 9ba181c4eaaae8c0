/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "interface.h"

#include "protocol/macro.h"

#define DEFINE_ENUMERATION(tag, name_, ...)                       \
	static const char *const members_##tag[] = {__VA_ARGS__}; \
	const struct enumeration enumeration_##tag = {            \
		.name = #name_,                                   \
		.members = members_##tag,                         \
		.n_members = ELEMENTS(members_##tag),             \
	};
#define DEFINE_STRUCT(tag, name, FIELDS) SCHEMA_TABLE(tag, name, FIELDS)
#define DEFINE_METHOD(tag, name, kind, IN, OUT) \
	SCHEMA_TABLE(msg_##tag##_in, name, IN)  \
	SCHEMA_TABLE(msg_##tag##_out, name, OUT)

INTERFACE_ENUMERATIONS(DEFINE_ENUMERATION)
INTERFACE_TYPES(DEFINE_STRUCT)
INTERFACE_METHODS(DEFINE_METHOD)
INTERFACE_ERRORS(DEFINE_STRUCT)

#define ENUMERATION(tag, ...)     &enumeration_##tag,
#define SCHEMA(tag, name, FIELDS) &schema_##tag,
#define METHOD(tag, name_, kind, IN, OUT)       \
	{                                       \
		.name = #name_,                 \
		.in = &schema_msg_##tag##_in,   \
		.out = &schema_msg_##tag##_out, \
		.more = METHOD_##kind,          \
	},

static const struct enumeration *const enumerations[] = {INTERFACE_ENUMERATIONS(ENUMERATION)};
static const struct schema *const types[] = {INTERFACE_TYPES(SCHEMA)};
static const struct method methods[] = {INTERFACE_METHODS(METHOD)};
static const struct schema *const errors[] = {INTERFACE_ERRORS(SCHEMA)};

const struct interface interface_pinbroker = {
	.name = INTERFACE_NAME,
	.description =
#include "protocol/org.pinbroker.varlink.inc"
		,
	.enumerations = enumerations,
	.n_enumerations = ELEMENTS(enumerations),
	.types = types,
	.n_types = ELEMENTS(types),
	.methods = methods,
	.n_methods = ELEMENTS(methods),
	.errors = errors,
	.n_errors = ELEMENTS(errors),
};
