/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/state/record.h"
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

/* What has been read must come back the same when it is written and read again. */
static void try_line(char *line)
{
	struct record_buffer b = {};
	struct record first, again;

	if (record_parse(line, &first) < 0)
		return;
	record_begin(&b, first.kind);
	for (size_t i = 0; i < first.n_fields; i++)
		record_put_string(&b, first.fields[i].key, first.fields[i].value);
	record_end(&b);
	if (b.failed || b.data[b.n - 1] != '\n')
		abort();
	b.data[b.n - 1] = 0;
	if (record_parse(b.data, &again) < 0 || again.n_fields != first.n_fields ||
	    strcmp(again.kind, first.kind) != 0)
		abort();
	for (size_t i = 0; i < first.n_fields; i++) {
		bool bad = false;

		if (strcmp(again.fields[i].key, first.fields[i].key) != 0 ||
		    strcmp(again.fields[i].value, first.fields[i].value) != 0)
			abort();
		record_unsigned(&first, first.fields[i].key, 0, &bad);
		record_signed(&first, first.fields[i].key, 0, &bad);
	}
	record_buffer_clear(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *text = malloc(size + 1), *line, *next;

	if (!text)
		return 0;
	memcpy(text, data, size);
	text[size] = 0;
	for (next = text; (line = strsep(&next, "\n"));)
		try_line(line);
	free(text);
	return 0;
}
