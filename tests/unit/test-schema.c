/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "protocol/interface.h"
#include "protocol/macro.h"
#include "protocol/service.h"
#include "protocol/utf8.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define POINT_FIELDS(F)        \
	F(INT, REQUIRED, x, _) \
	F(STRING, NULLABLE, name, _)

#define EVERY_FIELDS(F)                   \
	F(BOOL, REQUIRED, truth, _)       \
	F(INT, REQUIRED, number, _)       \
	F(INT, NULLABLE, maybe, _)        \
	F(STRING, REQUIRED, text, _)      \
	F(STRING, NULLABLE, note, _)      \
	F(ENUM, REQUIRED, access, access) \
	F(ENUM, NULLABLE, proof, proof)   \
	F(OBJECT, REQUIRED, point, point) \
	F(OBJECT, NULLABLE, other, point) \
	F(INTS, REQUIRED, numbers, _)     \
	F(STRINGS, REQUIRED, texts, _)    \
	F(OBJECTS, REQUIRED, points, point)

SCHEMA_STRUCT(point, POINT_FIELDS)
SCHEMA_STRUCT(every, EVERY_FIELDS)
SCHEMA_TABLE(point, Point, POINT_FIELDS)
SCHEMA_TABLE(every, Every, EVERY_FIELDS)

#define EVERY_JSON                                                      \
	"{\"truth\":true,\"number\":-7,\"maybe\":9223372036854775807,"  \
	"\"text\":\"\xc3\xa4\",\"note\":\"n\",\"access\":\"write\","    \
	"\"proof\":\"presumed\",\"point\":{\"x\":1,\"name\":\"p\"},"    \
	"\"other\":{\"x\":2},\"numbers\":[3,4],\"texts\":[\"a\",\"\"]," \
	"\"points\":[{\"x\":5},{\"x\":6,\"name\":\"q\"}]}"

static void json_object_putp(json_object **o)
{
	json_object_put(*o);
}

static json_object *parse(const char *text)
{
	json_object *o = json_tokener_parse(text);

	assert_non_null(o);
	return o;
}

static void every_kind_is_read(void **state)
{
	_cleanup_(json_object_putp) json_object *o = parse(EVERY_JSON), *again = NULL;
	struct every e;

	assert_int_equal(schema_read(&schema_every, o, 0, &e, NULL), 0);
	assert_true(e.truth);
	assert_int_equal(e.number, -7);
	assert_true(e.maybe == INT64_MAX);
	assert_string_equal(e.text, "\xc3\xa4");
	assert_string_equal(e.note, "n");
	assert_int_equal(e.access, ACCESS_WRITE);
	assert_int_equal(e.proof, PROOF_PRESUMED);
	assert_int_equal(e.point.x, 1);
	assert_string_equal(e.point.name, "p");
	assert_int_equal(e.other->x, 2);
	assert_null(e.other->name);
	assert_int_equal(e.numbers.n_items, 2);
	assert_int_equal(e.numbers.items[1], 4);
	assert_int_equal(e.texts.n_items, 2);
	assert_string_equal(e.texts.items[0], "a");
	assert_int_equal(e.points.n_items, 2);
	assert_int_equal(e.points.items[1].x, 6);
	assert_string_equal(e.points.items[1].name, "q");

	assert_int_equal(schema_write(&schema_every, &e, &again), 0);
	assert_true(json_object_equal(o, again));
	schema_clear(&schema_every, &e);
	assert_null(e.other);
	assert_null(e.points.items);
}

/* Reads EVERY_JSON with one field replaced (value NULL: removed). */
static int read_with(const char *field, const char *value, unsigned flags, const char **ret_field)
{
	_cleanup_(json_object_putp) json_object *o = parse(EVERY_JSON);
	struct every e, before;
	int r;

	json_object_object_del(o, field);
	if (value) {
		json_object *wrapped = parse(value), *v = NULL;

		json_object_object_get_ex(wrapped, "v", &v);
		json_object_object_add(o, field, json_object_get(v));
		json_object_put(wrapped);
	}
	memset(&e, 0x5a, sizeof(e));
	before = e;
	*ret_field = NULL;
	r = schema_read(&schema_every, o, flags, &e, ret_field);
	if (r < 0)
		assert_memory_equal(&e, &before, sizeof(e));
	else
		schema_clear(&schema_every, &e);
	/* It may point into the object, which goes now. */
	if (*ret_field)
		*ret_field = strcmp(*ret_field, field) == 0 ? field : "another";
	return r;
}

