/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "protocol/interface.h"
#include "protocol/macro.h"
#include "protocol/service.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/*
 * Reads an interface's text and holds it against the C tables. A field of a struct and a member of
 * an enumeration are both an `element`; the latter have no type.
 */

#define NAME_SIZE        64
#define ELEMENTS_MAX     24
#define DECLARATIONS_MAX 64

enum keyword { KEYWORD_TYPE, KEYWORD_METHOD, KEYWORD_ERROR };

struct element {
	char name[NAME_SIZE];
	char type[NAME_SIZE]; /* without the question mark */
	bool nullable;
	size_t name_at, type_at; /* in the text; of the type with its question mark */
};

struct elements {
	struct element items[ELEMENTS_MAX];
	size_t n_items;
	bool enumeration;
};

struct declaration {
	enum keyword keyword;
	char name[NAME_SIZE];
	size_t name_at;
	struct elements in, out;
};

struct idl {
	char name[NAME_SIZE];
	struct declaration items[DECLARATIONS_MAX];
	size_t n_items;
};

struct parser {
	const char *text;
	size_t at;
	bool failed;
};

static void skip_blanks(struct parser *p)
{
	for (;; p->at++) {
		if (p->text[p->at] == '#')
			p->at += strcspn(p->text + p->at, "\n");
		if (!p->text[p->at] || !isspace(p->text[p->at]))
			return;
	}
}

static bool accept(struct parser *p, const char *token)
{
	size_t n = strlen(token);

	skip_blanks(p);
	if (strncmp(p->text + p->at, token, n) != 0)
		return false;
	if (isalpha(token[0]) && isalnum(p->text[p->at + n]))
		return false;
	p->at += n;
	return true;
}

static void expect(struct parser *p, const char *token)
{
	if (!accept(p, token))
		p->failed = true;
}

/* Returns where it stands. */
static size_t parse_name(struct parser *p, const char *more, char *ret)
{
	size_t at, n = 0;

	skip_blanks(p);
	at = p->at;
	while (isalnum(p->text[at + n]) || (p->text[at + n] && strchr(more, p->text[at + n])))
		n++;
	if (n == 0 || n >= NAME_SIZE || !isalpha(p->text[at])) {
		p->failed = true;
		return at;
	}
	memcpy(ret, p->text + at, n);
	ret[n] = 0;
	p->at += n;
	return at;
}

static void parse_type(struct parser *p, struct element *e)
{
	char name[NAME_SIZE] = "";
	const char *array = "";

	skip_blanks(p);
	e->type_at = p->at;
	e->nullable = accept(p, "?");
	if (accept(p, "[]"))
		array = "[]";
	parse_name(p, "", name);
	if ((size_t)snprintf(e->type, sizeof(e->type), "%s%s", array, name) >= sizeof(e->type))
		p->failed = true;
}

static void parse_elements(struct parser *p, struct elements *ret)
{
	expect(p, "(");
	if (accept(p, ")"))
		return;
	do {
		struct element *e = &ret->items[ret->n_items];

		if (ret->n_items == ELEMENTS_MAX) {
			p->failed = true;
			return;
		}
		e->name_at = parse_name(p, "_", e->name);
		if (ret->n_items++ == 0) {
			skip_blanks(p);
			ret->enumeration = p->text[p->at] != ':';
		}
		if (!ret->enumeration) {
			expect(p, ":");
			parse_type(p, e);
		}
	} while (!p->failed && accept(p, ","));
	expect(p, ")");
}

static int parse_idl(const char *text, struct idl *ret)
{
	struct parser p = {.text = text};

	memset(ret, 0, sizeof(*ret));
	expect(&p, "interface");
	parse_name(&p, ".", ret->name);
	for (skip_blanks(&p); !p.failed && p.text[p.at]; skip_blanks(&p)) {
		struct declaration *d = &ret->items[ret->n_items++];

		if (ret->n_items == DECLARATIONS_MAX)
			return -E2BIG;
		if (accept(&p, "type"))
			d->keyword = KEYWORD_TYPE;
		else if (accept(&p, "method"))
			d->keyword = KEYWORD_METHOD;
		else if (accept(&p, "error"))
			d->keyword = KEYWORD_ERROR;
		else
			return -EINVAL;
		d->name_at = parse_name(&p, "", d->name);
		if (!isupper(d->name[0]))
			return -EINVAL;
		parse_elements(&p, &d->in);
		if (d->keyword == KEYWORD_METHOD) {
			expect(&p, "->");
			parse_elements(&p, &d->out);
		}
	}
	return p.failed ? -EINVAL : 0;
}

