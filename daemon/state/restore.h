/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct broker;

/* A descriptor from the manager's store. */
struct kept_descriptor {
	int fd; /* owned; -1: taken, … */
	uint64_t taken_by; /* … by this object, or the last of several that share it */
	const char *name;
	char kind; /* as store.h has them; 0: a name of somebody else's */
	uint64_t id;
};

/*
 * Takes up what the run before has left, before anybody is served: the state in the file `path`, and the
 * descriptors that belong to it. Leases are armed again, breaks that came meanwhile found; what holders
 * there were can Resume. Takes the descriptors over. What cannot be taken up is logged.
 */
void restore(struct broker *broker, const char *path, struct kept_descriptor *kept, size_t n_kept);