static void what_does_not_fit_is_refused(void **state)
{
	static const struct {
		const char *field, *value;
	} bad[] = {
		{"truth", NULL},
		{"truth", "{\"v\":null}"},
		{"truth", "{\"v\":1}"},
		{"truth", "{\"v\":\"true\"}"},
		{"number", NULL},
		{"number", "{\"v\":null}"},
		{"number", "{\"v\":1.0}"},
		{"number", "{\"v\":1e3}"},
		{"number", "{\"v\":\"1\"}"},
		{"number", "{\"v\":true}"},
		{"number", "{\"v\":[1]}"},
		{"number", "{\"v\":9223372036854775808}"},
		{"number", "{\"v\":18446744073709551615}"},
		{"number", "{\"v\":18446744073709551616}"},
		{"number", "{\"v\":99999999999999999999999999}"},
		{"number", "{\"v\":-9223372036854775808}"},
		{"number", "{\"v\":-9223372036854775809}"},
		{"number", "{\"v\":-99999999999999999999999999}"},
		{"maybe", "{\"v\":-9223372036854775808}"},
		{"maybe", "{\"v\":9223372036854775808}"},
		{"maybe", "{\"v\":\"\"}"},
		{"text", NULL},
		{"text", "{\"v\":null}"},
		{"text", "{\"v\":1}"},
		{"text", "{\"v\":\"a\\u0000b\"}"},
		{"text", "{\"v\":\"\\u0000\"}"},
		{"text", "{\"v\":\"\\uffff\"}"},
		{"text", "{\"v\":\"\xff\"}"},
		{"text", "{\"v\":\"\xc0\x80\"}"},
		{"text", "{\"v\":\"\xed\xa0\x80\"}"},
		{"text", "{\"v\":\"\xf4\x90\x80\x80\"}"},
		{"note", "{\"v\":{}}"},
		{"note", "{\"v\":\"\\u0000\"}"},
		{"access", NULL},
		{"access", "{\"v\":null}"},
		{"access", "{\"v\":\"\"}"},
		{"access", "{\"v\":\"Read\"}"},
		{"access", "{\"v\":\"read\\u0000\"}"},
		{"access", "{\"v\":0}"},
		{"proof", "{\"v\":\"none\"}"},
		{"point", NULL},
		{"point", "{\"v\":null}"},
		{"point", "{\"v\":[]}"},
		{"point", "{\"v\":{}}"},
		{"point", "{\"v\":{\"x\":null}}"},
		{"point", "{\"v\":{\"x\":1,\"y\":2}}"},
		{"other", "{\"v\":{}}"},
		{"other", "{\"v\":{\"x\":1,\"name\":2}}"},
		{"other", "{\"v\":7}"},
		{"numbers", NULL},
		{"numbers", "{\"v\":null}"},
		{"numbers", "{\"v\":{}}"},
		{"numbers", "{\"v\":[1,null]}"},
		{"numbers", "{\"v\":[null,1]}"},
		{"numbers", "{\"v\":[1,\"2\"]}"},
		{"numbers", "{\"v\":[1,18446744073709551615]}"},
		{"texts", NULL},
		{"texts", "{\"v\":\"a\"}"},
		{"texts", "{\"v\":[\"a\",null]}"},
		{"texts", "{\"v\":[\"a\",1]}"},
		{"points", NULL},
		{"points", "{\"v\":[null]}"},
		{"points", "{\"v\":[{\"x\":1},{}]}"},
		{"points", "{\"v\":[{\"x\":1},{\"x\":\"1\"}]}"},
		{"points", "{\"v\":[{\"x\":1},{\"x\":1,\"y\":1}]}"},
		{"points", "{\"v\":[[]]}"},
	};
	const char *field;

	for (size_t i = 0; i < ELEMENTS(bad); i++) {
		if (read_with(bad[i].field, bad[i].value, 0, &field) != -EINVAL || !field ||
			strcmp(field, bad[i].field) != 0)
			fail_msg("%s: %s", bad[i].field, bad[i].value ?: "missing");
	}
}

static void null_and_missing_are_the_same(void **state)
{
	static const char *const nullable[] = {"maybe", "note", "proof", "other"};
	const char *field;

	for (size_t i = 0; i < ELEMENTS(nullable); i++) {
		assert_int_equal(read_with(nullable[i], NULL, 0, &field), 0);
		assert_int_equal(read_with(nullable[i], "{\"v\":null}", 0, &field), 0);
	}
	assert_int_equal(read_with("numbers", "{\"v\":[]}", 0, &field), 0);
	assert_int_equal(read_with("points", "{\"v\":[]}", 0, &field), 0);
}

