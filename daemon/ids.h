/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>

/*
 * Identifiers that are never reused, not by the next run either: a file on the run-time file system says
 * up to where they may have been given out. It is written once for many.
 */

struct ids {
	int fd; /* owned; -1: no file, ids begin anew with each run */
	uint64_t last, reserved;
	uint64_t given; /* the next one, if it is not 0 */
};

/* Goes on after what the file says. A file that cannot be had is logged, and done without; -EADDRINUSE if
 * another daemon has it: it is locked until the end. */
int ids_open(struct ids *ids, const char *path);
void ids_close(struct ids *ids);
uint64_t ids_next(struct ids *ids);

/* The next object is one of the run before: it keeps its identifier. */
void ids_give(struct ids *ids, uint64_t id);
