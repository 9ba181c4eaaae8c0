/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "schema.h"

#include "protocol/macro.h"
#include "utf8.h"

#include <string.h>

/* What ints, strings and the struct of an OBJECTS field have in common. */
struct array {
	void *items;
	size_t n_items;
};

static int read_object(const struct schema *schema, json_object *object, unsigned flags, char *p,
	const char **ret_field);

static void json_object_putp(json_object **o)
{
	json_object_put(*o);
}

static int read_int(json_object *o, int64_t *ret)
{
	int64_t v;

	if (!json_object_is_type(o, json_type_int))
		return -EINVAL;
	v = json_object_get_int64(o);
	/* json-c keeps what is over INT64_MAX as unsigned, and saturates all else. */
	if (v == INT_NULL || (v == INT64_MAX && json_object_get_uint64(o) != INT64_MAX))
		return -EINVAL;
	*ret = v;
	return 0;
}

static int read_string(json_object *o, const char **ret)
{
	const char *s;
	size_t n;

	if (!json_object_is_type(o, json_type_string))
		return -EINVAL;
	s = json_object_get_string(o);
	n = (size_t)json_object_get_string_len(o);
	/* json-c lets through NULs, overlong forms and surrogates. */
	if (utf8_span(s, n) != n)
		return -EINVAL;
	*ret = s;
	return 0;
}

static int read_enum(const struct enumeration *enumeration, json_object *o, int *ret)
{
	const char *name;
	int r;

	r = read_string(o, &name);
	if (r < 0)
		return r;
	r = enumeration_value(enumeration, name);
	if (r < 0)
		return r;
	*ret = r;
	return 0;
}

static int read_array(const struct field *field, json_object *o, unsigned flags, struct array *ret)
{
	const char *inner;
	char *items;
	size_t n, size;
	int r = 0;

	if (!json_object_is_type(o, json_type_array))
		return -EINVAL;
	n = json_object_array_length(o);
	if (n == 0)
		return 0;
	size = field->kind == FIELD_INTS      ? sizeof(int64_t)
	       : field->kind == FIELD_STRINGS ? sizeof(const char *)
					      : field->schema->size;
	items = calloc(n, size);
	if (!items)
		return -ENOMEM;
	*ret = (struct array){items, n};

	for (size_t i = 0; i < n && r >= 0; i++, items += size) {
		json_object *item = json_object_array_get_idx(o, i);

		if (field->kind == FIELD_INTS)
			r = read_int(item, (int64_t *)items);
		else if (field->kind == FIELD_STRINGS)
			r = read_string(item, (const char **)items);
		else
			r = read_object(field->schema, item, flags, items, &inner);
	}
	return r;
}

static int read_field(const struct field *field, json_object *o, unsigned flags, char *p)
{
	const char *inner;
	char *object;

	switch (field->kind) {
	case FIELD_BOOL:
		if (!json_object_is_type(o, json_type_boolean))
			return -EINVAL;
		*(bool *)p = json_object_get_boolean(o);
		return 0;
	case FIELD_INT:
		return read_int(o, (int64_t *)p);
	case FIELD_STRING:
		return read_string(o, (const char **)p);
	case FIELD_ENUM:
		return read_enum(field->enumeration, o, (int *)p);
	case FIELD_OBJECT:
		if (!field->nullable)
			return read_object(field->schema, o, flags, p, &inner);
		object = calloc(1, field->schema->size);
		if (!object)
			return -ENOMEM;
		*(char **)p = object;
		return read_object(field->schema, o, flags, object, &inner);
	case FIELD_INTS:
	case FIELD_STRINGS:
	case FIELD_OBJECTS:
		return read_array(field, o, flags, (struct array *)p);
	}
	return -EINVAL;
}

static int read_null(const struct field *field, char *p)
{
	if (!field->nullable)
		return -EINVAL;
	if (field->kind == FIELD_INT)
		*(int64_t *)p = INT_NULL;
	else if (field->kind == FIELD_ENUM)
		*(int *)p = ENUM_NULL;
	return 0;
}

static const char *find_unknown(const struct schema *schema, json_object *object)
{
	json_object_object_foreach(object, key, value)
	{
		size_t i = 0;

		(void)value;
		while (i < schema->n_fields && strcmp(schema->fields[i].name, key) != 0)
			i++;
		if (i == schema->n_fields)
			return key;
	}
	return schema->name;
}

/* p points to zeroes. On failure it is left half filled, fit for schema_clear(). */
static int read_object(const struct schema *schema, json_object *object, unsigned flags, char *p,
	const char **ret_field)
{
	size_t n_known = 0;
	int r;

	if (!json_object_is_type(object, json_type_object)) {
		*ret_field = "parameters";
		return -EINVAL;
	}
	for (size_t i = 0; i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];
		json_object *o = NULL;

		n_known += json_object_object_get_ex(object, field->name, &o);
		r = o ? read_field(field, o, flags, p + field->offset)
		      : read_null(field, p + field->offset);
		if (r < 0) {
			*ret_field = field->name;
			return r;
		}
	}
	if (!(flags & SCHEMA_IGNORE_UNKNOWN) &&
		(size_t)json_object_object_length(object) != n_known) {
		*ret_field = find_unknown(schema, object);
		return -EINVAL;
	}
	return 0;
}

