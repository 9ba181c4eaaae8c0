/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "service.h"

#include "protocol/macro.h"

#define DEFINE_STRUCT(tag, name, FIELDS) SCHEMA_TABLE(tag, name, FIELDS)
#define DEFINE_METHOD(tag, name, IN, OUT)      \
	SCHEMA_TABLE(msg_##tag##_in, name, IN) \
	SCHEMA_TABLE(msg_##tag##_out, name, OUT)

SERVICE_METHODS(DEFINE_METHOD)
SERVICE_ERRORS(DEFINE_STRUCT)

#define SCHEMA(tag, name, FIELDS) &schema_##tag,
#define METHOD(tag, name_, IN, OUT)             \
	{                                       \
		.name = #name_,                 \
		.in = &schema_msg_##tag##_in,   \
		.out = &schema_msg_##tag##_out, \
	},

static const struct method methods[] = {SERVICE_METHODS(METHOD)};
static const struct schema *const errors[] = {SERVICE_ERRORS(SCHEMA)};

const struct interface interface_service = {
	.name = SERVICE_NAME,
	.description =
#include "protocol/org.varlink.service.varlink.inc"
		,
	.methods = methods,
	.n_methods = ELEMENTS(methods),
	.errors = errors,
	.n_errors = ELEMENTS(errors),
};
