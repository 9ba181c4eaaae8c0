/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <json-c/json.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sysexits.h>
#include <systemd/sd-bus.h>

#include "pinbroker.h"
#include "protocol/macro.h"

enum json_mode { JSON_OFF, JSON_SHORT, JSON_PRETTY };

/* What the options say that every verb has. */
struct ctl {
	char **argv;             /* that getopt_long() is at */
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
enum {
	OPTION_BUS = 256,
	OPTION_SOCKET,
	OPTION_JSON,
	OPTION_NO_LEGEND,
	OPTION_NO_PAGER,
	OPTION_VERSION,
	OPTION_VERB,
};

/* The last entry ends the table. */
#define COMMON_OPTIONS                                                                            \
	{"bus", required_argument, NULL, OPTION_BUS},                                             \
		{"socket", required_argument, NULL, OPTION_SOCKET},                               \
		{"json", required_argument, NULL, OPTION_JSON},                                   \
		{"no-legend", no_argument, NULL, OPTION_NO_LEGEND},                               \
		{"no-pager", no_argument, NULL, OPTION_NO_PAGER},                                 \
		{"help", no_argument, NULL, 'h'}, {"version", no_argument, NULL, OPTION_VERSION}, \
	{                                                                                         \
	}

/*
 * Deals with an option of COMMON_OPTIONS, and with those that getopt_long() does not know. Returns
 * the exit code to end with, or -1 to go on.
 */
int ctl_common_option(struct ctl *ctl, int c);
/* For a verb that has the common options only; likewise. */
int ctl_common_options(struct ctl *ctl, int argc, char *argv[]);

/* Each verb gets its arguments with its own name in argv[0], and returns the exit code. */
int ctl_status(struct ctl *ctl, int argc, char *argv[]);
int ctl_list(struct ctl *ctl, int argc, char *argv[]);
int ctl_show(struct ctl *ctl, int argc, char *argv[]);
int ctl_revoke(struct ctl *ctl, int argc, char *argv[]);
int ctl_watch(struct ctl *ctl, int argc, char *argv[]);
int ctl_map(struct ctl *ctl, int argc, char *argv[]);
int ctl_preflight(struct ctl *ctl, int argc, char *argv[]);
int ctl_hold(struct ctl *ctl, int argc, char *argv[]);

/* For messages: what is empty can be seen. */
static inline const char *visible(const char *argument)
{
	return *argument ? argument : "''";
}

/* Has what was printed written. 0, or EX_IOERR, which is said the first time. */
int write_out(void);

/* Says what is wrong on stderr, and returns the exit code. */
int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for a failed call of the library: what failed, then its sentence. */
int fail_call(pinbroker *pb, int r, const char *format, ...) __attribute__((format(printf, 3, 4)));
int fail_usage(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Of a call that nothing was named in: what says of a file that it is not there says it of the broker's socket. */
int reaching(pinbroker *pb, int r);
/* Ends the process if p is NULL. */
void *must(void *p);

static inline void close_filep(FILE **f)
{
	if (*f)
		fclose(*f);
}

bool parse_u64(const char *s, uint64_t *ret);
/* Of an object: decimal. */
bool parse_id(const char *s, uint64_t *ret);
/* "/srv/a b\n" as "/srv/a\040b\012": one word on one line, as in /proc/self/mountinfo. */
char *escape_word(const char *s);
/* Replaces what a terminal could take for a command. */
char *escape_text(const char *s);
/* Whether it is a directory's path or that of something in it; the latter without a slash at its
 * end. */
bool is_below(const char *path, const char *directory);
/* "in 9.8 s", "2.5 min ago", relative to now; PINBROKER_UNKNOWN: "". */
void format_when(uint64_t usec, char *ret, size_t size);
/* "4096", "64K", "3G": only what is exact is abbreviated. */
void format_size(uint64_t size, char ret[static 32]);

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
	COLUMN_OPTIONAL = 1 << 5, /* left out of a table that does not fit; the last one first */
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
/* text: in a table; "": as table_number() has it */
void table_number_as(struct table *t, uint64_t value, const char *text);
void table_string(struct table *t, const char *value); /* NULL: null; copied */
void table_bool(struct table *t, bool value);
size_t table_rows(const struct table *t);
/* what: the plural, for the legend; NULL: no count. */
void table_print(const struct table *t, const struct ctl *ctl, const char *what);
/* The same without pager and count, whatever --json says. */
void table_print_rows(const struct table *t, const struct ctl *ctl);
/* Each row as a list of "key: value" under a heading, "what 17". */
void table_print_vertical(const struct table *t, const char *what);
/* Of objects; the caller owns it. */
json_object *table_to_json(const struct table *t);

/* SIZE_MAX where there is no terminal. To be asked before the pager takes its place. */
size_t terminal_width(void);
/* Columns that text takes on the terminal; bytes that are no characters count as one each. */
size_t text_width(const char *text);

/* Sends stdout through $PAGER where it is a terminal; pager_close() waits for it to end. */
void pager_open(const struct ctl *ctl);
void pager_close(void);

/* ctl-json.c. Out of memory ends the process. Values that are not known are null. */
void json_add(json_object *o, const char *key, json_object *value);
void json_add_string(json_object *o, const char *key, const char *value);
void json_add_number(json_object *o, const char *key, uint64_t value);
void json_add_bool(json_object *o, const char *key, bool value);
/* On a line or several, as --json says; takes it over. */
void json_print(json_object *o, const struct ctl *ctl);

/* ctl-list.c: objects of one kind as rows of a table. */
struct list {
	pinbroker *pb;
	struct table *table;   /* owned */
	uint64_t file, client; /* only those on it, of it; 0: any */
	const uint64_t *ids;   /* only these; NULL: all */
	size_t n_ids;
	bool *found; /* which of the ids there are; NULL: nobody asks */
};

struct list_kind {
	const char *singular, *plural;
	/* Makes and fills the table. 0 or negative errno, of the library. */
	int (*fill)(struct list *list);
	bool by_file, by_client; /* those of one can be asked for */
};

#define LIST_KINDS 5
extern const struct list_kind list_kinds[LIST_KINDS];
/* Fills; 0, or an exit code with the message said. */
int list_fill(struct list *list, const struct list_kind *kind);

/* ctl-bus.c */
const char *bus_address(const struct ctl *ctl);            /* NULL: the system bus */
int ctl_bus_connect(const struct ctl *ctl, sd_bus **ret); /* 0 or negative errno */
/* 0, or an exit code with the message said. */
int ctl_bus_open(const struct ctl *ctl, sd_bus **ret);
int fail_bus(const struct ctl *ctl, int r, const char *what);
/* For an error reply to a method of the broker's. */
int fail_bus_call(const sd_bus_error *error, int r, const char *what);