static void null_has_its_values(void **state)
{
	_cleanup_(json_object_putp) json_object *o = parse("{\"x\":1}"), *written = NULL;
	struct msg_revocation_info info = {.file = INT_NULL,
		.endUSec = INT_NULL,
		.proof = ENUM_NULL,
		.conflict.size = INT_NULL};
	struct msg_hello_in hello = {"x", "y"};
	struct point point;

	assert_int_equal(schema_read(&schema_point, o, 0, &point, NULL), 0);
	assert_null(point.name);

	assert_int_equal(schema_read(&schema_msg_hello_in, NULL, 0, &hello, NULL), 0);
	assert_null(hello.name);
	assert_null(hello.busName);

	assert_int_equal(schema_write(&schema_msg_revocation_info, &info, &written), 0);
	assert_false(json_object_object_get_ex(written, "file", NULL));
	assert_false(json_object_object_get_ex(written, "path", NULL));
	assert_false(json_object_object_get_ex(written, "endUSec", NULL));
	assert_false(json_object_object_get_ex(written, "proof", NULL));
	assert_true(json_object_object_get_ex(written, "pins", NULL));

	memset(&info, 0, sizeof(info));
	assert_int_equal(schema_read(&schema_msg_revocation_info, written, 0, &info, NULL), 0);
	assert_true(info.file == INT_NULL && info.endUSec == INT_NULL);
	assert_true(info.conflict.size == INT_NULL);
	assert_int_equal(info.proof, ENUM_NULL);
	schema_clear(&schema_msg_revocation_info, &info);
}

static void unknown_fields_are_refused_unless_ignored(void **state)
{
	_cleanup_(json_object_putp) json_object *null = parse("{\"x\":1,\"y\":null}");
	struct point point;
	const char *field;

	assert_int_equal(read_with("extra", "{\"v\":1}", 0, &field), -EINVAL);
	assert_string_equal(field, "extra");
	assert_int_equal(read_with("extra", "{\"v\":1}", SCHEMA_IGNORE_UNKNOWN, &field), 0);
	assert_int_equal(
		read_with("point", "{\"v\":{\"x\":1,\"y\":2}}", SCHEMA_IGNORE_UNKNOWN, &field), 0);
	assert_int_equal(schema_read(&schema_point, null, 0, &point, &field), -EINVAL);
	assert_string_equal(field, "y");
}

static void only_an_object_is_read(void **state)
{
	static const char *const texts[] = {"[]", "1", "\"x\"", "true"};
	struct msg_list_files_in in;
	const char *field = NULL;

	for (size_t i = 0; i < ELEMENTS(texts); i++) {
		_cleanup_(json_object_putp) json_object *o = parse(texts[i]);

		assert_int_equal(
			schema_read(&schema_msg_list_files_in, o, 0, &in, &field), -EINVAL);
		assert_string_equal(field, "parameters");
	}
	assert_int_equal(schema_read(&schema_msg_list_files_in, NULL, 0, &in, &field), 0);
}

static void text_is_made_fit_to_write(void **state)
{
	_cleanup_(json_object_putp) json_object *o = NULL;
	struct point point = {.name = "/a\xff/\xc3\xa4\xc3"};
	struct point again;

	assert_int_equal(schema_write(&schema_point, &point, &o), 0);
	assert_int_equal(schema_read(&schema_point, o, 0, &again, NULL), 0);
	assert_string_equal(again.name, "/a?/\xc3\xa4?");
}

static void words_are_found_by_number_and_name(void **state)
{
	const struct enumeration *e = &enumeration_access;

	assert_string_equal(enumeration_name(e, 0), "read");
	assert_string_equal(enumeration_name(e, (int)e->n_members - 1), e->members[e->n_members - 1]);
	assert_null(enumeration_name(e, -1));
	assert_null(enumeration_name(&(struct enumeration){ .members = e->members, .n_members = 1 }, 1));
	assert_int_equal(enumeration_value(e, "write"), ACCESS_WRITE);
	assert_int_equal(enumeration_value(e, "writ"), -EINVAL);
	assert_int_equal(enumeration_value(e, ""), -EINVAL);
}

