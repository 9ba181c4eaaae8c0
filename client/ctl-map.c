/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <langinfo.h>
#include <string.h>
#include <sys/stat.h>

#define WIDTH_DEFAULT 80U /* where there is no terminal */
#define IDS_SHOWN     8U  /* pins of a bar that are named */

/* In the order of what shows where several meet in a cell. */
enum cell { CELL_FREE, CELL_LEAVING, CELL_RESERVED, CELL_BOUND, CELL_REVOKED, CELLS };

static const struct {
	const char *name, *plain, *block, *color;
} cells[CELLS] = {
	[CELL_FREE] = {"free", ".", "·", NULL},
	[CELL_LEAVING] = {"leaving", "-", "░", "\033[33m"},
	[CELL_RESERVED] = {"reserved", "+", "▒", "\033[33m"},
	[CELL_BOUND] = {"bound", "#", "█", "\033[32m"},
	[CELL_REVOKED] = {"being revoked", "!", "▓", "\033[1;31m"},
};

/* The pins of one client with the same label and access. */
struct group {
	uint64_t client, pinned_bytes;
	enum pinbroker_access access;
	bool on_demand;
	char *label; /* owned; NULL: none */
	char holder[64];
	uint64_t ids[IDS_SHOWN];
	size_t n_pins;
	unsigned char *bar; /* owned; enum cell */
};

struct map {
	struct ctl *ctl;
	pinbroker *pb;
	const char *path;
	struct stat st;       /* of the file; st_ino is 0: it is known by its path as listed only */
	uint64_t file;        /* 0: not found */
	size_t n_found;
	char *title;          /* owned */
	uint64_t size;        /* that the bars stand for */
	size_t width;         /* of the bars */
	bool blocks, colors;  /* what the output can show */
	struct group *groups; /* owned */
	size_t n_groups;
};

/* ---- What there is ---- */

static int find_file(const struct pinbroker_file_info *info, void *userdata)
{
	_cleanup_(freep) char *path = NULL;
	struct map *m = userdata;
	char size[32];

	if (m->st.st_ino != 0 ? info->device != m->st.st_dev || info->inode != m->st.st_ino
			      : strcmp(info->path, m->path) != 0)
		return 0;
	/* one inode has one, a path that was listed may have several */
	if (m->n_found++ > 0)
		return 1;
	m->file = info->file;
	m->size = S_ISREG(m->st.st_mode) ? (uint64_t)m->st.st_size : info->size;
	format_size(m->size, size);
	path = escape_text(m->path);
	if (asprintf(&m->title,
		    "%s: file %" PRIu64 ", %s on %s, lease %s%s, %" PRIu64 " pin%s of %" PRIu64
		    " client%s",
		    path, info->file, size, info->file_system,
		    pinbroker_lease_state_name(info->lease), info->exposed ? ", EXPOSED" : "",
		    info->n_pins, PLURAL(info->n_pins), info->n_clients, PLURAL(info->n_clients)) < 0)
		must(NULL);
	return 0;
}

/* A pin may end past the end of a file that has been cut. */
static int measure_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct map *m = userdata;

	if (info->offset + info->length > m->size)
		m->size = info->offset + info->length;
	return 0;
}

static bool same_text(const char *a, const char *b)
{
	return a && b ? strcmp(a, b) == 0 : a == b;
}

static struct group *map_group(struct map *m, const struct pinbroker_pin_info *info)
{
	struct group *g;

	for (size_t i = 0; i < m->n_groups; i++) {
		g = &m->groups[i];
		if (g->client == info->client && g->access == info->access &&
			g->on_demand == info->on_demand && same_text(g->label, info->label))
			return g;
	}
	m->groups = must(realloc(m->groups, (m->n_groups + 1) * sizeof(*m->groups)));
	g = &m->groups[m->n_groups++];
	*g = (struct group){
		.client = info->client,
		.access = info->access,
		.on_demand = info->on_demand,
	};
	g->label = info->label ? escape_text(info->label) : NULL;
	g->bar = must(calloc(m->width, 1));
	return g;
}