/* Puts the tables into the same form. */

static void elements_from_schema(const struct schema *schema, struct elements *ret)
{
	for (size_t i = 0; i < schema->n_fields; i++) {
		const struct field *field = &schema->fields[i];
		struct element *e = &ret->items[ret->n_items++];

		assert_true(ret->n_items <= ELEMENTS_MAX);
		snprintf(e->name, sizeof(e->name), "%s", field->name);
		e->nullable = field->nullable;
		switch (field->kind) {
		case FIELD_BOOL:
			strcpy(e->type, "bool");
			break;
		case FIELD_INT:
			strcpy(e->type, "int");
			break;
		case FIELD_STRING:
			strcpy(e->type, "string");
			break;
		case FIELD_ENUM:
			snprintf(e->type, sizeof(e->type), "%s", field->enumeration->name);
			break;
		case FIELD_OBJECT:
			snprintf(e->type, sizeof(e->type), "%s", field->schema->name);
			break;
		case FIELD_INTS:
			strcpy(e->type, "[]int");
			break;
		case FIELD_STRINGS:
			strcpy(e->type, "[]string");
			break;
		case FIELD_OBJECTS:
			snprintf(e->type, sizeof(e->type), "[]%s", field->schema->name);
			break;
		}
	}
}

static struct declaration *declare(struct idl *idl, enum keyword keyword, const char *name)
{
	struct declaration *d = &idl->items[idl->n_items++];

	assert_true(idl->n_items <= DECLARATIONS_MAX);
	d->keyword = keyword;
	snprintf(d->name, sizeof(d->name), "%s", name);
	return d;
}

static void idl_from_tables(const struct interface *interface, struct idl *ret)
{
	struct declaration *d;

	memset(ret, 0, sizeof(*ret));
	snprintf(ret->name, sizeof(ret->name), "%s", interface->name);
	for (size_t i = 0; i < interface->n_enumerations; i++) {
		const struct enumeration *enumeration = interface->enumerations[i];

		d = declare(ret, KEYWORD_TYPE, enumeration->name);
		d->in.enumeration = true;
		for (size_t j = 0; j < enumeration->n_members; j++)
			strcpy(d->in.items[d->in.n_items++].name, enumeration->members[j]);
	}
	for (size_t i = 0; i < interface->n_types; i++)
		elements_from_schema(interface->types[i],
			&declare(ret, KEYWORD_TYPE, interface->types[i]->name)->in);
	for (size_t i = 0; i < interface->n_methods; i++) {
		d = declare(ret, KEYWORD_METHOD, interface->methods[i].name);
		elements_from_schema(interface->methods[i].in, &d->in);
		elements_from_schema(interface->methods[i].out, &d->out);
	}
	for (size_t i = 0; i < interface->n_errors; i++)
		elements_from_schema(interface->errors[i],
			&declare(ret, KEYWORD_ERROR, interface->errors[i]->name)->in);
}

/* True if each element of a is in b; of an enumeration, at the same place. */
static bool elements_within(const struct elements *a, const struct elements *b)
{
	if (a->enumeration != b->enumeration || a->n_items != b->n_items)
		return false;
	for (size_t i = 0; i < a->n_items; i++) {
		const struct element *x = &a->items[i];
		bool found = false;

		for (size_t j = a->enumeration ? i : 0; j < (a->enumeration ? i + 1 : b->n_items);
			j++)
			found |= strcmp(x->name, b->items[j].name) == 0 &&
				 strcmp(x->type, b->items[j].type) == 0 &&
				 x->nullable == b->items[j].nullable;
		if (!found)
			return false;
	}
	return true;
}

/* Returns a declaration of a that b does not have like that, NULL if there is none. */
static const char *idl_difference(const struct idl *a, const struct idl *b)
{
	if (strcmp(a->name, b->name) != 0 || a->n_items != b->n_items)
		return a->name;
	for (size_t i = 0; i < a->n_items; i++) {
		const struct declaration *x = &a->items[i], *y = NULL;

		for (size_t j = 0; j < b->n_items; j++)
			if (strcmp(x->name, b->items[j].name) == 0)
				y = &b->items[j];
		if (!y || x->keyword != y->keyword || !elements_within(&x->in, &y->in) ||
			!elements_within(&x->out, &y->out))
			return x->name;
	}
	return NULL;
}

static const char *compare(const char *text, const struct interface *interface)
{
	struct idl read, tables;

	if (parse_idl(text, &read) < 0)
		return "syntax";
	idl_from_tables(interface, &tables);
	return idl_difference(&read, &tables) ?: idl_difference(&tables, &read);
}

