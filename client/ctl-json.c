/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

void json_add(json_object *o, const char *key, json_object *value)
{
	if (json_object_object_add(o, key, value) < 0)
		must(NULL);
}

void json_add_string(json_object *o, const char *key, const char *value)
{
	json_add(o, key, value ? must(json_object_new_string(value)) : NULL);
}

void json_add_number(json_object *o, const char *key, uint64_t value)
{
	json_add(o, key,
		value != PINBROKER_UNKNOWN ? must(json_object_new_int64((int64_t)value)) : NULL);
}

void json_add_bool(json_object *o, const char *key, bool value)
{
	json_add(o, key, must(json_object_new_boolean(value)));
}

void json_print(json_object *o, const struct ctl *ctl)
{
	int flags = JSON_C_TO_STRING_NOSLASHESCAPE;

	if (ctl->json == JSON_PRETTY)
		flags |= JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED;
	puts(must((char *)json_object_to_json_string_ext(o, flags)));
	json_object_put(o);
}
