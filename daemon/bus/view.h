/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "protocol/tree.h"

#define BUS_TOLD_MAX 12 /* properties that change, of a kind of object */

/* The objects that ObjectManager shows; pins are found below their files, or by ListPins. */
enum bus_object {
	BUS_CLIENT,
	BUS_FILE,
	BUS_REVOCATION,
	BUS_PIN,
	BUS_OBJECT_COUNT,
};

/* What the bus has been told of an object. */
struct bus_view {
	enum bus_object kind;
	uint64_t id;
	unsigned connection;         /* that it was told on; 0: none */
	uint64_t told[BUS_TOLD_MAX]; /* numbers, and hashes of texts */
	bool changed;                /* in bus_news::changed */
	TAILQ_ENTRY(bus_view) of_news;
	RB_ENTRY(bus_view) by_id;    /* bus_news::views */
};
