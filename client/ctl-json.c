/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <string.h>

#include "protocol/utf8.h"

void json_add(json_object *o, const char *key, json_object *value)
{
	if (json_object_object_add(o, key, value) < 0)
		must(NULL);
}

/* JSON is UTF-8: what is none, as names of files may be, becomes question marks, as in what the
 * broker sends. */
void json_add_string(json_object *o, const char *key, const char *value)
{
	_cleanup_(freep) char *copy = value ? must(strdup(value)) : NULL;

	if (copy)
		utf8_sanitize(copy);
	json_add(o, key, copy ? must(json_object_new_string(copy)) : NULL);
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
	const char *text;

	if (ctl->json == JSON_PRETTY)
		flags |= JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED;
	text = must((char *)json_object_to_json_string_ext(o, flags));
	/* json-c leaves DEL and the C1 controls as they are: only a string can hold them. */
	for (; *text; text++) {
		unsigned char c = (unsigned char)text[0], next = (unsigned char)text[1];

		if (c == 0x7f)
			fputs("\\u007f", stdout);
		else if (c == 0xc2 && next < 0xa0)
			printf("\\u%04x", (unsigned char)*++text);
		else
			putchar(c);
	}
	putchar('\n');
	json_object_put(o);
}
