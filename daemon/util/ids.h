/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/*
 * Identifiers that are never reused, not by the next run either: a file on the run-time file system
 * says up to where they may have been given out, and so does the state. It is written once for
 * many.
 */

/* What is read of a greater one is damage: there are as many left up to INT64_MAX, where the
 * protocol ends. */
#define IDS_MAX (UINT64_C(1) << 62)

struct ids {
	int fd; /* owned; -1: no file */
	uint64_t last, reserved;
	uint64_t given; /* the next one, if it is not 0 */
};

/* Goes on after what the file says. A file that cannot be had, or read, is logged, and done
 * without; -EADDRINUSE if another daemon has it: it is locked until the end. */
int ids_open(struct ids *ids, const char *path);
void ids_close(struct ids *ids);
uint64_t ids_next(struct ids *ids);

/* The next object is one of the run before: it keeps its identifier. */
void ids_give(struct ids *ids, uint64_t id);
/* One that the run before has given out, or may have: those to come are greater. */
void ids_pass(struct ids *ids, uint64_t id);

/* Reads one from a file; false: it is none, or is out of range. */
bool ids_parse(const char *text, const char **ret_end, uint64_t *ret);
