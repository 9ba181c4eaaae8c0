/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>

/*
 * JSON text as every version of json-c reads it alike. In strict mode json-c 0.18 refuses all bytes
 * from 0x80 on where char is signed, and 0.16 lets control characters through.
 */
struct json_text {
	size_t n_brackets; /* { and [, in strings too */
	size_t ascii_size; /* bytes of it with \uXXXX for each character that is not ASCII */
};

/* Returns 0, or -EBADMSG for what is not UTF-8, and for control characters in strings. */
int json_text_examine(const char *text, size_t size, struct json_text *ret);

/* Writes ascii_size bytes. The text has passed json_text_examine(). */
void json_text_to_ascii(const char *text, size_t size, char *to);
