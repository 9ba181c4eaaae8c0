/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/object.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/bus/bus.h"
#include "daemon/core/broker.h"
#include "protocol/macro.h"
#include "protocol/utf8.h"

#define NODES_MAX      1024U /* children in one answer */
#define PROPERTIES_MAX 32U
#define NAME_MAX_SIZE  32U

union info {
	struct msg_client_info client;
	struct msg_file_info file;
	struct msg_pin_info pin;
	struct msg_revocation_info revocation;
};

#define KIND(type)                                                                                 \
	static void *find_##type(struct broker *broker, uint64_t id)                               \
	{                                                                                          \
		return broker_find_##type(broker, id);                                             \
	}                                                                                          \
	static uint64_t next_##type(struct broker *broker, uint64_t after)                         \
	{                                                                                          \
		const struct type *p = broker_next_##type(broker, after);                          \
                                                                                                   \
		return p ? p->id : 0;                                                              \
	}                                                                                          \
	static void info_##type(const void *p, union info *ret)                                    \
	{                                                                                          \
		type##_info(p, &ret->type);                                                        \
	}

KIND(client)
KIND(file)
KIND(revocation)
KIND(pin)

static const struct kind {
	const char *prefix, *interface;
	const struct schema *schema;
	void *(*find)(struct broker *broker, uint64_t id);
	uint64_t (*next)(struct broker *broker, uint64_t after); /* 0: none */
	void (*info)(const void *object, union info *ret);
	const char *told[BUS_TOLD_MAX]; /* fields whose changes are told */
	const char *untold[3];          /* others that change; all else does not */
} kinds[BUS_OBJECT_COUNT] = {
#define ROW(type, path, name)                                                                      \
	path, "org.pinbroker1." name, &schema_msg_##type##_info, find_##type, next_##type,         \
		info_##type
	[BUS_CLIENT] = { ROW(client, BUS_PATH "/client", "Client"),
			 { "name", "busName", "alive", "connected", "files", "contexts",
			   "pins", "pinnedBytes" } },
	[BUS_FILE] = { ROW(file, BUS_PATH "/file", "File"),
		       { "access", "lease", "settledUSec", "exposed", "clients", "pins" },
		       { "size" } },
	[BUS_REVOCATION] = { ROW(revocation, BUS_PATH "/revocation", "Revocation"),
			     { "cause", "offset", "length", "size", "pid", "uid", "comm", "state",
			       "deadlineUSec", "endUSec", "remaining", "proof" } },
	[BUS_PIN] = { ROW(pin, BUS_PATH "/file", "Pin"),
		      {},
		      { "handle", "state", "revocation" } },
#undef ROW
};

/* --- values --- */

const char *bus_field_type(const struct field *field)
{
	switch (field->kind) {
	case FIELD_BOOL:
		return "b";
	case FIELD_INT:
		return "t";
	case FIELD_STRING:
	case FIELD_ENUM:
		return "s";
	default:
		return NULL;
	}
}

static int append_string(sd_bus_message *m, const char *value)
{
	char *text;
	int r;

	if (!value)
		return sd_bus_message_append(m, "s", "");
	/* what comes from the kernel may hold any bytes */
	text = strdup(value);
	if (!text)
		return -ENOMEM;
	utf8_sanitize(text);
	r = sd_bus_message_append(m, "s", text);
	free(text);
	return r;
}

int bus_append_value(sd_bus_message *m, const struct field *field, const void *value)
{
	switch (field->kind) {
	case FIELD_BOOL:
		return sd_bus_message_append(m, "b", (int)*(const bool *)value);
	case FIELD_INT: {
		int64_t number = *(const int64_t *)value;

		return sd_bus_message_append(m, "t",
					     number == INT_NULL ? UINT64_MAX : (uint64_t)number);
	}
	case FIELD_STRING:
		return append_string(m, *(const char *const *)value);
	case FIELD_ENUM: {
		int member = *(const int *)value;

		return append_string(m, member == ENUM_NULL
						? NULL
						: enumeration_name(field->enumeration, member));
	}
	default:
		return -EOPNOTSUPP;
	}
}

/* --- properties --- */

/* Calls f for each field, those of a conflict as if they were the object's own. */
static int for_each_field(const struct schema *schema, size_t offset,
			  int (*f)(const struct field *field, size_t offset, void *userdata),
			  void *userdata)
{
	int r = 0;

	for (size_t i = 0; r == 0 && i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];

		r = field->kind == FIELD_OBJECT
			    ? for_each_field(field->schema, offset + field->offset, f, userdata)
			    : f(field, offset + field->offset, userdata);
	}
	return r;
}

struct wanted {
	const char *property;
	const struct field *field;
	size_t offset;
};

