/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "utf8.h"

#include <stdio.h>
#include <string.h>

size_t utf8_decode(const char *s, size_t n, uint32_t *ret)
{
	uint32_t c = (unsigned char)s[0], least;
	size_t length;

	if (c < 0x80) {
		*ret = c;
		return c != 0;
	}
	if ((c & 0xe0) == 0xc0) {
		length = 2;
		c &= 0x1f;
		least = 0x80;
	} else if ((c & 0xf0) == 0xe0) {
		length = 3;
		c &= 0x0f;
		least = 0x800;
	} else if ((c & 0xf8) == 0xf0) {
		length = 4;
		c &= 0x07;
		least = 0x10000;
	} else {
		return 0;
	}
	if (length > n)
		return 0;
	for (size_t i = 1; i < length; i++) {
		if (((unsigned char)s[i] & 0xc0) != 0x80)
			return 0;
		c = c << 6 | ((unsigned char)s[i] & 0x3f);
	}
	if (c < least || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff))
		return 0;
	*ret = c;
	return length;
}

/* The length of the character that s starts with, 0 if it is none or a noncharacter. */
static size_t utf8_character(const char *s, size_t n)
{
	uint32_t c;
	size_t length = utf8_decode(s, n, &c);

	if (length > 0 && ((c >= 0xfdd0 && c <= 0xfdef) || (c & 0xfffe) == 0xfffe))
		return 0;
	return length;
}

size_t utf8_span(const char *s, size_t n)
{
	size_t i = 0, length;

	while (i < n && (length = utf8_character(s + i, n - i)) > 0)
		i += length;
	return i;
}

void utf8_sanitize(char *s)
{
	size_t n = strlen(s);

	for (size_t i = utf8_span(s, n); i < n; i += utf8_span(s + i, n - i))
		s[i] = '?';
}

size_t utf8_printable(const char *s)
{
	uint32_t c = 0;
	/* looks no further than to what does not belong to the character, as the end does not */
	size_t length = utf8_decode(s, 4, &c);

	return c < ' ' || (c >= 0x7f && c < 0xa0) ? 0 : length;
}

void utf8_escape(char *ret, size_t size, const char *s)
{
	char *end = ret + size;

	while (*s) {
		size_t length = utf8_printable(s), n = length > 0 ? length : strlen("\\xNN");

		if (n >= (size_t)(end - ret))
			break;
		if (length > 0)
			memcpy(ret, s, length);
		else
			snprintf(ret, n + 1, "\\x%02x", (unsigned char)*s);
		ret += n;
		s += length > 0 ? length : 1;
	}
	*ret = 0;
}
