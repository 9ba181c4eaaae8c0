/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "world.h"

/* A holder in the test's own process, of an eventfd, which pins nothing. By itself it lets go on
 * the notice that says who it was. */

struct seen {
	unsigned n, n_updates, n_lost;
	uint64_t revocation;
	bool let_go;
};

struct holding {
	pinbroker *pb;
	pinbroker_file *file;
	pinbroker_context *context;
	uint64_t pin;
	int context_fd;
	struct seen seen;
	void (*on_notice)(struct holding *h, const struct pinbroker_notice *n); /* or NULL */
};

void must(pinbroker *pb, int r);
/* In a world that stands. */
void holding_connect(struct holding *h, unsigned channels, bool thread);
void holding_pin(struct holding *h);
/* Both, and the world before. */
void holding_begin(struct holding *h, unsigned channels);
void holding_end(struct holding *h);
/* Without a word to the broker. */
void holding_drop(struct holding *h);

/* Waits until there is something; what pinbroker_dispatch() returns. */
int holding_dispatch(struct holding *h);
/* A truncate, which the holder hears of once and a second time with who it was, and which it lets
 * through. */
void holding_see_truncate(struct holding *h);

unsigned count_descriptors(void);
