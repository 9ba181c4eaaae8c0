/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "../integration/world.h"

/*
 * What the benchmarks share. Each starts the real daemon and measures it beside a floor: the least that
 * anything could do which has the same effect. They alternate in many short rounds on one CPU, and what
 * counts is the median of the rounds' ratios: a noisy machine disturbs both alike.
 *
 * A result is a line "NAME VALUE UNIT". An argument "short" makes a few rounds, to see that it works.
 */

#define ROUNDS_MAX 101
#define ELEMENTS(array) (sizeof(array) / sizeof((array)[0]))

struct series {
	double values[ROUNDS_MAX];
	unsigned n;
};

extern unsigned n_rounds;

/* Takes the arguments, and keeps this process and all its children on one CPU. */
void bench_start(int argc, char *argv[], unsigned rounds);

uint64_t nsec_now(void);
void series_add(struct series *series, double value);
double series_median(struct series *series);
void report(const char *name, double value, const char *unit);
/* The medians of both in µs, that of their ratios, and what it is meant to be at most. */
void report_against(const char *name, struct series *usec, const char *floor_name,
		    struct series *floor_usec, double aim);

/* A process that runs serve(fd, userdata), with the other end of its socket. */
pid_t serve(void (*run)(int fd, void *userdata), void *userdata, int *ret_fd);

/* One NUL-terminated message, whose descriptor is closed; 0 at the end of the stream. */
size_t receive_message(int s, char *buffer, size_t size);

/* A call over a connection to the broker; fails on an error reply. */
const char *call(int s, const char *text, int fd);
/* The number behind "name":[ or "name": in a reply. */
long reply_number(const char *reply, const char *name);
