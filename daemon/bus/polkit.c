/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/bus/polkit.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/bus/credentials.h"
#include "protocol/macro.h"

#define POLKIT "org.freedesktop.PolicyKit1"

#define ALLOW_USER_INTERACTION 1U

/* How long polkit may take (0: as sd-bus has it, 25 s), and who is asked for a password. */
#define ANSWER_USEC   0
#define PASSWORD_USEC (300 * USEC_PER_SEC)

/* What is kept of strangers' calls, in bytes. */
#define CALL_SIZE_MAX 65536U

/* What polkit's rules see of a call: its arguments, by their names in org.pinbroker1.xml. */
static const struct revoke {
	const char *member, *signature, *names[3];
} revokes[] = {
	{"RevokePins", "atst", {"pins"}},
	{"RevokeFile", "tst", {"file"}},
	{"RevokeInode", "ttst", {"device", "inode"}},
	{"RevokePath", "sst", {"path"}},
	{"RevokeClient", "tst", {"client"}},
	{"RevokeMount", "sst", {"path"}},
	{"RevokeFileSystem", "tatst", {"fileSystem", "otherMounts"}},
	{"RevokeDevice", "sst", {"device"}},
};

/* What kind of call it is, as an action of polkit's. */
static const char *action_of(sd_bus_message *call)
{
	const char *member = sd_bus_message_get_member(call);

	/* whatever its interface: one that there is not does nothing */
	return member && strncmp(member, "Revoke", 6) == 0 ? "org.pinbroker1.revoke"
							   : "org.pinbroker1.inspect";
}

/* Adds up how long what is left of a message, or of a container in it, is, as far as CALL_SIZE_MAX.
 */
static int measure(sd_bus_message *m, size_t *size)
{
	const char *contents;
	char type;
	int r;

	while ((r = sd_bus_message_peek_type(m, &type, &contents)) > 0) {
		union {
			uint64_t number;
			const char *text;
		} value;

		if (strchr("arev", type)) {
			r = sd_bus_message_enter_container(m, type, contents);
			if (r >= 0)
				r = measure(m, size);
			if (r >= 0)
				r = sd_bus_message_exit_container(m);
		} else {
			r = sd_bus_message_read_basic(m, type, &value);
			if (r >= 0 && strchr("sog", type))
				*size += strlen(value.text);
		}
		if (r < 0)
			return r;
		*size += sizeof(value);
		if (*size > CALL_SIZE_MAX)
			return -E2BIG;
	}
	return r;
}

static int check_size(sd_bus_message *call)
{
	size_t size = strlen(sd_bus_message_get_path(call));
	int r = measure(call, &size);

	(void)sd_bus_message_rewind(call, true);
	return r;
}

static int append_number_detail(sd_bus_message *m, const char *name, const uint64_t *numbers,
				size_t n)
{
	_cleanup_(freep) char *text = NULL;
	size_t size = 0;
	FILE *f;

	f = open_memstream(&text, &size);
	if (!f)
		return -ENOMEM;
	for (size_t i = 0; i < n; i++)
		fprintf(f, "%s%" PRIu64, i > 0 ? " " : "", numbers[i]);
	if (fclose(f) != 0)
		return -ENOMEM;
	return sd_bus_message_append(m, "{ss}", name, text);
}

static int append_subject(sd_bus_message *m, sd_bus_message *call, const char *name)
{
	const uint64_t *numbers;
	const char *text;
	uint64_t number;
	size_t size;
	char type;
	int r;

	r = sd_bus_message_peek_type(call, &type, NULL);
	if (r < 0)
		return r;
	if (type == 's') {
		r = sd_bus_message_read(call, "s", &text);
		return r < 0 ? r : sd_bus_message_append(m, "{ss}", name, text);
	}
	if (type == 't') {
		r = sd_bus_message_read(call, "t", &number);
		return r < 0 ? r : append_number_detail(m, name, &number, 1);
	}
	r = sd_bus_message_read_array(call, 't', (const void **)&numbers, &size);
	return r < 0 ? r : append_number_detail(m, name, numbers, size / sizeof(*numbers));
}

