/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "schema.h"

/* The interface org.varlink.service in C, as interface.h does it for org.pinbroker. */

#define GET_INFO_OUT(F)                 \
	F(STRING, REQUIRED, vendor, _)  \
	F(STRING, REQUIRED, product, _) \
	F(STRING, REQUIRED, version, _) \
	F(STRING, REQUIRED, url, _)     \
	F(STRINGS, REQUIRED, interfaces, _)
#define GET_INTERFACE_DESCRIPTION_IN(F)  F(STRING, REQUIRED, interface, _)
#define GET_INTERFACE_DESCRIPTION_OUT(F) F(STRING, REQUIRED, description, _)

/* tag, name in the IDL, fields in, fields out; the structs are msg_TAG_in and msg_TAG_out */
#define SERVICE_METHODS(M)                                                                  \
	M(get_info, GetInfo, NO_FIELDS, GET_INFO_OUT)                                       \
	M(get_interface_description, GetInterfaceDescription, GET_INTERFACE_DESCRIPTION_IN, \
		GET_INTERFACE_DESCRIPTION_OUT)

#define INTERFACE_FIELDS(F) F(STRING, REQUIRED, interface, _)
#define METHOD_FIELDS(F)    F(STRING, REQUIRED, method, _)
#define PARAMETER_FIELDS(F) F(STRING, REQUIRED, parameter, _)

/* tag, name in the IDL, fields */
#define SERVICE_ERRORS(E)                                                  \
	E(msg_interface_not_found, InterfaceNotFound, INTERFACE_FIELDS)    \
	E(msg_method_not_found, MethodNotFound, METHOD_FIELDS)             \
	E(msg_method_not_implemented, MethodNotImplemented, METHOD_FIELDS) \
	E(msg_invalid_parameter, InvalidParameter, PARAMETER_FIELDS)       \
	E(msg_permission_denied, PermissionDenied, NO_FIELDS)              \
	E(msg_expected_more, ExpectedMore, NO_FIELDS)

#define DECLARE_STRUCT(tag, name, FIELDS) SCHEMA_STRUCT(tag, FIELDS)
#define DECLARE_METHOD(tag, name, IN, OUT) \
	SCHEMA_STRUCT(msg_##tag##_in, IN)  \
	SCHEMA_STRUCT(msg_##tag##_out, OUT)

SERVICE_METHODS(DECLARE_METHOD)
SERVICE_ERRORS(DECLARE_STRUCT)

#undef DECLARE_STRUCT
#undef DECLARE_METHOD

#define METHOD_INDEX(tag, name, IN, OUT) METHOD_##name,
enum { SERVICE_METHODS(METHOD_INDEX) SERVICE_METHOD_COUNT };
#undef METHOD_INDEX

#define SERVICE_NAME "org.varlink.service"

/* Methods are in the order of the METHOD_ constants. */
extern const struct interface interface_service;
