/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdint.h>

/*
 * Two kinds of failure, never mixed: a negative errno is the broker's own trouble; REFUSED is an
 * answer that a client must understand, with what a person needs to act on it. Each refusal is named
 * once, here, and becomes a Varlink error in peer.c and a D-Bus error in bus/manager.c.
 */

#define REFUSED 1

enum refusal_kind {
	REFUSAL_NOT_LEASABLE,
	REFUSAL_BUSY,
	REFUSAL_NOT_ALLOWED,
	REFUSAL_NO_SUCH_OBJECT,
	REFUSAL_LIMIT_EXCEEDED,
	REFUSAL_REVOKED,
	REFUSAL_RANGE_CONFLICT,
	REFUSAL_BEYOND_END_OF_FILE,
	REFUSAL_NOT_SUPPORTED,
	REFUSAL_INVALID_PARAMETER,
};

struct refusal {
	enum refusal_kind kind;
	const char *cause;     /* a short word, a literal; INVALID_PARAMETER: the parameter's name;
				  NO_SUCH_OBJECT: the type; LIMIT_EXCEEDED: the limit */
	char message[200];     /* a sentence */
	char file_system[32];  /* NOT_LEASABLE; empty: not known */
	int64_t until_usec;    /* BUSY; INT_NULL: not known */
	int64_t id;            /* NO_SUCH_OBJECT; REVOKED, RANGE_CONFLICT: the revocation */
	int64_t pin;           /* REVOKED; 0: a file or context that was withdrawn */
	int64_t offset, length, size;
	int64_t maximum, used; /* LIMIT_EXCEEDED */
};

struct user;

/* Each fills *ret and returns REFUSED. */
int refuse(struct refusal *ret, enum refusal_kind kind, const char *cause, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
int refuse_no_such(struct refusal *ret, const char *type, uint64_t id);
int refuse_parameter(struct refusal *ret, const char *parameter);
int refuse_revoked(struct refusal *ret, uint64_t revocation, uint64_t pin);
int refuse_limit(struct refusal *ret, const struct user *user, int limit);

/* The error's name without the interface ("Busy"), and a sentence for people. */
const char *refusal_name(const struct refusal *refusal);
const char *refusal_message(const struct refusal *refusal, char buffer[static 300]);
