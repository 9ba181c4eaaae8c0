/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <wchar.h>

#define WIDTH_MIN 8        /* below which no column is cut */
#define HIDDEN    SIZE_MAX /* a column's width */

struct table {
	const struct column *columns;
	size_t n_columns;
	char **texts;        /* owned */
	json_object **jsons; /* owned; NULL: null */
	size_t n_cells, n_allocated;
};

struct table *table_new(const struct column *columns, size_t n_columns)
{
	struct table *t = must(calloc(1, sizeof(*t)));

	t->columns = columns;
	t->n_columns = n_columns;
	return t;
}

struct table *table_free(struct table *t)
{
	if (!t)
		return NULL;
	for (size_t i = 0; i < t->n_cells; i++) {
		free(t->texts[i]);
		json_object_put(t->jsons[i]);
	}
	free(t->texts);
	free(t->jsons);
	free(t);
	return NULL;
}

/* Takes both over. */
static void table_cell(struct table *t, char *text, json_object *json)
{
	if (t->n_cells == t->n_allocated) {
		t->n_allocated = t->n_allocated > 0 ? t->n_allocated * 2 : 64;
		t->texts = must(realloc(t->texts, t->n_allocated * sizeof(*t->texts)));
		t->jsons = must(realloc(t->jsons, t->n_allocated * sizeof(*t->jsons)));
	}
	t->texts[t->n_cells] = must(text);
	t->jsons[t->n_cells++] = json;
}

void table_number_as(struct table *t, uint64_t value, const char *text)
{
	if (value == PINBROKER_UNKNOWN)
		table_cell(t, strdup(*text ? text : "-"), NULL);
	else
		table_cell(t, strdup(text), must(json_object_new_int64((int64_t)value)));
}

void table_number(struct table *t, uint64_t value)
{
	char text[32];

	snprintf(text, sizeof(text), "%" PRIu64, value);
	table_number_as(t, value, value != PINBROKER_UNKNOWN ? text : "");
}

void table_string(struct table *t, const char *value)
{
	if (value)
		table_cell(t, escape_text(value), must(json_object_new_string(value)));
	else
		table_cell(t, strdup("-"), NULL);
}

void table_bool(struct table *t, bool value)
{
	table_cell(t, strdup(value ? "yes" : "no"), must(json_object_new_boolean(value)));
}

size_t table_rows(const struct table *t)
{
	return t->n_cells / t->n_columns;
}

json_object *table_to_json(const struct table *t)
{
	json_object *array = must(json_object_new_array());

	for (size_t row = 0; row < t->n_cells; row += t->n_columns) {
		json_object *o = must(json_object_new_object());

		for (size_t i = 0; i < t->n_columns; i++)
			if (!(t->columns[i].flags & COLUMN_TABLE_ONLY))
				json_object_object_add(
					o, t->columns[i].key, json_object_get(t->jsons[row + i]));
		json_object_array_add(array, o);
	}
	return array;
}

/* ---- The table ---- */

size_t text_width(const char *text)
{
	size_t width = 0, n = strlen(text);
	mbstate_t state = {};

	while (n > 0) {
		wchar_t c;
		size_t k = mbrtowc(&c, text, n, &state);
		int w;

		if (k == 0 || k > n) {
			k = 1;
			w = 1;
			state = (mbstate_t){};
		} else {
			w = wcwidth(c);
		}
		width += w > 0 ? (size_t)w : 0;
		text += k;
		n -= k;
	}
	return width;
}

/* Length in bytes of the character that begins here. */
static size_t character_size(const char *text)
{
	mbstate_t state = {};
	size_t n = strlen(text), k;

	k = mbrtowc(NULL, text, n, &state);
	return k == 0 || k > n ? 1 : k;
}

static void print_cut(const char *text, size_t width, bool tail)
{
	if (tail) {
		while (text_width(text) > width - 1)
			text += character_size(text);
		printf("…%s", text);
		return;
	}
	for (size_t used = 0; *text;) {
		size_t k = character_size(text);
		_cleanup_(freep) char *c = must(strndup(text, k));

		used += text_width(c);
		if (used > width - 1)
			break;
		fputs(c, stdout);
		text += k;
	}
	fputs("…", stdout);
}

static void print_padding(size_t n)
{
	for (; n > 0; n--)
		putchar(' ');
}

static void print_cell(const char *text, const struct column *column, size_t width, bool last)
{
	size_t w = text_width(text);

	if (w > width) {
		print_cut(text, width, column->flags & COLUMN_TAIL);
		w = width;
	} else {
		if (column->flags & COLUMN_RIGHT)
			print_padding(width - w);
		fputs(text, stdout);
	}
	if (!last && !(column->flags & COLUMN_RIGHT))
		print_padding(width - w);
	putchar(last ? '\n' : ' ');
}

size_t terminal_width(void)
{
	const char *columns = getenv("COLUMNS");
	struct winsize ws;
	uint64_t n;

	if (columns && parse_u64(columns, &n) && n > 0 && n <= USHRT_MAX)
		return n;
	if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col > 0)
		return ws.ws_col;
	return SIZE_MAX;
}

/* Takes from the widest flexible column, again and again, and then leaves out optional ones, and others but for
 * the first and that of the paths, until the table fits. */