int schema_read(const struct schema *schema, json_object *object, unsigned flags, void *ret,
	const char **ret_field)
{
	_cleanup_(json_object_putp) json_object *empty = NULL;
	_cleanup_(freep) void *p = NULL;
	const char *field = NULL;
	int r;

	if (!object) {
		object = empty = json_object_new_object();
		if (!object)
			return -ENOMEM;
	}
	/* One byte more: the struct may be empty. */
	p = calloc(1, schema->size + 1);
	if (!p)
		return -ENOMEM;
	r = read_object(schema, object, flags, p, &field);
	if (r < 0) {
		schema_clear(schema, p);
		if (r == -EINVAL && ret_field)
			*ret_field = field;
		return r;
	}
	memcpy(ret, p, schema->size);
	return 0;
}

void schema_clear(const struct schema *schema, void *p)
{
	for (size_t i = 0; i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];
		char *v = (char *)p + field->offset;
		struct array *a = (struct array *)v;

		switch (field->kind) {
		case FIELD_OBJECT:
			if (!field->nullable) {
				schema_clear(field->schema, v);
			} else if (*(void **)v) {
				schema_clear(field->schema, *(void **)v);
				free(TAKE_PTR(*(void **)v));
			}
			break;
		case FIELD_OBJECTS:
			for (size_t j = 0; j < a->n_items; j++)
				schema_clear(
					field->schema, (char *)a->items + j * field->schema->size);
			__attribute__((fallthrough));
		case FIELD_INTS:
		case FIELD_STRINGS:
			free(a->items);
			*a = (struct array){};
			break;
		case FIELD_BOOL:
		case FIELD_INT:
		case FIELD_STRING:
		case FIELD_ENUM:
			break;
		}
	}
}

static json_object *write_string(const char *s)
{
	_cleanup_(freep) char *copy = NULL;
	size_t n = strlen(s);

	if (utf8_span(s, n) == n)
		return json_object_new_string_len(s, (int)n);
	copy = strdup(s);
	if (!copy)
		return NULL;
	utf8_sanitize(copy);
	return json_object_new_string_len(copy, (int)n);
}

static int write_array(const struct field *field, const struct array *a, json_object **ret)
{
	_cleanup_(json_object_putp) json_object *array = NULL;
	int r;

	array = json_object_new_array_ext((int)a->n_items);
	if (!array)
		return -ENOMEM;
	for (size_t i = 0; i < a->n_items; i++) {
		json_object *item = NULL;

		if (field->kind == FIELD_INTS) {
			item = json_object_new_int64(((const int64_t *)a->items)[i]);
		} else if (field->kind == FIELD_STRINGS) {
			item = write_string(((const char *const *)a->items)[i]);
		} else {
			r = schema_write(field->schema,
				(const char *)a->items + i * field->schema->size, &item);
			if (r < 0)
				return r;
		}
		if (!item || json_object_array_add(array, item) < 0) {
			json_object_put(item);
			return -ENOMEM;
		}
	}
	*ret = TAKE_PTR(array);
	return 0;
}

/* Leaves *ret alone where the value is null. */
static int write_field(const struct field *field, const char *p, json_object **ret)
{
	const char *s;

	switch (field->kind) {
	case FIELD_BOOL:
		if (field->nullable && !*(const bool *)p)
			return 0;
		*ret = json_object_new_boolean(*(const bool *)p);
		break;
	case FIELD_INT:
		if (*(const int64_t *)p == INT_NULL)
			return 0;
		*ret = json_object_new_int64(*(const int64_t *)p);
		break;
	case FIELD_STRING:
	case FIELD_ENUM:
		s = field->kind == FIELD_STRING
			    ? *(const char *const *)p
			    : enumeration_name(field->enumeration, *(const int *)p);
		if (!s)
			return 0;
		*ret = write_string(s);
		break;
	case FIELD_OBJECT:
		if (!field->nullable)
			return schema_write(field->schema, p, ret);
		if (!*(const void *const *)p)
			return 0;
		return schema_write(field->schema, *(const void *const *)p, ret);
	case FIELD_INTS:
	case FIELD_STRINGS:
	case FIELD_OBJECTS:
		return write_array(field, (const struct array *)p, ret);
	}
	return *ret ? 0 : -ENOMEM;
}

int schema_write(const struct schema *schema, const void *p, json_object **ret)
{
	_cleanup_(json_object_putp) json_object *object = NULL;
	int r;

	object = json_object_new_object();
	if (!object)
		return -ENOMEM;
	for (size_t i = 0; i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];
		json_object *value = NULL;

		r = write_field(field, (const char *)p + field->offset, &value);
		if (r < 0)
			return r;
		if (value &&
			json_object_object_add_ex(object, field->name, value,
				JSON_C_OBJECT_ADD_KEY_IS_NEW | JSON_C_OBJECT_KEY_IS_CONSTANT) < 0) {
			json_object_put(value);
			return -ENOMEM;
		}
	}
	*ret = TAKE_PTR(object);
	return 0;
}

const struct method *interface_find_method(const struct interface *interface, const char *name)
{
	for (size_t i = 0; i < interface->n_methods; i++)
		if (strcmp(interface->methods[i].name, name) == 0)
			return &interface->methods[i];
	return NULL;
}

const char *enumeration_name(const struct enumeration *enumeration, int value)
{
	if (value < 0 || (size_t)value >= enumeration->n_members)
		return NULL;
	return enumeration->members[value];
}

int enumeration_value(const struct enumeration *enumeration, const char *name)
{
	for (size_t i = 0; i < enumeration->n_members; i++)
		if (strcmp(enumeration->members[i], name) == 0)
			return (int)i;
	return -EINVAL;
}