static int compare_property(const struct field *field, size_t offset, void *userdata)
{
	struct wanted *w = userdata;

	if (toupper(field->name[0]) != w->property[0] || strcmp(field->name + 1, w->property + 1) != 0)
		return 0;
	w->field = field;
	w->offset = offset;
	return 1;
}

static int get_property(sd_bus *bus, const char *path, const char *interface, const char *property,
			sd_bus_message *reply, void *object, sd_bus_error *error)
{
	struct wanted wanted = { .property = property };
	const struct kind *kind = kinds;
	union info info;

	while (strcmp(kind->interface, interface) != 0)
		kind++;
	if (for_each_field(kind->schema, 0, compare_property, &wanted) == 0)
		return -ENOENT;
	kind->info(object, &info);
	return bus_append_value(reply, wanted.field, (const char *)&info + wanted.offset);
}

static bool is_listed(const char *const *names, size_t n, const char *name)
{
	for (size_t i = 0; i < n && names[i]; i++)
		if (strcmp(names[i], name) == 0)
			return true;
	return false;
}

struct properties {
	const struct kind *kind;
	sd_bus_vtable *vtable;
	char (*names)[NAME_MAX_SIZE];
	size_t n;
};

static int add_property(const struct field *field, size_t offset, void *userdata)
{
	struct properties *p = userdata;
	uint64_t flags = SD_BUS_VTABLE_PROPERTY_CONST;
	char *name = p->names[p->n];

	if (p->n == PROPERTIES_MAX || strlen(field->name) >= NAME_MAX_SIZE)
		return -E2BIG;
	strcpy(name, field->name);
	name[0] = (char)toupper(name[0]);
	if (is_listed(p->kind->told, BUS_TOLD_MAX, field->name))
		flags = SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE;
	else if (is_listed(p->kind->untold, ELEMENTS(p->kind->untold), field->name))
		flags = 0;
	p->vtable[++p->n] = (sd_bus_vtable)SD_BUS_PROPERTY(name, bus_field_type(field),
							   get_property, 0, flags);
	return 0;
}

/* Made of the schema, once. */
static const sd_bus_vtable *get_vtable(enum bus_object kind)
{
	static sd_bus_vtable vtables[BUS_OBJECT_COUNT][PROPERTIES_MAX + 2];
	static char names[BUS_OBJECT_COUNT][PROPERTIES_MAX][NAME_MAX_SIZE];
	struct properties p = {
		.kind = &kinds[kind],
		.vtable = vtables[kind],
		.names = names[kind],
	};

	if (p.vtable[0].type == _SD_BUS_VTABLE_START)
		return p.vtable;
	if (for_each_field(kinds[kind].schema, 0, add_property, &p) < 0)
		return NULL;
	p.vtable[0] = (sd_bus_vtable)SD_BUS_VTABLE_START(0);
	p.vtable[p.n + 1] = (sd_bus_vtable)SD_BUS_VTABLE_END;
	return p.vtable;
}

/* --- paths --- */

/* "/N" and what follows. */
static int read_id(const char **path, uint64_t *ret)
{
	char *end;

	if ((*path)[0] != '/' || (*path)[1] < '1' || (*path)[1] > '9')
		return -EINVAL;
	errno = 0;
	*ret = strtoull(*path + 1, &end, 10);
	*path = end;
	return errno == 0 ? 0 : -errno;
}

static int on_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
		   void **ret_found, sd_bus_error *error)
{
	const struct kind *kind = kinds;
	const char *p;
	uint64_t id;

	while (strcmp(kind->interface, interface) != 0)
		kind++;
	p = path + strlen(kind->prefix);
	if (read_id(&p, &id) < 0)
		return 0;
	if (kind == &kinds[BUS_PIN]) {
		uint64_t file = id;
		struct pin *pin;

		if (strncmp(p, "/pin", 4) != 0)
			return 0;
		p += 4;
		if (read_id(&p, &id) < 0)
			return 0;
		pin = broker_find_pin(userdata, id);
		if (!pin || pin->over || pin->use->file->id != file)
			return 0;
	}
	*ret_found = *p == 0 ? kind->find(userdata, id) : NULL;
	return *ret_found != NULL;
}

struct nodes {
	char **paths; /* NULL at the end */
	size_t n;
};