static void widths_fit(const struct table *t, size_t *widths, size_t available)
{
	for (;;) {
		size_t total = 0, widest = SIZE_MAX, optional = SIZE_MAX, other = SIZE_MAX;

		for (size_t i = 0; i < t->n_columns; i++) {
			if (widths[i] == HIDDEN)
				continue;
			total += widths[i] + (total > 0 ? 1 : 0);
			if (t->columns[i].flags & COLUMN_FLEXIBLE && widths[i] > WIDTH_MIN &&
				(widest == SIZE_MAX || widths[i] > widths[widest]))
				widest = i;
			if (t->columns[i].flags & COLUMN_OPTIONAL)
				optional = i;
			if (i > 0 && !(t->columns[i].flags & COLUMN_TAIL))
				other = i;
		}
		if (total <= available)
			return;
		if (widest != SIZE_MAX)
			widths[widest]--;
		else if (optional != SIZE_MAX)
			widths[optional] = HIDDEN;
		else if (other != SIZE_MAX)
			widths[other] = HIDDEN;
		else
			return;
	}
}

static void table_measure(
	const struct table *t, const struct ctl *ctl, size_t available, size_t *ret)
{
	for (size_t i = 0; i < t->n_columns; i++)
		ret[i] = ctl->legend ? strlen(t->columns[i].title) : 0;
	for (size_t i = 0; i < t->n_cells; i++) {
		size_t w = text_width(t->texts[i]);

		if (w > ret[i % t->n_columns])
			ret[i % t->n_columns] = w;
	}
	for (size_t i = 0; i < t->n_columns; i++)
		if (t->columns[i].flags & COLUMN_JSON_ONLY)
			ret[i] = HIDDEN;
	widths_fit(t, ret, available);
}

static void table_print_row(const struct table *t, char *const *texts, const size_t *widths)
{
	size_t last = t->n_columns;

	while (last > 0 && widths[--last] == HIDDEN)
		;
	for (size_t i = 0; i <= last; i++)
		if (widths[i] != HIDDEN)
			print_cell(texts ? texts[i] : t->columns[i].title, &t->columns[i],
				widths[i], i == last);
}

static void table_print_count(const struct table *t, const char *what)
{
	size_t n = table_rows(t);

	/* "pins" without the s */
	printf("%s%zu %.*s listed.\n", n > 0 ? "\n" : "", n, (int)(strlen(what) - (n == 1)), what);
}

static void table_print_within(const struct table *t, const struct ctl *ctl, size_t available)
{
	_cleanup_(freep) size_t *widths = must(calloc(t->n_columns, sizeof(*widths)));

	table_measure(t, ctl, available, widths);
	if (ctl->legend && t->n_cells > 0)
		table_print_row(t, NULL, widths);
	for (size_t row = 0; row < t->n_cells; row += t->n_columns)
		table_print_row(t, t->texts + row, widths);
}

void table_print_rows(const struct table *t, const struct ctl *ctl)
{
	table_print_within(t, ctl, terminal_width());
}

void table_print(const struct table *t, const struct ctl *ctl, const char *what)
{
	size_t available = terminal_width();

	pager_open(ctl);
	if (ctl->json != JSON_OFF) {
		json_print(table_to_json(t), ctl);
	} else {
		table_print_within(t, ctl, available);
		if (ctl->legend && what)
			table_print_count(t, what);
	}
	pager_close();
}

void table_print_vertical(const struct table *t, const char *what)
{
	int width = 0;

	for (size_t i = 0; i < t->n_columns; i++)
		if ((int)strlen(t->columns[i].key) > width)
			width = (int)strlen(t->columns[i].key);
	for (size_t row = 0; row < t->n_cells; row += t->n_columns) {
		printf("%s %s\n", what, t->texts[row]);
		for (size_t i = 1; i < t->n_columns; i++)
			if (!(t->columns[i].flags & COLUMN_TABLE_ONLY))
				printf("  %*s: %s\n", width, t->columns[i].key,
					t->jsons[row + i] ? t->texts[row + i] : "-");
	}
}

/* ---- The pager ---- */

static pid_t pager;
static int stdout_fd = -1; /* while the pager is in its place */

static const char *pager_command(void)
{
	return getenv("PINBROKER_PAGER")
		       ?: getenv("PAGER")
		       ?: "if command -v less >/dev/null; then exec less; else exec cat; fi";
}

void pager_open(const struct ctl *ctl)
{
	const char *command = pager_command();
	int fds[2];

	if (!ctl->pager || !isatty(STDOUT_FILENO) || !*command || strcmp(command, "cat") == 0)
		return;
	if (pipe2(fds, O_CLOEXEC) < 0)
		return;
	pager = fork();
	if (pager == 0) {
		dup2(fds[0], STDIN_FILENO);
		setenv("LESS", "FRSXMK", false);
		execl("/bin/sh", "sh", "-c", command, NULL);
		_exit(127);
	}
	if (pager > 0) {
		/* Quitting the pager early is no error. */
		signal(SIGPIPE, SIG_IGN);
		stdout_fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
		dup2(fds[1], STDOUT_FILENO);
	}
	safe_close(fds[0]);
	safe_close(fds[1]);
}

void pager_close(void)
{
	if (pager <= 0)
		return;
	fflush(stdout);
	clearerr(stdout);
	dup2(stdout_fd, STDOUT_FILENO);
	stdout_fd = safe_close(stdout_fd);
	waitpid(pager, NULL, 0);
	pager = 0;
}
