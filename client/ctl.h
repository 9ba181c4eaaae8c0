/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sysexits.h>
#include <systemd/sd-bus.h>

#include "daemon/macro.h"
#include "pinbroker.h"

enum json_mode { JSON_OFF, JSON_SHORT, JSON_PRETTY };

/* What the options say that every verb has. */
struct ctl {
	const char *bus_address; /* NULL: the default */
	const char *socket_path; /* NULL: the default */
	enum json_mode json;
	bool legend;
	bool pager;
};

#define BROKER_NAME      "org.pinbroker1"
#define BROKER_PATH      "/org/pinbroker1"
#define BROKER_INTERFACE "org.pinbroker1.Manager"

/* Codes from 256 on have no short form. */
enum { OPTION_BUS = 256, OPTION_SOCKET, OPTION_VERSION, OPTION_VERB };

/* The last entry ends the table. */
#define COMMON_OPTIONS                                                                            \
	{"bus", required_argument, NULL, OPTION_BUS},                                             \
		{"socket", required_argument, NULL, OPTION_SOCKET},                               \
		{"help", no_argument, NULL, 'h'}, {"version", no_argument, NULL, OPTION_VERSION}, \
	{                                                                                         \
	}

/*
 * Deals with an option of COMMON_OPTIONS, and with those that getopt_long() does not know. Returns
 * the exit code to end with, or -1 to go on.
 */
int ctl_common_option(struct ctl *ctl, int c);
int ctl_json_option(struct ctl *ctl, const char *value); /* likewise */

/* Each verb gets its arguments with its own name in argv[0], and returns the exit code. */
int ctl_list(struct ctl *ctl, int argc, char *argv[]);
int ctl_revoke(struct ctl *ctl, int argc, char *argv[]);
int ctl_watch(struct ctl *ctl, int argc, char *argv[]);
int ctl_hold(struct ctl *ctl, int argc, char *argv[]);

/* Says what is wrong on stderr, and returns the exit code. */
int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for a failed call of the library: what failed, then its sentence. */
int fail_call(pinbroker *pb, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));
int fail_usage(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ends the process if p is NULL. */
void *must(void *p);

bool parse_u64(const char *s, uint64_t *ret);
/* "/srv/a b\n" as "/srv/a\040b\012": one word on one line, as in /proc/self/mountinfo. */
char *escape_word(const char *s);
/* Replaces what a terminal could take for a command. */
char *escape_text(const char *s);
/* "in 9.8 s", "2.5 min ago", relative to now; PINBROKER_UNKNOWN: "". */
void format_when(uint64_t usec, char *ret, size_t size);

/* Makes a handle for looking and listing, which need no connection. 0, or an exit code with the
 * message said. */
int ctl_client(const struct ctl *ctl, pinbroker **ret);

/* ctl-table.c: rows of cells, as a table or as JSON. Out of memory ends the process. */
enum column_flags {
	COLUMN_RIGHT = 1 << 0,    /* numbers */
	COLUMN_TAIL = 1 << 1,     /* when it has to be cut, the end counts (paths) */
	COLUMN_FLEXIBLE = 1 << 2, /* may be cut to make the table fit */
	COLUMN_JSON_ONLY = 1 << 3,
	COLUMN_TABLE_ONLY = 1 << 4,
};

struct column {
	const char *title;
	const char *key; /* in JSON */
	unsigned flags;
};

struct table;

struct table *table_new(const struct column *columns, size_t n_columns);
struct table *table_free(struct table *t);
/* Cells are added row by row, from left to right. */
void table_number(struct table *t, uint64_t value); /* PINBROKER_UNKNOWN: null */
void table_number_as(struct table *t, uint64_t value, const char *text); /* text in a table */
void table_string(struct table *t, const char *value);                   /* NULL: null; copied */
void table_bool(struct table *t, bool value);
/* what: the plural, for the legend. */
void table_print(const struct table *t, const struct ctl *ctl, const char *what);

/* Sends stdout through $PAGER where it is a terminal; pager_close() waits for it to end. */
void pager_open(const struct ctl *ctl);
void pager_close(void);

/* ctl-bus.c */
/* 0, or an exit code with the message said. */
int ctl_bus_open(const struct ctl *ctl, sd_bus **ret);
int fail_bus(const struct ctl *ctl, int r, const char *what);
/* For an error reply to a method of the broker's. */
int fail_bus_call(const sd_bus_error *error, int r, const char *what);