static void utf8_is_strict(void **state)
{
	static const struct {
		const char *s;
		size_t n, span;
	} cases[] = {
		{"", 0, 0},
		{"abc", 3, 3},
		{"a\0b", 3, 1},
		{"\xc2\x80", 2, 2},
		{"\xc2", 1, 0},
		{"\xc2\x80", 1, 0},
		{"\xc3\xc3", 2, 0},
		{"\xc1\xbf", 2, 0},
		{"\xe0\xa0\x80", 3, 3},
		{"\xe0\x9f\xbf", 3, 0},
		{"\xed\x9f\xbf", 3, 3},
		{"\xed\xa0\x80", 3, 0},
		{"\xed\xbf\xbf", 3, 0},
		{"\xef\xbf\xbd", 3, 3},
		{"\xef\xbf\xbe", 3, 0},
		{"\xef\xb7\x90", 3, 0},
		{"\xf0\x90\x80\x80", 4, 4},
		{"\xf0\x8f\xbf\xbf", 4, 0},
		{"\xf4\x8f\xbf\xbd", 4, 4},
		{"\xf4\x90\x80\x80", 4, 0},
		{"a\x80", 2, 1},
		{"\xf8\x88\x80\x80\x80", 5, 0},
	};

	for (size_t i = 0; i < ELEMENTS(cases); i++)
		assert_int_equal(utf8_span(cases[i].s, cases[i].n), cases[i].span);
}

/* What a terminal may obey is shown; what does not fit is left out, never half of a character. */
static void utf8_is_escaped(void **state)
{
	static const struct {
		const char *s;
		size_t size;
		const char *escaped;
	} cases[] = {
		{"", 1, ""},
		{"abc", 4, "abc"},
		{"abc", 3, "ab"},
		{"a\\b", 8, "a\\b"},
		{"\x1b[2J\x7f\n", 32, "\\x1b[2J\\x7f\\x0a"},
		{"\xc2\x9b\xc2\xa0", 32, "\\xc2\\x9b\xc2\xa0"},
		{"\x9b\xc3", 32, "\\x9b\\xc3"},
		{"\xf0\x9f\x93\x8c", 5, "\xf0\x9f\x93\x8c"},
		{"a\xf0\x9f\x93\x8c", 5, "a"},
		{"\n", 5, "\\x0a"},
		{"a\n", 5, "a"},
	};

	for (size_t i = 0; i < ELEMENTS(cases); i++) {
		_cleanup_(freep) char *escaped = malloc(cases[i].size);

		assert_non_null(escaped);
		utf8_escape(escaped, cases[i].size, cases[i].s);
		assert_string_equal(escaped, cases[i].escaped);
	}
}

static uint64_t random_state;

static uint64_t random_number(void)
{
	random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
	return random_state >> 17;
}

static int64_t random_int(void)
{
	static const int64_t edges[] = {0, 1, -1, INT64_MAX, INT64_MIN + 1, 1LL << 53};

	return random_number() % 2 ? edges[random_number() % ELEMENTS(edges)]
				   : (int64_t)random_number();
}

static const char *random_string(void)
{
	static const char *const strings[] = {"", "a", "/path/to \"file\"\\\n",
		"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "\x01\x7f"};

	return strings[random_number() % ELEMENTS(strings)];
}

static void fill(const struct schema *schema, char *p)
{
	for (size_t i = 0; i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];
		bool null = field->nullable && random_number() % 2;
		char *v = p + field->offset;
		struct ints *array = (struct ints *)v;
		size_t n = random_number() % 4;

		switch (field->kind) {
		case FIELD_BOOL:
			*(bool *)v = random_number() % 2;
			break;
		case FIELD_INT:
			*(int64_t *)v = null ? INT_NULL : random_int();
			break;
		case FIELD_STRING:
			*(const char **)v = null ? NULL : random_string();
			break;
		case FIELD_ENUM:
			*(int *)v = null ? ENUM_NULL
					 : (int)(random_number() % field->enumeration->n_members);
			break;
		case FIELD_OBJECT:
			if (field->nullable && !null)
				fill(field->schema, *(char **)v = calloc(1, field->schema->size));
			else if (!field->nullable)
				fill(field->schema, v);
			break;
		case FIELD_INTS:
			array->items = n ? calloc(n, sizeof(int64_t)) : NULL;
			array->n_items = n;
			for (size_t j = 0; j < n; j++)
				array->items[j] = random_int();
			break;
		case FIELD_STRINGS:
			array->items = n ? calloc(n, sizeof(char *)) : NULL;
			array->n_items = n;
			for (size_t j = 0; j < n; j++)
				((const char **)array->items)[j] = random_string();
			break;
		case FIELD_OBJECTS:
			array->items = n ? calloc(n, field->schema->size) : NULL;
			array->n_items = n;
			for (size_t j = 0; j < n; j++)
				fill(field->schema, (char *)array->items + j * field->schema->size);
			break;
		}
	}
}

