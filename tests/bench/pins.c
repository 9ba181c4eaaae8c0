/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/*
 * How many pins a second can be made and let go in batches, and whether many of them make the next one
 * slower: the latency of a pin, and the daemon's memory, with so many alive.
 */

#define BATCH	   1024 /* the most that a Pin takes */
#define PINS	   65536
#define CALLS	   1000
#define RATE_AIM   300000.0
#define FLAT_AIM   1.3
#define MEMORY_AIM 400.0

static const unsigned alive[] = { 100, 10000, 100000 };

static pinbroker *pb;
static pinbroker_file *file;
static pinbroker_context *context;
static uint64_t pins[100000];

static void pin(unsigned from, unsigned to)
{
	struct pinbroker_range ranges[BATCH];

	while (from < to) {
		unsigned n = to - from < BATCH ? to - from : BATCH;

		for (unsigned i = 0; i < n; i++)
			ranges[i] = (struct pinbroker_range){ (from + i) * (uint64_t)PAGE, PAGE };
		assert_int_equal(pinbroker_pin(pb, file, context, ranges, n, PINBROKER_READ, NULL,
					       pins + from),
				 0);
		from += n;
	}
}

static void unpin(unsigned from, unsigned to)
{
	while (from < to) {
		unsigned n = to - from < BATCH ? to - from : BATCH;

		assert_int_equal(pinbroker_unpin(pb, pins + from, n, NULL, NULL), 0);
		from += n;
	}
}

/* One pin made and let go: a Pin and an Unpin, in µs. */
static double latency(void)
{
	/* a prime stride: now here, now there among the others */
	const unsigned stride = 7919;
	uint64_t begin = nsec_now();

	for (unsigned i = 0; i < CALLS; i++) {
		struct pinbroker_range range = { i * stride % ELEMENTS(pins) * PAGE, PAGE };
		uint64_t id;

		assert_int_equal(pinbroker_pin(pb, file, context, &range, 1, PINBROKER_READ, NULL,
					       &id),
				 0);
		assert_int_equal(pinbroker_unpin(pb, &id, 1, NULL, NULL), 0);
	}
	return (double)(nsec_now() - begin) / 1e3 / CALLS;
}

static double daemon_memory(void)
{
	char path[64], line[128];
	long kib = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", daemon_pid);
	f = fopen(path, "re");
	assert_non_null(f);
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "RssAnon: %ld", &kib) == 1)
			break;
	fclose(f);
	assert_true(kib > 0);
	return (double)kib * 1024;
}

static void bench_live(void)
{
	struct series usec[ELEMENTS(alive)] = {}, ratio = {};
	double memory[ELEMENTS(alive)];
	char name[64];

	(void)latency();
	for (unsigned round = 0; round < n_rounds; round++) {
		unsigned n = 0;

		for (unsigned i = 0; i < ELEMENTS(alive); i++) {
			pin(n, alive[i]);
			n = alive[i];
			if (round == 0)
				memory[i] = daemon_memory();
			series_add(&usec[i], latency());
		}
		unpin(0, n);
		series_add(&ratio, usec[ELEMENTS(alive) - 1].values[round] / usec[0].values[round]);
	}
	for (unsigned i = 0; i < ELEMENTS(alive); i++) {
		snprintf(name, sizeof(name), "pin-and-unpin-with-%u-alive", alive[i]);
		report(name, series_median(&usec[i]), "us");
	}
	report("pin-and-unpin-ratio", series_median(&ratio), "x");
	report("pin-and-unpin-ratio-aim", FLAT_AIM, "x");
	for (unsigned i = 1; i < ELEMENTS(alive); i++) {
		snprintf(name, sizeof(name), "memory-with-%u-alive", alive[i]);
		report(name, (memory[i] - memory[0]) / (alive[i] - alive[0]), "bytes/pin");
	}
	report("memory-aim", MEMORY_AIM, "bytes/pin");
}

static void bench_batches(void)
{
	struct series made = {}, let_go = {};

	for (unsigned round = 0; round < n_rounds; round++) {
		uint64_t begin = nsec_now(), middle;

		pin(0, PINS);
		middle = nsec_now();
		unpin(0, PINS);
		series_add(&made, PINS * 1e9 / (double)(middle - begin));
		series_add(&let_go, PINS * 1e9 / (double)(nsec_now() - middle));
	}
	report("pins-made", series_median(&made), "1/s");
	report("pins-made-aim", RATE_AIM, "1/s");
	report("pins-let-go", series_median(&let_go), "1/s");
}

int main(int argc, char *argv[])
{
	int fd;

	bench_start(argc, argv, 15);
	world_start("");
	mount_fs("tmpfs");
	fd = open(file_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_int_equal(ftruncate(fd, (off_t)ELEMENTS(pins) * PAGE), 0);
	close(fd);
	assert_int_equal(pinbroker_new("bench", socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_int_equal(pinbroker_open_file(pb, file_path, PINBROKER_READ, &file), 0);
	assert_int_equal(pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &context), 0);
	bench_live();
	bench_batches();
	pinbroker_context_free(context);
	pinbroker_file_free(file);
	pinbroker_unref(pb);
	world_stop();
	return 0;
}