static int append_details(sd_bus_message *m, sd_bus_message *call)
{
	const char *member = sd_bus_message_get_member(call), *reason;
	const struct revoke *revoke = NULL;
	int r;

	for (size_t i = 0; i < ELEMENTS(revokes); i++)
		if (strcmp(revokes[i].member, member) == 0 &&
		    sd_bus_message_has_signature(call, revokes[i].signature))
			revoke = &revokes[i];
	r = sd_bus_message_open_container(m, 'a', "{ss}");
	if (r >= 0 && revoke) {
		r = sd_bus_message_append(m, "{ss}", "method", member);
		for (size_t i = 0; r >= 0 && revoke->names[i]; i++)
			r = append_subject(m, call, revoke->names[i]);
		if (r >= 0)
			r = sd_bus_message_read(call, "s", &reason);
		if (r >= 0)
			r = sd_bus_message_append(m, "{ss}", "reason", reason);
		(void)sd_bus_message_rewind(call, true);
	}
	return r < 0 ? r : sd_bus_message_close_container(m);
}

int bus_polkit_ask(sd_bus_message *call, sd_bus_message_handler_t done, void *userdata,
		   sd_bus_slot **ret_slot)
{
	bool interactive = sd_bus_message_get_allow_interactive_authorization(call) > 0;
	sd_bus *bus = sd_bus_message_get_bus(call);
	sd_bus_message *m = NULL;
	int r;

	r = check_size(call);
	if (r < 0)
		return r;
	r = sd_bus_message_new_method_call(bus, &m, POLKIT, "/org/freedesktop/PolicyKit1/Authority",
					   POLKIT ".Authority", "CheckAuthorization");
	if (r >= 0)
		r = sd_bus_message_append(m, "(sa{sv})s", "system-bus-name", 1, "name", "s",
					  sd_bus_message_get_sender(call), action_of(call));
	if (r >= 0)
		r = append_details(m, call);
	if (r >= 0)
		r = sd_bus_message_append(m, "us", interactive ? ALLOW_USER_INTERACTION : 0, "");
	if (r >= 0)
		r = sd_bus_call_async(bus, ret_slot, m, done, userdata,
				      interactive ? PASSWORD_USEC : ANSWER_USEC);
	sd_bus_message_unref(m);
	return r;
}

#define DENIED "Only root and the group " BUS_GROUP " may do this"

int bus_polkit_read(sd_bus_message *answer, sd_bus_error *ret_error)
{
	const sd_bus_error *e = sd_bus_message_get_error(answer);
	int r, granted, challenge;

	if (e && (sd_bus_error_has_name(e, SD_BUS_ERROR_SERVICE_UNKNOWN) ||
		  sd_bus_error_has_name(e, SD_BUS_ERROR_NAME_HAS_NO_OWNER)))
		return sd_bus_error_set(ret_error, SD_BUS_ERROR_ACCESS_DENIED,
					DENIED
					" while polkit is not running: start it, or become a "
					"member of the group.");
	if (e)
		return sd_bus_error_setf(ret_error, SD_BUS_ERROR_ACCESS_DENIED,
					 DENIED ", as polkit could not be asked: %s",
					 e->message ? e->message : e->name);
	r = sd_bus_message_enter_container(answer, 'r', "bba{ss}");
	if (r >= 0)
		r = sd_bus_message_read(answer, "bb", &granted, &challenge);
	if (r < 0)
		return sd_bus_error_set(ret_error, SD_BUS_ERROR_ACCESS_DENIED,
					DENIED ", as polkit's answer cannot be read.");
	if (granted)
		return 0;
	if (challenge)
		return sd_bus_error_set(ret_error, SD_BUS_ERROR_INTERACTIVE_AUTHORIZATION_REQUIRED,
					DENIED ", or who authenticates himself: allow interactive "
					       "authorization.");
	return sd_bus_error_set(ret_error, SD_BUS_ERROR_ACCESS_DENIED,
				DENIED ", or whom polkit allows it.");
}