static bool same_string(const char *a, const char *b)
{
	return a == b || (a && b && strcmp(a, b) == 0);
}

static bool same(const struct schema *schema, const char *a, const char *b)
{
	bool equal = true;

	for (size_t i = 0; i < schema->n_fields && equal; i++) {
		const struct field *field = &schema->fields[i];
		const char *x = a + field->offset, *y = b + field->offset;
		const struct ints *m = (const struct ints *)x, *n = (const struct ints *)y;

		switch (field->kind) {
		case FIELD_BOOL:
			equal = *(const bool *)x == *(const bool *)y;
			break;
		case FIELD_INT:
			equal = *(const int64_t *)x == *(const int64_t *)y;
			break;
		case FIELD_STRING:
			equal = same_string(*(const char *const *)x, *(const char *const *)y);
			break;
		case FIELD_ENUM:
			equal = *(const int *)x == *(const int *)y;
			break;
		case FIELD_OBJECT:
			if (field->nullable) {
				x = *(const char *const *)x;
				y = *(const char *const *)y;
			}
			equal = x && y ? same(field->schema, x, y) : x == y;
			break;
		case FIELD_INTS:
		case FIELD_STRINGS:
		case FIELD_OBJECTS:
			equal = m->n_items == n->n_items;
			for (size_t j = 0; equal && j < m->n_items; j++) {
				if (field->kind == FIELD_INTS)
					equal = m->items[j] == n->items[j];
				else if (field->kind == FIELD_STRINGS)
					equal = same_string(((const char *const *)m->items)[j],
						((const char *const *)n->items)[j]);
				else
					equal = same(field->schema,
						(const char *)m->items + j * field->schema->size,
						(const char *)n->items + j * field->schema->size);
			}
			break;
		}
	}
	return equal;
}

static void round_trip(const struct schema *schema)
{
	for (uint64_t seed = 0; seed < 100; seed++) {
		_cleanup_(json_object_putp) json_object *o = NULL, *parsed = NULL;
		_cleanup_(freep) char *a = calloc(1, schema->size + 1),
				      *b = calloc(1, schema->size + 1);

		random_state = seed;
		fill(schema, a);
		assert_int_equal(schema_write(schema, a, &o), 0);
		parsed = parse(json_object_to_json_string(o));
		assert_int_equal(schema_read(schema, parsed, 0, b, NULL), 0);
		if (!same(schema, a, b))
			fail_msg("%s: %s", schema->name, json_object_to_json_string(o));
		schema_clear(schema, a);
		schema_clear(schema, b);
	}
}

static void every_message_makes_the_round_trip(void **state)
{
	static const struct interface *const interfaces[] = {
		&interface_pinbroker, &interface_service};
	size_t n = 0;

	round_trip(&schema_every);
	for (size_t i = 0; i < ELEMENTS(interfaces); i++) {
		const struct interface *interface = interfaces[i];

		for (size_t j = 0; j < interface->n_types; j++, n++)
			round_trip(interface->types[j]);
		for (size_t j = 0; j < interface->n_errors; j++, n++)
			round_trip(interface->errors[j]);
		for (size_t j = 0; j < interface->n_methods; j++, n += 2) {
			round_trip(interface->methods[j].in);
			round_trip(interface->methods[j].out);
		}
	}
	assert_int_equal(n, 9 + 9 + 2 * METHOD_COUNT + 6 + 2 * SERVICE_METHOD_COUNT);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_kind_is_read),
		cmocka_unit_test(what_does_not_fit_is_refused),
		cmocka_unit_test(null_and_missing_are_the_same),
		cmocka_unit_test(null_has_its_values),
		cmocka_unit_test(unknown_fields_are_refused_unless_ignored),
		cmocka_unit_test(only_an_object_is_read),
		cmocka_unit_test(text_is_made_fit_to_write),
		cmocka_unit_test(words_are_found_by_number_and_name),
		cmocka_unit_test(utf8_is_strict),
		cmocka_unit_test(utf8_is_escaped),
		cmocka_unit_test(every_message_makes_the_round_trip),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
