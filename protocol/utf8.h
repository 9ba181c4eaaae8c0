/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>
#include <stdint.h>

/*
 * Text that both JSON and sd-bus accept: strict UTF-8 without NUL, and, as sd-bus refuses them,
 * without noncharacters.
 */

/* The length of the character that the n bytes, at least one, start with, and the character; 0 if
 * they start with none, or with NUL. Noncharacters count here. */
size_t utf8_decode(const char *s, size_t n, uint32_t *ret);

/* How many of the first n bytes are such text, counted in whole characters. */
size_t utf8_span(const char *s, size_t n);

/* Puts a question mark in place of each byte that is not part of such text: for what comes from the
 * kernel, where a path or a comm may hold any bytes. */
void utf8_sanitize(char *s);

/* The length of the character that the string starts with; 0 if it is none, or a control (C0, DEL, C1), which a
 * terminal may obey. */
size_t utf8_printable(const char *s);

/* The string for people, cut to size: \xNN in place of each byte that is not part of what can be printed. */
void utf8_escape(char *ret, size_t size, const char *s);
