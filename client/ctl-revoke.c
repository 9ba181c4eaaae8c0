/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-mount.h"
#include "ctl-openers.h"
#include "ctl-remaining.h"
#include "ctl.h"

#include <ctype.h>
#include <fcntl.h>
#include <getopt.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "protocol/utf8.h"

enum {
	OPTION_FILE = OPTION_VERB,
	OPTION_CLIENT,
	OPTION_MOUNT,
	OPTION_DEVICE,
	OPTION_REASON,
	OPTION_TIMEOUT,
	OPTION_WAIT,
	OPTION_NO_WAIT,
};

/* How long those who have something open on a mount are waited for after the end of their pins:
 * a holder that lets go mostly closes its file, or exits, a moment later. */
#define LEAVE_USEC (2 * USEC_PER_SEC)
#define LOOK_USEC  (50 * USEC_PER_MSEC)

#define TIMEOUT_MAX 1e9 /* seconds */

struct revoke {
	struct ctl *ctl;
	const char *method;
	struct target target;
	const char *reason;
	uint64_t timeout_usec; /* 0: the broker's own */
	bool wait;

	sd_bus *bus;  /* owned */
	char *broker; /* owned; who answered the call */
	uint64_t id;  /* of the revocation */
	uint64_t n_pins, n_clients; /* that it is about; PINBROKER_UNKNOWN */
	int fd; /* owned; the file or the mount's root, which stays what it is meanwhile */
	struct mount mount;
	struct ended {
		uint64_t id;
		char outcome[32];
		char sender[64];
	} * ended; /* owned; signals, also those from before the answer */
	size_t n_ended;
	bool broker_left;
};

/* ---- The call ---- */

static int on_ended(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct revoke *rv = userdata;
	struct ended *e;
	const char *outcome;
	uint64_t id;

	if (sd_bus_message_read(m, "ts", &id, &outcome) < 0 || !sd_bus_message_get_sender(m))
		return 0;
	rv->ended = must(realloc(rv->ended, (rv->n_ended + 1) * sizeof(*rv->ended)));
	e = &rv->ended[rv->n_ended++];
	e->id = id;
	snprintf(e->outcome, sizeof(e->outcome), "%s", outcome);
	snprintf(e->sender, sizeof(e->sender), "%s", sd_bus_message_get_sender(m));
	return 0;
}

static int on_owner_changed(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *name, *old, *new;
	struct revoke *rv = userdata;

	if (sd_bus_message_read(m, "sss", &name, &old, &new) >= 0 && *old)
		rv->broker_left = true;
	return 0;
}

/* Before the call: a revocation may end before its answer has been read. */
static int revoke_listen(struct revoke *rv)
{
	int r;

	r = sd_bus_match_signal(rv->bus, NULL, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE,
		"RevocationEnded", on_ended, rv);
	if (r < 0)
		return r;
	return sd_bus_add_match(rv->bus, NULL,
		"type='signal',sender='org.freedesktop.DBus',"
		"interface='org.freedesktop.DBus',member='NameOwnerChanged',"
		"arg0='" BROKER_NAME "'",
		on_owner_changed, rv);
}

static int revoke_request(struct revoke *rv, sd_bus_message **ret)
{
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *m = NULL;
	int r;

	r = sd_bus_message_new_method_call(
		rv->bus, &m, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE, rv->method);
	if (r < 0)
		return r;
	sd_bus_message_set_allow_interactive_authorization(m, true);
	if (rv->target.mount) {
		r = sd_bus_message_append(m, "t", (uint64_t)rv->mount.file_system);
		if (r >= 0)
			r = sd_bus_message_append_array(m, 't', rv->target.others,
				rv->target.n_others * sizeof(*rv->target.others));
	} else if (rv->target.path)
		r = sd_bus_message_append(m, "tt", rv->target.device, rv->target.inode);
	else if (rv->target.device_name)
		r = sd_bus_message_append(m, "s", rv->target.device_name);
	else if (rv->target.client > 0)
		r = sd_bus_message_append(m, "t", rv->target.client);
	else
		r = sd_bus_message_append_array(
			m, 't', rv->target.pins, rv->target.n_pins * sizeof(*rv->target.pins));
	if (r < 0)
		return r;
	r = sd_bus_message_append(m, "st", rv->reason ?: "", rv->timeout_usec);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(m);
	return 0;
}

