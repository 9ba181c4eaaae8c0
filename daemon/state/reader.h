/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>
#include <uthash.h>

struct ids;
struct notifier;

/* The last line about an object: its identifier and 0, or, of a use, those of client and file. */
struct entry {
	uint64_t key[2];
	char *line;
	const char *path; /* of a file; NULL: it has none */
	UT_hash_handle hh;
};

/* What the state that the run before has left says of each object that was there at last. */
struct state_reader {
	struct ids *ids;           /* hears of all identifiers in it */
	struct notifier *notifier; /* is told that this gets on */
	struct entry *entries;     /* owned, in the order in which the objects were made */
	char *text;                /* owned; the lines are in it */
	uint64_t since_usec;       /* nobody has looked at the leases since */
	unsigned n_damaged;        /* lines that cannot be read */
};

int state_reader_open(struct state_reader *reader, const char *path);
struct entry *state_reader_find(struct state_reader *reader, const uint64_t key[static 2]);
/* The first one after NULL. */
struct entry *state_reader_next(const struct state_reader *reader, const struct entry *entry);
void state_reader_close(struct state_reader *reader);