static enum cell cell_of(const struct pinbroker_pin_info *info)
{
	if (info->revocation != PINBROKER_UNKNOWN && !info->on_demand)
		return CELL_REVOKED;
	return info->state == PINBROKER_PIN_BOUND      ? CELL_BOUND
	       : info->state == PINBROKER_PIN_RESERVED ? CELL_RESERVED
						       : CELL_LEAVING;
}

/* The cell that a byte is in. */
static size_t map_cell(const struct map *m, uint64_t offset)
{
	return (size_t)((unsigned __int128)offset * m->width / m->size);
}

static int add_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct map *m = userdata;
	struct group *g = map_group(m, info);
	enum cell cell = cell_of(info);
	size_t last;

	if (g->n_pins < IDS_SHOWN)
		g->ids[g->n_pins] = info->pin;
	g->n_pins++;
	g->pinned_bytes += info->length;
	/* One that was made after the range had been measured is drawn as far as it goes. */
	if (info->offset >= m->size)
		return 0;
	last = info->length > m->size - info->offset ? m->size - 1
						     : info->offset + info->length - 1;
	for (size_t i = map_cell(m, info->offset); i <= map_cell(m, last); i++)
		if (g->bar[i] < cell)
			g->bar[i] = (unsigned char)cell;
	return 0;
}

static int add_holder(const struct pinbroker_client_info *info, void *userdata)
{
	struct map *m = userdata;

	for (size_t i = 0; i < m->n_groups; i++)
		if (m->groups[i].client == info->client) {
			_cleanup_(freep) char *comm = escape_text(info->comm);

			snprintf(m->groups[i].holder, sizeof(m->groups[i].holder),
				"%s, pid %d, uid %u%s", comm, (int)info->pid, (unsigned)info->uid,
				info->alive ? "" : ", dead");
		}
	return 0;
}

/* ---- The drawing ---- */

static void print_cells(const struct map *m, enum cell cell, size_t n)
{
	bool color = m->colors && cells[cell].color;

	if (color)
		fputs(cells[cell].color, stdout);
	for (; n > 0; n--)
		fputs(m->blocks ? cells[cell].block : cells[cell].plain, stdout);
	if (color)
		fputs("\033[0m", stdout);
}

static void print_bar(const struct map *m, const unsigned char *bar)
{
	for (size_t i = 0, n; i < m->width; i += n) {
		for (n = 1; i + n < m->width && bar[i + n] == bar[i]; n++)
			;
		print_cells(m, bar[i], n);
	}
	putchar('\n');
}

static void print_scale(const struct map *m)
{
	char size[32];

	format_size(m->size, size);
	printf("0%*s\n", (int)m->width - 1, size);
}

static void print_key(const struct map *m)
{
	double bytes = (double)m->size / (double)m->width;

	putchar('\n');
	for (enum cell cell = CELLS; cell-- > CELL_FREE;) {
		print_cells(m, cell, 1);
		printf(" %s%s", cells[cell].name, cell > CELL_FREE ? ", " : "");
	}
	printf("; a cell is %.*f bytes\n", bytes < 10 ? 1 : 0, bytes);
}

static void print_group(const struct map *m, const struct group *g)
{
	char size[32];

	format_size(g->pinned_bytes, size);
	printf("client %" PRIu64 " (%s): %s of %s%s%s%s, pin%s", g->client,
		*g->holder ? g->holder : "left", pinbroker_access_name(g->access), size,
		g->label ? " as " : "", g->label ?: "", g->on_demand ? ", on demand" : "",
		PLURAL(g->n_pins));
	for (size_t i = 0; i < g->n_pins && i < IDS_SHOWN; i++)
		printf(" %" PRIu64, g->ids[i]);
	if (g->n_pins > IDS_SHOWN)
		printf(" and %zu more", g->n_pins - IDS_SHOWN);
	putchar('\n');
	print_bar(m, g->bar);
}