/* Something that the kernel knows by this name. */
static bool device_exists(const char *name)
{
	static const char *const places[] = {"/sys/class/*/", "/sys/bus/*/devices/"};
	bool found = false;

	for (size_t i = 0; i < ELEMENTS(places) && !strpbrk(name, "/*?[\\"); i++) {
		_cleanup_(freep) char *pattern = NULL;
		glob_t g;

		if (asprintf(&pattern, "%s%s", places[i], name) < 0)
			must(NULL);
		found |= glob(pattern, 0, NULL, &g) == 0;
		globfree(&g);
	}
	return found;
}

static int revoke_failed(const struct revoke *rv, const sd_bus_error *error, int r)
{
	char what[PATH_MAX + 64];

	if (rv->target.path || rv->target.device_name)
		snprintf(what, sizeof(what), "Cannot revoke the pins on %s",
			rv->target.path ?: rv->target.device_name);
	else if (rv->target.client > 0)
		snprintf(what, sizeof(what), "Cannot revoke the pins of client %" PRIu64,
			rv->target.client);
	else
		snprintf(what, sizeof(what), "Cannot revoke pin %" PRIu64 "%s", rv->target.pins[0],
			rv->target.n_pins > 1 ? " and the others" : "");
	return fail_bus_call(error, r, what);
}

/* The counts are shown as far as they can be had. */
static void revoke_count(struct revoke *rv)
{
	char path[64];

	snprintf(path, sizeof(path), BROKER_PATH "/revocation/%" PRIu64, rv->id);
	if (sd_bus_get_property_trivial(rv->bus, rv->broker, path, "org.pinbroker1.Revocation",
		    "Pins", NULL, 't', &rv->n_pins) < 0 ||
		sd_bus_get_property_trivial(rv->bus, rv->broker, path, "org.pinbroker1.Revocation",
			"Clients", NULL, 't', &rv->n_clients) < 0)
		rv->n_pins = rv->n_clients = PINBROKER_UNKNOWN;
}

/* 0; -1: there is nothing to revoke on what was named; or an exit code with the message said. */
static int revoke_call(struct revoke *rv)
{
	_cleanup_(sd_bus_error_free) sd_bus_error error = SD_BUS_ERROR_NULL;
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *m = NULL;
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
	int r;

	r = revoke_request(rv, &m);
	if (r < 0)
		return fail_bus(rv->ctl, r, "Cannot ask for the revocation");
	r = sd_bus_call(rv->bus, m, 0, &error, &reply);
	if (r >= 0)
		r = sd_bus_message_read(reply, "t", &rv->id);
	if (r >= 0) {
		rv->broker = must(strdup(sd_bus_message_get_sender(reply) ?: ""));
		revoke_count(rv);
		return 0;
	}
	if (rv->target.device_name && error.name && strstr(error.name, ".NoSuchObject") &&
		device_exists(rv->target.device_name))
		return -1;
	return revoke_failed(rv, &error, r);
}

/* ---- The end ---- */

/* Those who keep an umount from succeeding, once they have had a moment to leave. */
static void revoke_find_openers(const struct revoke *rv, struct openers *ret)
{
	uint64_t until = now_usec() + LEAVE_USEC;

	for (;;) {
		openers_of_mount(&rv->mount, rv->mount.point, ret);
		if (ret->n == 0 || now_usec() >= until)
			return;
		openers_clear(ret);
		usleep(LOOK_USEC);
	}
}

static const struct ended *revoke_find_ended(const struct revoke *rv)
{
	for (size_t i = 0; i < rv->n_ended; i++)
		if (rv->ended[i].id == rv->id && strcmp(rv->ended[i].sender, rv->broker) == 0)
			return &rv->ended[i];
	return NULL;
}

/* outcome: NULL if it has not been waited for. */
static void revoke_report_json(const struct revoke *rv, const char *outcome, json_object *remaining,
	const struct openers *openers)
{
	json_object *o = must(json_object_new_object());

	json_add_number(o, "revocation", rv->id);
	json_add_string(o, "outcome", outcome);
	json_add_number(o, "pins", rv->n_pins);
	json_add_number(o, "clients", rv->n_clients);
	if (outcome)
		json_add(o, "remaining", json_object_get(remaining));
	if (outcome && rv->target.mount)
		json_add(o, "openers", openers_to_json(openers));
	json_print(o, rv->ctl);
}

/* "revocation 17 released: 3 pins of 1 client" */
static void revoke_say(const struct revoke *rv, const char *what)
{
	printf("revocation %" PRIu64 " %s", rv->id, what);
	if (rv->n_pins != PINBROKER_UNKNOWN)
		printf(": %" PRIu64 " pin%s of %" PRIu64 " client%s", rv->n_pins, PLURAL(rv->n_pins),
			rv->n_clients, PLURAL(rv->n_clients));
	putchar('\n');
}

