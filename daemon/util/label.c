/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/label.h"

#include <stdlib.h>
#include <string.h>

struct label {
	unsigned n_refs;
	char text[];
};

struct label *label_new(const char *text)
{
	size_t n = strlen(text) + 1;
	struct label *label = malloc(sizeof(*label) + n);

	if (label) {
		label->n_refs = 1;
		memcpy(label->text, text, n);
	}
	return label;
}

struct label *label_ref(struct label *label)
{
	if (label)
		label->n_refs++;
	return label;
}

struct label *label_unref(struct label *label)
{
	if (label && --label->n_refs == 0)
		free(label);
	return NULL;
}

const char *label_text(const struct label *label)
{
	return label ? label->text : NULL;
}
