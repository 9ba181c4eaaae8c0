/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#define BUS_TOLD_MAX 12 /* properties that change, of a kind of object */

/* The objects that ObjectManager shows; pins are found below their files, or by ListPins. */
enum bus_object {
	BUS_CLIENT,
	BUS_FILE,
	BUS_REVOCATION,
	BUS_PIN,
	BUS_OBJECT_COUNT,
};

/* What the bus has been told of an object, which has this in it. */
struct bus_view {
	enum bus_object kind;
	uint64_t id;
	unsigned connection;         /* that it was told on; 0: none */
	uint64_t told[BUS_TOLD_MAX]; /* numbers, and hashes of texts */
	bool changed;                /* in bus::changed */
	TAILQ_ENTRY(bus_view) of_bus;
};
