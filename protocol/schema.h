/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <json-c/json.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Messages as C structs, and the tables that read them from JSON and write them as JSON. A message
 * is declared once, as a list of fields (see interface.h); the struct and the table both come from
 * that list.
 */

/* A nullable integer that is null. No field of the interface can hold it as a value. */
#define INT_NULL INT64_MIN
/* A nullable enumeration that is null. */
#define ENUM_NULL (-1)

enum field_kind {
	FIELD_BOOL,    /* bool; nullable: null is false */
	FIELD_INT,     /* int64_t */
	FIELD_STRING,  /* const char *, owned by the JSON object it was read from; NULL: null */
	FIELD_ENUM,    /* int, an index into the enumeration's members */
	FIELD_OBJECT,  /* the struct itself; nullable: a pointer to it */
	FIELD_INTS,    /* struct ints */
	FIELD_STRINGS, /* struct strings */
	FIELD_OBJECTS, /* struct { T *items; size_t n_items; } */
};

struct ints {
	int64_t *items;
	size_t n_items;
};

struct strings {
	const char **items;
	size_t n_items;
};

struct enumeration {
	const char *name;
	const char *const *members;
	size_t n_members;
};

struct schema;

struct field {
	const char *name;
	enum field_kind kind;
	bool nullable;
	size_t offset;
	const struct enumeration *enumeration; /* FIELD_ENUM */
	const struct schema *schema;           /* FIELD_OBJECT, FIELD_OBJECTS */
};

struct schema {
	const char *name; /* of a type or an error; a method's are named after it */
	const struct field *fields;
	size_t n_fields;
	size_t size; /* of the struct */
};

struct method {
	const char *name; /* without the interface */
	const struct schema *in;
	const struct schema *out;
	bool more; /* a stream: may only be called with "more" */
};

struct interface {
	const char *name;
	const char *description; /* the IDL, as GetInterfaceDescription serves it */
	const struct enumeration *const *enumerations;
	size_t n_enumerations;
	const struct schema *const *types;
	size_t n_types;
	const struct method *methods;
	size_t n_methods;
	const struct schema *const *errors;
	size_t n_errors;
};

enum schema_flags {
	SCHEMA_IGNORE_UNKNOWN = 1 << 0, /* fields that the table doesn't have are passed over */
};

/*
 * Reads `object` (NULL counts as an empty object) into the struct at `ret`, which is filled whole
 * on success and untouched on failure. Strings go on belonging to `object`; arrays are freed with
 * schema_clear(). Returns 0; -EINVAL with *ret_field naming the field at fault ("ranges[3].offset"
 * is named "ranges", an `object` that is not an object "parameters"; valid as long as the schema
 * and `object`); -ENOMEM.
 */
int schema_read(const struct schema *schema, json_object *object, unsigned flags, void *ret,
	const char **ret_field);

/* Writes the struct at `p`; null fields are left out. In strings, bytes that are not UTF-8 (the
 * kernel's paths may hold any) become question marks. Returns 0 or -ENOMEM. */
int schema_write(const struct schema *schema, const void *p, json_object **ret);

/* Frees what schema_read() allocated in the struct, not the struct. */
void schema_clear(const struct schema *schema, void *p);

const struct method *interface_find_method(const struct interface *interface, const char *name);
const char *enumeration_name(const struct enumeration *enumeration, int value);
/* Returns the member's index, or -EINVAL. */
int enumeration_value(const struct enumeration *enumeration, const char *name);

/*
 * What follows turns a list of fields
 *
 *     #define RANGE_FIELDS(F)                   \
 *             F(INT, REQUIRED, offset, _)       \
 *             F(INT, REQUIRED, length, _)
 *
 * into `struct range` (SCHEMA_STRUCT) and `schema_range` (SCHEMA_TABLE). The fourth argument is the
 * tag of the struct or enumeration that an OBJECT, OBJECTS or ENUM field refers to.
 */
#define SCHEMA_NO_NULL_REQUIRED(name)            name /* kinds without a null in C */
#define SCHEMA_MEMBER_BOOL(null, name, ref)      bool name;
#define SCHEMA_MEMBER_INT(null, name, ref)       int64_t name;
#define SCHEMA_MEMBER_STRING(null, name, ref)    const char *name;
#define SCHEMA_MEMBER_ENUM(null, name, ref)      int name;
#define SCHEMA_MEMBER_INTS(null, name, ref)      struct ints SCHEMA_NO_NULL_##null(name);
#define SCHEMA_MEMBER_STRINGS(null, name, ref)   struct strings SCHEMA_NO_NULL_##null(name);
#define SCHEMA_MEMBER_OBJECT(null, name, ref)    SCHEMA_MEMBER_OBJECT_##null(name, ref)
#define SCHEMA_MEMBER_OBJECT_REQUIRED(name, ref) struct ref name;
#define SCHEMA_MEMBER_OBJECT_NULLABLE(name, ref) struct ref *name;
#define SCHEMA_MEMBER_OBJECTS(null, name, ref) \
	struct {                               \
		struct ref *items;             \
		size_t n_items;                \
	} SCHEMA_NO_NULL_##null(name);
#define SCHEMA_MEMBER(kind, null, name, ref) SCHEMA_MEMBER_##kind(null, name, ref)

#define NO_FIELDS(F)

/* GNU C: a struct without members is allowed, and has size 0. */
#define SCHEMA_STRUCT(tag, FIELDS)    \
	struct tag {                  \
		FIELDS(SCHEMA_MEMBER) \
	};                            \
	extern const struct schema schema_##tag;

#define SCHEMA_NULL_REQUIRED false
#define SCHEMA_NULL_NULLABLE true
#define SCHEMA_REF_BOOL(ref)
#define SCHEMA_REF_INT(ref)
#define SCHEMA_REF_STRING(ref)
#define SCHEMA_REF_INTS(ref)
#define SCHEMA_REF_STRINGS(ref)
#define SCHEMA_REF_ENUM(ref)    .enumeration = &enumeration_##ref,
#define SCHEMA_REF_OBJECT(ref)  .schema = &schema_##ref,
#define SCHEMA_REF_OBJECTS(ref) .schema = &schema_##ref,

/* A row starts with what the list of fields does not know, the struct; SCHEMA_ROW_FIELD ends it. */
/* clang-format off */
#define SCHEMA_ROW(tag) { .offset = __builtin_offsetof(struct tag, SCHEMA_ROW_FIELD
#define SCHEMA_ROW_FIELD(kind_, null, name_, ref) name_), \
	.name = #name_,                                   \
	.kind = FIELD_##kind_,                            \
	.nullable = SCHEMA_NULL_##null,                   \
	SCHEMA_REF_##kind_(ref)                           \
	},
/* clang-format on */

#define SCHEMA_TABLE(tag, name_, FIELDS)                                      \
	static const struct field fields_##tag[] = {FIELDS(SCHEMA_ROW(tag))}; \
	const struct schema schema_##tag = {                                  \
		.name = #name_,                                               \
		.fields = fields_##tag,                                       \
		.n_fields = sizeof(fields_##tag) / sizeof(struct field),      \
		.size = sizeof(struct tag),                                   \
	};
