/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * One line of the state: what kind of object, and its fields, KEY=VALUE, separated by blanks. What would
 * end a value stands as %XX. A field that is not there has no value.
 */

#define RECORD_FIELDS_MAX 24

struct record {
	const char *kind;
	size_t n_fields;
	struct {
		const char *key, *value;
	} fields[RECORD_FIELDS_MAX];
};

/* Takes the line, which has no newline, apart in place. -EBADMSG. */
int record_parse(char *line, struct record *ret);
/* NULL: not there */
const char *record_string(const struct record *record, const char *key);
/* The default where it is not there; what is no number sets *bad. */
uint64_t record_unsigned(const struct record *record, const char *key, uint64_t otherwise, bool *bad);
int64_t record_signed(const struct record *record, const char *key, int64_t otherwise, bool *bad);

/* Lines being written. */
struct record_buffer {
	char *data; /* owned */
	size_t n, size;
	bool failed; /* no memory: what was being written is not complete */
};

void record_begin(struct record_buffer *buffer, const char *kind);
void record_put(struct record_buffer *buffer, const char *key, uint64_t value);
void record_put_signed(struct record_buffer *buffer, const char *key, int64_t value);
void record_put_string(struct record_buffer *buffer, const char *key, const char *value); /* NULL: not there */
void record_end(struct record_buffer *buffer);
void record_buffer_clear(struct record_buffer *buffer);