static void text_and_tables_are_the_same(void **state)
{
	const char *difference = compare(interface_pinbroker.description, &interface_pinbroker);

	if (difference)
		fail_msg("%s: %s", interface_pinbroker.name, difference);
	difference = compare(interface_service.description, &interface_service);
	if (difference)
		fail_msg("%s: %s", interface_service.name, difference);
}

/* Replaces n bytes of the text and expects it still to be read, and the difference to be seen. */
static size_t mutate(const struct interface *interface, size_t at, size_t n, const char *with)
{
	_cleanup_(freep) char *text = NULL;
	struct idl idl;

	assert_true(asprintf(&text, "%.*s%s%s", (int)at, interface->description, with,
			    interface->description + at + n) > 0);
	assert_int_equal(parse_idl(text, &idl), 0);
	if (!compare(text, interface))
		fail_msg("not seen: %s for %.*s", with, (int)n, interface->description + at);
	return 1;
}

static size_t mutate_element(const struct interface *interface, const struct element *e)
{
	size_t length = strlen(e->type) + e->nullable, n = 0;
	char with[2 * NAME_SIZE];

	n += mutate(interface, e->name_at, strlen(e->name), "another");
	n += mutate(interface, e->name_at, 1, e->name[0] == 'x' ? "y" : "x");
	if (!e->type[0])
		return n;

	snprintf(with, sizeof(with), "%s%s", e->nullable ? "" : "?", e->type);
	n += mutate(interface, e->type_at, length, with);
	snprintf(with, sizeof(with), "%s%s", e->nullable ? "?" : "",
		strcmp(e->type, "int") == 0 ? "string" : "int");
	n += mutate(interface, e->type_at, length, with);
	snprintf(with, sizeof(with), "%s%s%s", e->nullable ? "?" : "",
		e->type[0] == '[' ? "" : "[]", e->type[0] == '[' ? e->type + 2 : e->type);
	n += mutate(interface, e->type_at, length, with);
	snprintf(with, sizeof(with), "%s%s, more: int", e->nullable ? "?" : "", e->type);
	n += mutate(interface, e->type_at, length, with);
	return n;
}

static size_t mutate_elements(const struct interface *interface, const struct elements *elements)
{
	size_t n = 0;

	for (size_t i = 0; i < elements->n_items; i++) {
		const struct element *e = &elements->items[i], *next = e + 1;
		size_t end = elements->enumeration ? e->name_at + strlen(e->name)
						   : e->type_at + e->nullable + strlen(e->type);
		char with[2 * NAME_SIZE + 8];

		n += mutate_element(interface, e);
		if (i + 1 < elements->n_items) {
			n += mutate(interface, e->name_at, next->name_at - e->name_at, "");
		} else if (i > 0) {
			size_t start = e->name_at;

			while (interface->description[start] != ',')
				start--;
			n += mutate(interface, start, end - start, "");
		}
		if (elements->enumeration && i + 1 < elements->n_items) {
			snprintf(with, sizeof(with), "%s, %s", next->name, e->name);
			n += mutate(interface, e->name_at,
				next->name_at + strlen(next->name) - e->name_at, with);
		}
	}
	return n;
}

static size_t mutate_interface(const struct interface *interface, size_t *ret_fields)
{
	struct idl idl;
	size_t n = 0;

	assert_int_equal(parse_idl(interface->description, &idl), 0);
	for (size_t i = 0; i < idl.n_items; i++) {
		const struct declaration *d = &idl.items[i];

		*ret_fields += d->in.n_items + d->out.n_items;
		n += mutate(interface, d->name_at, strlen(d->name), "Another");
		n += mutate_elements(interface, &d->in);
		n += mutate_elements(interface, &d->out);
	}
	return n;
}

static void every_change_of_the_text_is_seen(void **state)
{
	size_t n_fields = 0, n;

	n = mutate_interface(&interface_pinbroker, &n_fields);
	assert_true(n_fields > 150);
	assert_true(n >= 3 * n_fields);
	assert_true(n >= 300);
	n += mutate_interface(&interface_service, &n_fields);
	print_message("%zu changes of %zu fields and members\n", n, n_fields);
}

