/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>

struct show {
	struct ctl *ctl;
	struct list list;
	json_object *array; /* owned; NULL: text is wanted */
};

static void show_found(struct show *s, const struct list_kind *kind)
{
	json_object *rows;

	if (!s->array) {
		table_print_vertical(s->list.table, kind->singular);
		return;
	}
	rows = table_to_json(s->list.table);
	for (size_t i = 0; i < json_object_array_length(rows); i++) {
		json_object *row = json_object_get(json_object_array_get_idx(rows, i));

		json_add_string(row, "type", kind->singular);
		if (json_object_array_add(s->array, row) < 0)
			must(NULL);
	}
	json_object_put(rows);
}

/* Identifiers are the same for all kinds of objects, so one is looked for among them all. */
static int show_run(struct show *s)
{
	int r;

	r = ctl_client(s->ctl, &s->list.pb);
	for (size_t i = 0; i < LIST_KINDS && r == 0; i++) {
		r = list_fill(&s->list, &list_kinds[i]);
		if (r == 0)
			show_found(s, &list_kinds[i]);
		s->list.table = table_free(s->list.table);
	}
	if (s->array && r == 0)
		json_print(json_object_get(s->array), s->ctl);
	pinbroker_unref(s->list.pb);
	for (size_t i = 0; i < s->list.n_ids && (r == 0 || r == EX_NOINPUT); i++)
		if (!s->list.found[i])
			r = fail(EX_NOINPUT,
				"There is no object %" PRIu64 "%s. pinbrokerctl list shows what "
				"there is.",
				s->list.ids[i], geteuid() == 0 ? "" : ", or it is somebody else's");
	return r;
}

int ctl_show(struct ctl *ctl, int argc, char *argv[])
{
	_cleanup_(freep) uint64_t *ids = NULL;
	_cleanup_(freep) bool *found = NULL;
	struct show s = {.ctl = ctl};
	int r;

	r = ctl_common_options(ctl, argc, argv);
	if (r >= 0)
		return r;
	if (optind == argc)
		return fail_usage("There is nothing to show: give the ids of objects.");
	ids = must(calloc((size_t)(argc - optind), sizeof(*ids)));
	for (; optind < argc; optind++) {
		uint64_t id;

		if (!parse_id(argv[optind], &id))
			return fail_usage("An object is given by its number, not by %s.",
				visible(argv[optind]));
		for (size_t i = 0; i < s.list.n_ids; i++)
			if (ids[i] == id)
				id = 0;
		if (id > 0)
			ids[s.list.n_ids++] = id;
	}
	found = must(calloc(s.list.n_ids + 1, sizeof(*found)));
	s.list.ids = ids;
	s.list.found = found;
	if (ctl->json != JSON_OFF)
		s.array = must(json_object_new_array());
	r = show_run(&s);
	json_object_put(s.array);
	return r;
}