static int add_node(struct nodes *nodes, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static int add_node(struct nodes *nodes, const char *format, ...)
{
	va_list ap;
	int r;

	va_start(ap, format);
	r = vasprintf(&nodes->paths[nodes->n], format, ap);
	va_end(ap);
	if (r < 0) {
		nodes->paths[nodes->n] = NULL;
		return -ENOMEM;
	}
	nodes->n++;
	return 0;
}

static int add_objects(struct nodes *nodes, struct broker *broker, const struct kind *kind)
{
	uint64_t id = 0;
	int r = 0;

	while (r == 0 && nodes->n < NODES_MAX && (id = kind->next(broker, id)) != 0)
		r = add_node(nodes, "%s/%" PRIu64, kind->prefix, id);
	return r;
}

static int add_pins(struct nodes *nodes, struct broker *broker, uint64_t id)
{
	struct file *file = broker_find_file(broker, id);
	struct pin *pin = NULL;
	int r = 0;

	while (r == 0 && file && nodes->n < NODES_MAX &&
	       (pin = pin_ranges_find(&file->pins, 0, UINT64_MAX, pin)))
		r = add_node(nodes, BUS_PATH "/file/%" PRIu64 "/pin/%" PRIu64, id, pin->id);
	return r;
}

/* sd-bus asks for everything below the path that is looked at: it is given the next level alone. */
static int on_enumerate(sd_bus *bus, const char *prefix, void *userdata, char ***ret_nodes,
			sd_bus_error *error)
{
	sd_bus_message *m = sd_bus_get_current_message(bus);
	const char *path = m ? sd_bus_message_get_path(m) : NULL;
	struct nodes nodes = {};
	uint64_t id;
	int r = 0;

	nodes.paths = calloc(NODES_MAX + 1, sizeof(char *));
	if (!nodes.paths)
		return -ENOMEM;
	for (size_t i = 0; path && r == 0 && i < BUS_PIN; i++) {
		const char *rest = path + strlen(kinds[i].prefix);

		if (strcmp(path, kinds[i].prefix) == 0)
			r = add_objects(&nodes, userdata, &kinds[i]);
		else if (strcmp(path, BUS_PATH) == 0)
			r = add_node(&nodes, "%s", kinds[i].prefix);
		else if (i == BUS_FILE && strncmp(path, kinds[i].prefix, strlen(kinds[i].prefix)) == 0 &&
			 read_id(&rest, &id) == 0 && (!*rest || strcmp(rest, "/pin") == 0))
			r = add_pins(&nodes, userdata, id);
	}
	if (r < 0) {
		for (size_t i = 0; i < nodes.n; i++)
			free(nodes.paths[i]);
		free(nodes.paths);
		return r;
	}
	*ret_nodes = nodes.paths;
	return 0;
}

struct appending {
	sd_bus_message *m;
	const sd_bus_vtable *property;
	const union info *info;
};

static int append_property(const struct field *field, size_t offset, void *userdata)
{
	struct appending *a = userdata;
	int r;

	a->property++;
	r = sd_bus_message_open_container(a->m, 'e', "sv");
	if (r >= 0)
		r = sd_bus_message_append(a->m, "s", a->property->x.property.member);
	if (r >= 0)
		r = sd_bus_message_open_container(a->m, 'v', bus_field_type(field));
	if (r >= 0)
		r = bus_append_value(a->m, field, (const char *)a->info + offset);
	if (r >= 0)
		r = sd_bus_message_close_container(a->m);
	if (r >= 0)
		r = sd_bus_message_close_container(a->m);
	return r < 0 ? r : 0;
}

static int append_interfaces(sd_bus_message *m, enum bus_object kind, const void *object)
{
	union info info;
	struct appending a = { .m = m, .property = get_vtable(kind), .info = &info };
	int r;

	kinds[kind].info(object, &info);
	/* those that every object has, as sd-bus lists them */
	r = sd_bus_message_append(m, "{sa{sv}}{sa{sv}}{sa{sv}}", "org.freedesktop.DBus.Peer", 0,
				  "org.freedesktop.DBus.Introspectable", 0,
				  "org.freedesktop.DBus.Properties", 0);
	if (r >= 0)
		r = sd_bus_message_open_container(m, 'e', "sa{sv}");
	if (r >= 0)
		r = sd_bus_message_append(m, "s", kinds[kind].interface);
	if (r >= 0)
		r = sd_bus_message_open_container(m, 'a', "{sv}");
	if (r >= 0)
		r = for_each_field(kinds[kind].schema, 0, append_property, &a);
	if (r >= 0)
		r = sd_bus_message_close_container(m);
	return r < 0 ? r : sd_bus_message_close_container(m);
}

int bus_object_append_next(sd_bus_message *m, struct broker *broker, enum bus_object kind, uint64_t *after)
{
	uint64_t id = kinds[kind].next(broker, *after);
	char path[128];
	int r;

	if (id == 0)
		return 0;
	*after = id;
	snprintf(path, sizeof(path), "%s/%" PRIu64, kinds[kind].prefix, id);
	r = sd_bus_message_open_container(m, 'e', "oa{sa{sv}}");
	if (r >= 0)
		r = sd_bus_message_append(m, "o", path);
	if (r >= 0)
		r = sd_bus_message_open_container(m, 'a', "{sa{sv}}");
	if (r >= 0)
		r = append_interfaces(m, kind, kinds[kind].find(broker, id));
	if (r >= 0)
		r = sd_bus_message_close_container(m);
	if (r >= 0)
		r = sd_bus_message_close_container(m);
	return r < 0 ? r : 1;
}

int bus_objects_add(sd_bus *bus, struct broker *broker)
{
	int r = sd_bus_add_object_manager(bus, NULL, BUS_PATH);

	if (r >= 0)
		r = sd_bus_add_node_enumerator(bus, NULL, BUS_PATH, on_enumerate, broker);
	for (size_t i = 0; r >= 0 && i < BUS_OBJECT_COUNT; i++) {
		const sd_bus_vtable *vtable = get_vtable((enum bus_object)i);

		r = vtable ? sd_bus_add_fallback_vtable(bus, NULL, kinds[i].prefix,
							kinds[i].interface, vtable, on_find, broker)
			   : -E2BIG;
		if (r >= 0 && i != BUS_PIN)
			r = sd_bus_add_node_enumerator(bus, NULL, kinds[i].prefix, on_enumerate,
						       broker);
	}
	return r;
}

/* --- changes --- */

/* FNV-1a */
static uint64_t hash_text(const char *text)
{
	uint64_t hash = 0xcbf29ce484222325;

	for (; text && *text; text++)
		hash = (hash ^ (unsigned char)*text) * 0x100000001b3;
	return hash;
}

static uint64_t read_value(const struct field *field, const void *value)
{
	switch (field->kind) {
	case FIELD_BOOL:
		return *(const bool *)value;
	case FIELD_INT:
		return (uint64_t) * (const int64_t *)value;
	case FIELD_ENUM:
		return (uint64_t) * (const int *)value;
	default:
		return hash_text(*(const char *const *)value);
	}
}

struct comparison {
	const struct kind *kind;
	const sd_bus_vtable *property;
	const union info *info;
	uint64_t *told;
	bool all; /* nothing was told before */
	char *changed[BUS_TOLD_MAX + 1];
	size_t n;
};

static int compare_told(const struct field *field, size_t offset, void *userdata)
{
	struct comparison *c = userdata;
	uint64_t value;

	c->property++;
	if (!is_listed(c->kind->told, BUS_TOLD_MAX, field->name))
		return 0;
	value = read_value(field, (const char *)c->info + offset);
	if (c->all || *c->told != value)
		c->changed[c->n++] = (char *)c->property->x.property.member;
	*c->told++ = value;
	return 0;
}

/* Finds the properties that differ from what was told, and notes what is told now. */
static void compare(struct bus_view *view, const void *object, unsigned connection,
		    struct comparison *ret)
{
	union info info;

	*ret = (struct comparison){
		.kind = &kinds[view->kind],
		.property = get_vtable(view->kind),
		.info = &info,
		.told = view->told,
		.all = view->connection != connection,
	};
	ret->kind->info(object, &info);
	view->connection = connection;
	(void)for_each_field(ret->kind->schema, 0, compare_told, ret);
}

int bus_object_added(sd_bus *bus, struct broker *broker, struct bus_view *view, unsigned connection)
{
	const struct kind *kind = &kinds[view->kind];
	void *object = kind->find(broker, view->id);
	struct comparison c;
	char path[128];

	if (!object)
		return 0;
	compare(view, object, connection, &c);
	snprintf(path, sizeof(path), "%s/%" PRIu64, kind->prefix, view->id);
	return sd_bus_emit_interfaces_added(bus, path, kind->interface, NULL);
}

int bus_object_changed(sd_bus *bus, struct broker *broker, struct bus_view *view,
		       unsigned connection)
{
	const struct kind *kind = &kinds[view->kind];
	void *object = kind->find(broker, view->id);
	struct comparison c;
	char path[128];

	if (!object)
		return 0;
	compare(view, object, connection, &c);
	if (c.n == 0)
		return 0;
	snprintf(path, sizeof(path), "%s/%" PRIu64, kind->prefix, view->id);
	return sd_bus_emit_properties_changed_strv(bus, path, kind->interface, c.changed);
}

int bus_object_removed(sd_bus *bus, enum bus_object kind, uint64_t id)
{
	char path[128];

	snprintf(path, sizeof(path), "%s/%" PRIu64, kinds[kind].prefix, id);
	return sd_bus_emit_interfaces_removed(bus, path, kinds[kind].interface, NULL);
}