static int revoke_report_nothing(struct revoke *rv)
{
	json_object *remaining = must(json_object_new_array());

	rv->id = PINBROKER_UNKNOWN;
	if (rv->ctl->json != JSON_OFF)
		revoke_report_json(rv, "released", remaining, NULL);
	else
		printf("nothing is pinned on %s\n", rv->target.device_name);
	json_object_put(remaining);
	return EX_OK;
}

static int revoke_report(struct revoke *rv, const char *outcome)
{
	bool released = strcmp(outcome, "released") == 0;
	struct openers openers = {};
	json_object *remaining;
	int r = EX_OK;

	remaining = released ? must(json_object_new_array()) : remaining_list(rv->ctl, &rv->target);
	if (rv->target.mount)
		revoke_find_openers(rv, &openers);
	if (rv->ctl->json != JSON_OFF)
		revoke_report_json(rv, outcome, remaining, &openers);
	else
		revoke_say(rv, outcome);
	if (!released) {
		r = fail(EX_TEMPFAIL, "Revocation %" PRIu64 " ended as %s. What remains:", rv->id,
			outcome);
		if (remaining)
			remaining_say(remaining);
	}
	if (openers.n > 0) {
		r = fail(EX_TEMPFAIL,
			"%s cannot be unmounted while it is in use by:", rv->mount.point);
		openers_print(&openers, stderr);
	}
	json_object_put(remaining);
	openers_clear(&openers);
	return r;
}

static int revoke_wait(struct revoke *rv)
{
	const struct ended *e;
	int r;

	while (!(e = revoke_find_ended(rv))) {
		if (rv->broker_left)
			return fail(EX_UNAVAILABLE,
				"The broker left the bus during revocation %" PRIu64
				". See pinbrokerctl list revocations, and its journal.",
				rv->id);
		r = sd_bus_process(rv->bus, NULL);
		if (r == 0)
			r = sd_bus_wait(rv->bus, UINT64_MAX);
		if (r < 0 && r != -EINTR)
			return fail(EX_UNAVAILABLE,
				"Lost the bus during revocation %" PRIu64
				", which goes on: %s. See pinbrokerctl list revocations.",
				rv->id, strerror(-r));
	}
	return revoke_report(rv, e->outcome);
}

static int revoke_run(struct revoke *rv)
{
	int r;

	r = ctl_bus_open(rv->ctl, &rv->bus);
	if (r > 0)
		return r;
	if (rv->wait) {
		r = revoke_listen(rv);
		if (r < 0)
			return fail_bus(rv->ctl, r, "Cannot listen for the end of the revocation");
	}
	r = revoke_call(rv);
	if (r != 0)
		return r > 0 ? r : revoke_report_nothing(rv);
	if (rv->wait)
		return revoke_wait(rv);
	if (rv->ctl->json != JSON_OFF)
		revoke_report_json(rv, NULL, NULL, NULL);
	else
		revoke_say(rv, "started");
	return EX_OK;
}

/* ---- What is asked for ---- */

/* 0 for the broker means its own grace; for a person, at once. */
static bool parse_timeout(const char *s, uint64_t *ret)
{
	double seconds;
	char *end;

	if (!isdigit((unsigned char)*s) && *s != '.')
		return false;
	seconds = strtod(s, &end);
	if (end == s || *end || !isfinite(seconds) || seconds < 0 || seconds > TIMEOUT_MAX)
		return false;
	*ret = (uint64_t)(seconds * USEC_PER_SEC);
	if (*ret == 0)
		*ret = 1;
	return true;
}

static int revoke_set_method(struct revoke *rv, const char *method)
{
	if (rv->method)
		return fail_usage("Give either pins, or one of --file, --client, --mount and "
				  "--device.");
	rv->method = method;
	return -1;
}

/* As contexts and the kernel have it. */
static bool is_device_name(const char *s)
{
	return *s && *s != '.' && !strchr(s, '/') && utf8_span(s, strlen(s)) == strlen(s);
}

