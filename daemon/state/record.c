/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/state/record.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int unescape(char *s)
{
	char *out = s;

	for (; *s; s++) {
		int high, low;

		if (*s != '%') {
			*out++ = *s;
			continue;
		}
		high = digit(s[1]);
		low = high < 0 ? -1 : digit(s[2]);
		if (low < 0 || high + low == 0)
			return -EBADMSG;
		*out++ = (char)(high << 4 | low);
		s += 2;
	}
	*out = 0;
	return 0;
}

int record_parse(char *line, struct record *ret)
{
	char *word = strsep(&line, " ");

	*ret = (struct record){ .kind = word };
	if (!*word)
		return -EBADMSG;
	while ((word = strsep(&line, " "))) {
		char *value = strchr(word, '=');

		if (!value || value == word || ret->n_fields == RECORD_FIELDS_MAX)
			return -EBADMSG;
		*value++ = 0;
		if (unescape(value) < 0)
			return -EBADMSG;
		ret->fields[ret->n_fields].key = word;
		ret->fields[ret->n_fields++].value = value;
	}
	return 0;
}

const char *record_string(const struct record *record, const char *key)
{
	for (size_t i = 0; i < record->n_fields; i++)
		if (strcmp(record->fields[i].key, key) == 0)
			return record->fields[i].value;
	return NULL;
}

uint64_t record_unsigned(const struct record *record, const char *key, uint64_t otherwise, bool *bad)
{
	const char *value = record_string(record, key);
	uint64_t n;
	char *end;

	if (!value)
		return otherwise;
	errno = 0;
	n = strtoull(value, &end, 10);
	if (value[0] < '0' || value[0] > '9' || *end || errno != 0)
		*bad = true;
	return n;
}

int64_t record_signed(const struct record *record, const char *key, int64_t otherwise, bool *bad)
{
	const char *value = record_string(record, key);
	int64_t n;
	char *end;

	if (!value)
		return otherwise;
	errno = 0;
	n = strtoll(value, &end, 10);
	if (!*value || strchr(" +\t", *value) || *end || errno != 0)
		*bad = true;
	return n;
}

static char *make_room(struct record_buffer *b, size_t n)
{
	if (b->size - b->n < n) {
		size_t size = (b->size + n) * 2;
		char *data = realloc(b->data, size);

		if (!data) {
			b->failed = true;
			return NULL;
		}
		b->data = data;
		b->size = size;
	}
	return b->data + b->n;
}

static void put(struct record_buffer *b, const char *s)
{
	size_t n = strlen(s);
	char *p = make_room(b, n);

	if (!p)
		return;
	memcpy(p, s, n);
	b->n += n;
}

void record_begin(struct record_buffer *b, const char *kind)
{
	put(b, kind);
}

static void put_key(struct record_buffer *b, const char *key)
{
	put(b, " ");
	put(b, key);
	put(b, "=");
}

void record_put(struct record_buffer *b, const char *key, uint64_t value)
{
	char text[24];

	snprintf(text, sizeof(text), "%" PRIu64, value);
	put_key(b, key);
	put(b, text);
}

void record_put_signed(struct record_buffer *b, const char *key, int64_t value)
{
	char text[24];

	snprintf(text, sizeof(text), "%" PRIi64, value);
	put_key(b, key);
	put(b, text);
}

void record_put_string(struct record_buffer *b, const char *key, const char *value)
{
	char *p;

	if (!value)
		return;
	put_key(b, key);
	p = make_room(b, 3 * strlen(value));
	if (!p)
		return;
	for (; *value; value++) {
		unsigned char c = (unsigned char)*value;

		if (c > ' ' && c != '%' && c != 0x7f) {
			*p++ = (char)c;
		} else {
			*p++ = '%';
			*p++ = "0123456789abcdef"[c >> 4];
			*p++ = "0123456789abcdef"[c & 15];
		}
	}
	b->n = (size_t)(p - b->data);
}

void record_end(struct record_buffer *b)
{
	put(b, "\n");
}

void record_buffer_clear(struct record_buffer *b)
{
	free(b->data);
	*b = (struct record_buffer){};
}
