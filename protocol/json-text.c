/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "json-text.h"

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "utf8.h"

#define ESCAPE_SIZE (sizeof("\\uXXXX") - 1)

static size_t escaped_size(uint32_t c)
{
	return c < 0x10000 ? ESCAPE_SIZE : 2 * ESCAPE_SIZE;
}

int json_text_examine(const char *text, size_t size, struct json_text *ret)
{
	struct json_text found = {};
	bool in_string = false, escaped = false;
	size_t length;
	uint32_t c;

	for (size_t i = 0; i < size; i += length) {
		length = utf8_decode(text + i, size - i, &c);
		/* A backslash before \uXXXX would be taken for one that is escaped. */
		if (length == 0 || (in_string && c < ' ') || (escaped && c >= 0x80))
			return -EBADMSG;
		found.n_brackets += c == '{' || c == '[';
		found.ascii_size += c < 0x80 ? 1 : escaped_size(c);
		if (c == '"' && !escaped)
			in_string = !in_string;
		escaped = in_string && c == '\\' && !escaped;
	}
	*ret = found;
	return 0;
}

static char *write_escape(char *to, uint32_t unit)
{
	static const char digits[] = "0123456789abcdef";

	*to++ = '\\';
	*to++ = 'u';
	for (int shift = 12; shift >= 0; shift -= 4)
		*to++ = digits[unit >> shift & 0xf];
	return to;
}

void json_text_to_ascii(const char *text, size_t size, char *to)
{
	size_t length;
	uint32_t c;

	for (size_t i = 0; i < size; i += length) {
		length = utf8_decode(text + i, size - i, &c);
		if (c < 0x80) {
			*to++ = (char)c;
		} else if (c < 0x10000) {
			to = write_escape(to, c);
		} else {
			to = write_escape(to, 0xd800 + ((c - 0x10000) >> 10));
			to = write_escape(to, 0xdc00 + ((c - 0x10000) & 0x3ff));
		}
	}
}