static int revoke_option(struct revoke *rv, int c)
{
	switch (c) {
	case OPTION_FILE:
		rv->target.path = optarg;
		return revoke_set_method(rv, "RevokeInode");
	case OPTION_MOUNT:
		rv->target.path = optarg;
		rv->target.mount = &rv->mount;
		return revoke_set_method(rv, "RevokeFileSystem");
	case OPTION_DEVICE:
		if (!is_device_name(optarg))
			return fail_usage("--device is the name of a device, such as pmem0 or mlx5_0, not "
					  "%s.",
				visible(optarg));
		rv->target.device_name = optarg;
		return revoke_set_method(rv, "RevokeDevice");
	case OPTION_CLIENT:
		if (!parse_id(optarg, &rv->target.client))
			return fail_usage("--client is the id of a client, not %s.", visible(optarg));
		return revoke_set_method(rv, "RevokeClient");
	case OPTION_REASON:
		/* What the bus does not take is no reason not to revoke. */
		utf8_sanitize(optarg);
		rv->reason = optarg;
		return -1;
	case OPTION_TIMEOUT:
		if (!parse_timeout(optarg, &rv->timeout_usec))
			return fail_usage("--timeout is a number of seconds, %.0f at most, not %s.",
				TIMEOUT_MAX, visible(optarg));
		return -1;
	case OPTION_WAIT:
	case OPTION_NO_WAIT:
		rv->wait = c == OPTION_WAIT;
		return -1;
	default:
		return ctl_common_option(rv->ctl, c);
	}
}

static int revoke_parse(struct revoke *rv, int argc, char *argv[])
{
	static const struct option options[] = {
		{"file", required_argument, NULL, OPTION_FILE},
		{"client", required_argument, NULL, OPTION_CLIENT},
		{"mount", required_argument, NULL, OPTION_MOUNT},
		{"device", required_argument, NULL, OPTION_DEVICE},
		{"reason", required_argument, NULL, OPTION_REASON},
		{"timeout", required_argument, NULL, OPTION_TIMEOUT},
		{"wait", no_argument, NULL, OPTION_WAIT},
		{"no-wait", no_argument, NULL, OPTION_NO_WAIT},
		COMMON_OPTIONS,
	};
	int c, r;

	while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
		r = revoke_option(rv, c);
		if (r >= 0)
			return r;
	}
	rv->target.pins = must(calloc((size_t)argc, sizeof(*rv->target.pins)));
	for (; optind < argc; optind++)
		if (!parse_id(argv[optind], &rv->target.pins[rv->target.n_pins++]))
			return fail_usage("A pin is given by its number, not by %s.",
				visible(argv[optind]));
	if (rv->target.n_pins > 0)
		return revoke_set_method(rv, "RevokePins");
	if (!rv->method)
		return fail_usage("There is nothing to revoke: give pins, or one of --file, "
				  "--client, --mount and --device.");
	return -1;
}

static int revoke_resolve_mount(struct revoke *rv)
{
	int r;

	r = mount_of(rv->fd, &rv->mount);
	if (r >= 0 && !rv->mount.is_root)
		return fail(EX_USAGE, "%s is no mount point. What is mounted at %s has it: give that.",
			rv->target.path, rv->mount.point);
	if (r >= 0)
		r = mount_find_others(&rv->mount, &rv->target.others, &rv->target.n_others);
	if (r < 0)
		return fail(
			EX_NOINPUT, "Cannot find the mount %s: %s.", rv->target.path, strerror(-r));
	return 0;
}

/* A path means what it is here and now: the broker is told which file or mount that is. */
static int revoke_resolve(struct revoke *rv)
{
	struct statx stx;

	if (!rv->target.path)
		return 0;
	rv->fd = open(rv->target.path, O_PATH | O_CLOEXEC);
	if (rv->fd < 0 || statx(rv->fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO, &stx) < 0)
		return fail(EX_NOINPUT, "Cannot find %s: %s.%s", visible(rv->target.path),
			strerror(errno),
			rv->target.mount ? ""
					 : " What has no name any more can be revoked by its pins: "
					   "pinbrokerctl list shows them.");
	rv->target.device = makedev(stx.stx_dev_major, stx.stx_dev_minor);
	rv->target.inode = stx.stx_ino;
	return rv->target.mount ? revoke_resolve_mount(rv) : 0;
}

int ctl_revoke(struct ctl *ctl, int argc, char *argv[])
{
	struct revoke rv = {.ctl = ctl, .wait = true, .fd = -1};
	int r;

	r = revoke_parse(&rv, argc, argv);
	if (r < 0)
		r = revoke_resolve(&rv) ?: revoke_run(&rv);
	sd_bus_flush_close_unref(rv.bus);
	free(rv.broker);
	free(rv.ended);
	free(rv.target.pins);
	free(rv.target.others);
	safe_close(rv.fd);
	return r;
}
