/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "fuzz.h"
#include "protocol/connection.h"
#include "protocol/interface.h"
#include "protocol/macro.h"
#include "protocol/service.h"

#include <stdlib.h>

/* What has been read must come back the same when it is written and read again. */
static void try_schema(const struct schema *schema, json_object *o, unsigned flags)
{
	_cleanup_(freep) void *p = calloc(1, schema->size + 1), *q = calloc(1, schema->size + 1);
	json_object *written = NULL, *again = NULL;
	const char *field = NULL;
	int r;

	r = schema_read(schema, o, flags, p, &field);
	if (r < 0) {
		if (r != -EINVAL || !field)
			abort();
		for (size_t i = 0; i < schema->size; i++)
			if (((char *)p)[i])
				abort();
		return;
	}
	if (schema_write(schema, p, &written) < 0 || schema_read(schema, written, 0, q, NULL) < 0 ||
		schema_write(schema, q, &again) < 0 || !json_object_equal(written, again))
		abort();
	schema_clear(schema, p);
	schema_clear(schema, q);
	json_object_put(written);
	json_object_put(again);
}

static void try_interface(const struct interface *interface, json_object *o, unsigned flags)
{
	for (size_t i = 0; i < interface->n_types; i++)
		try_schema(interface->types[i], o, flags);
	for (size_t i = 0; i < interface->n_errors; i++)
		try_schema(interface->errors[i], o, flags);
	for (size_t i = 0; i < interface->n_methods; i++) {
		try_schema(interface->methods[i].in, o, flags);
		try_schema(interface->methods[i].out, o, flags);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	json_tokener *tokener = json_tokener_new_ex(CONNECTION_DEPTH_MAX);
	json_object *o = json_tokener_parse_ex(tokener, (const char *)data, (int)size);

	for (unsigned flags = 0; flags <= SCHEMA_IGNORE_UNKNOWN; flags++) {
		try_interface(&interface_pinbroker, o, flags);
		try_interface(&interface_service, o, flags);
	}
	json_object_put(o);
	json_tokener_free(tokener);
	return 0;
}