static void constants_index_the_members(void **state)
{
	static const struct {
		const struct enumeration *enumeration;
		int value;
		const char *name;
	} constants[] = {
		{&enumeration_access, ACCESS_READ, "read"},
		{&enumeration_access, ACCESS_WRITE, "write"},
		{&enumeration_proof, PROOF_PROVABLE, "provable"},
		{&enumeration_proof, PROOF_CLAIMED, "claimed"},
		{&enumeration_proof, PROOF_PRESUMED, "presumed"},
		{&enumeration_cause, CAUSE_MODIFY, "modify"},
		{&enumeration_cause, CAUSE_TRUNCATE, "truncate"},
		{&enumeration_cause, CAUSE_OPEN, "open"},
		{&enumeration_cause, CAUSE_SHRINK, "shrink"},
		{&enumeration_cause, CAUSE_ADMIN, "admin"},
		{&enumeration_cause, CAUSE_DEVICE, "device"},
		{&enumeration_cause, CAUSE_SHUTDOWN, "shutdown"},
		{&enumeration_cause, CAUSE_LOST, "lost"},
		{&enumeration_lease_state, LEASE_NONE, "none"},
		{&enumeration_lease_state, LEASE_READ, "read"},
		{&enumeration_lease_state, LEASE_WRITE, "write"},
		{&enumeration_lease_state, LEASE_SETTLING, "settling"},
		{&enumeration_lease_state, LEASE_SETTLED, "settled"},
		{&enumeration_lease_state, LEASE_BREAKING, "breaking"},
		{&enumeration_backing_kind, BACKING_PAGE_CACHE, "pageCache"},
		{&enumeration_backing_kind, BACKING_TMPFS, "tmpfs"},
		{&enumeration_backing_kind, BACKING_HUGETLBFS, "hugetlbfs"},
		{&enumeration_backing_kind, BACKING_FSDAX, "fsdax"},
		{&enumeration_backing_kind, BACKING_DEVICE_DAX, "deviceDax"},
		{&enumeration_pinnable, PINNABLE_NO, "no"},
		{&enumeration_pinnable, PINNABLE_YES, "yes"},
		{&enumeration_pinnable, PINNABLE_UNKNOWN, "unknown"},
		{&enumeration_pin_state, PIN_RESERVED, "reserved"},
		{&enumeration_pin_state, PIN_BOUND, "bound"},
		{&enumeration_pin_state, PIN_LEAVING, "leaving"},
		{&enumeration_revocation_state, REVOCATION_NOTIFIED, "notified"},
		{&enumeration_revocation_state, REVOCATION_DETACHING, "detaching"},
		{&enumeration_revocation_state, REVOCATION_SIGNALLED, "signalled"},
		{&enumeration_revocation_state, REVOCATION_KILLED, "killed"},
		{&enumeration_revocation_state, REVOCATION_RELEASED, "released"},
		{&enumeration_revocation_state, REVOCATION_LOST, "lost"},
	};
	size_t n = 0;

	for (size_t i = 0; i < interface_pinbroker.n_enumerations; i++)
		n += interface_pinbroker.enumerations[i]->n_members;
	assert_int_equal(n, ELEMENTS(constants));

	for (size_t i = 0; i < ELEMENTS(constants); i++) {
		assert_string_equal(enumeration_name(constants[i].enumeration, constants[i].value),
			constants[i].name);
		assert_int_equal(enumeration_value(constants[i].enumeration, constants[i].name),
			constants[i].value);
	}
	assert_null(enumeration_name(&enumeration_access, -1));
	assert_null(enumeration_name(&enumeration_access, 2));
	assert_int_equal(enumeration_value(&enumeration_access, ""), -EINVAL);
}

static void methods_are_found(void **state)
{
	assert_int_equal(interface_pinbroker.n_methods, METHOD_COUNT);
	assert_int_equal(interface_service.n_methods, SERVICE_METHOD_COUNT);
	for (size_t i = 0; i < METHOD_COUNT; i++) {
		const struct method *m = &interface_pinbroker.methods[i];

		assert_ptr_equal(interface_find_method(&interface_pinbroker, m->name), m);
		assert_int_equal(
			m->more, strncmp(m->name, "List", 4) == 0 || strcmp(m->name, "Watch") == 0);
	}
	assert_ptr_equal(interface_find_method(&interface_pinbroker, "Pin"),
		&interface_pinbroker.methods[METHOD_Pin]);
	assert_ptr_equal(interface_find_method(&interface_service, "GetInfo"),
		&interface_service.methods[METHOD_GetInfo]);
	assert_null(interface_find_method(&interface_pinbroker, "pin"));
	assert_null(interface_find_method(&interface_pinbroker, ""));
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(text_and_tables_are_the_same),
		cmocka_unit_test(every_change_of_the_text_is_seen),
		cmocka_unit_test(constants_index_the_members),
		cmocka_unit_test(methods_are_found),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
