/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "daemon/core/sentinel.h"

/*
 * How breaks of leases are heard of: by signals to this process, by hints from the sentinel, and,
 * where those could have missed something, by a sweep: a look at the lease of every file.
 */

struct broker;
struct hearing;

int hearing_new(struct broker *broker, struct hearing **ret);
struct hearing *hearing_free(struct hearing *hearing);

/* Takes it over; error: why there is none. To be called before there are files. */
int hearing_add_sentinel(struct hearing *hearing, struct sentinel *sentinel, int error);

/* Looks at the lease of every file, some each turn of the loop. */
void hearing_sweep(struct hearing *hearing);