static void map_print(struct map *m)
{
	const char *term = getenv("TERM");

	m->blocks = strcmp(nl_langinfo(CODESET), "UTF-8") == 0;
	m->colors = isatty(STDOUT_FILENO) && !getenv("NO_COLOR") &&
		    !(term && strcmp(term, "dumb") == 0);
	pager_open(m->ctl);
	puts(m->title);
	if (m->n_groups > 0)
		print_scale(m);
	for (size_t i = 0; i < m->n_groups; i++)
		print_group(m, &m->groups[i]);
	if (m->ctl->legend && m->n_groups > 0)
		print_key(m);
	pager_close();
}

static int map_draw(struct map *m)
{
	int r;

	m->width = terminal_width();
	if (m->width == SIZE_MAX)
		m->width = WIDTH_DEFAULT;
	r = pinbroker_list_pins(m->pb, m->file, 0, measure_pin, m);
	if (r >= 0 && m->size > 0)
		r = pinbroker_list_pins(m->pb, m->file, 0, add_pin, m);
	if (r >= 0)
		r = pinbroker_list_clients(m->pb, add_holder, m);
	if (r < 0)
		return fail_call(m->pb, r, "Cannot list the pins on %s", m->path);
	map_print(m);
	return EX_OK;
}

/* {"file": {…}, "pins": […], "clients": […]}, each as list has them. */
static int map_draw_json(struct map *m)
{
	static const char *const keys[] = {"pins", "file", "clients"};
	json_object *o = must(json_object_new_object());
	int r = 0;

	for (size_t i = 0; i < ELEMENTS(keys) && r == 0; i++) {
		struct list list = {.pb = m->pb};

		if (i == 0)
			list.file = m->file;
		if (i == 1) {
			list.ids = &m->file;
			list.n_ids = 1;
		}
		r = list_fill(&list, &list_kinds[i]);
		if (r == 0) {
			json_object *rows = table_to_json(list.table);

			json_add(o, keys[i],
				i == 1 ? json_object_get(json_object_array_get_idx(rows, 0))
				       : json_object_get(rows));
			json_object_put(rows);
		}
		table_free(list.table);
	}
	if (r == 0)
		json_print(json_object_get(o), m->ctl);
	json_object_put(o);
	return r;
}

static int map_run(struct map *m)
{
	int r, missing = 0;

	r = ctl_client(m->ctl, &m->pb);
	if (r > 0)
		return r;
	/* One that is gone, or cannot be reached, is looked for by its path as listed. */
	if (stat(m->path, &m->st) < 0) {
		missing = errno;
		m->st = (struct stat){};
	}
	r = pinbroker_list_files(m->pb, find_file, m);
	if (r < 0)
		return fail_call(m->pb, reaching(m->pb, r), "Cannot look for %s", m->path);
	if (m->file == 0 && m->st.st_ino == 0)
		return fail(EX_NOINPUT,
			"Cannot find %s: %s. Nor is a file listed that had this path: pinbrokerctl list "
			"files.",
			visible(m->path), strerror(missing));
	if (m->file == 0)
		return fail(EX_NOINPUT,
			"%s is not open through the broker%s. pinbrokerctl list files shows what is.",
			m->path, geteuid() == 0 ? "" : ", or by others only");
	if (m->n_found > 1)
		return fail(EX_DATAERR,
			"There is no %s now, and several files are listed as that. pinbrokerctl "
			"show tells of each, by its id.",
			m->path);
	return m->ctl->json != JSON_OFF ? map_draw_json(m) : map_draw(m);
}

int ctl_map(struct ctl *ctl, int argc, char *argv[])
{
	struct map m = {.ctl = ctl};
	int r;

	r = ctl_common_options(ctl, argc, argv);
	if (r >= 0)
		return r;
	if (argc - optind != 1)
		return fail_usage("Give one file to draw the pins of.");
	m.path = argv[optind];
	r = map_run(&m);
	for (size_t i = 0; i < m.n_groups; i++) {
		free(m.groups[i].label);
		free(m.groups[i].bar);
	}
	free(m.groups);
	free(m.title);
	pinbroker_unref(m.pb);
	return r;
}
