/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <string.h>

enum {
	OPTION_FILE = OPTION_VERB,
	OPTION_CLIENT,
	OPTION_REASON,
	OPTION_TIMEOUT,
	OPTION_WAIT,
	OPTION_NO_WAIT,
};

struct revoke {
	struct ctl *ctl;
	const char *path;
	uint64_t client; /* 0: none given */
	uint64_t *pins;  /* owned */
	size_t n_pins;
	const char *reason;
	uint64_t timeout_usec; /* 0: the broker's own */
	bool wait;

	sd_bus *bus;  /* owned */
	char *broker; /* owned; who answered the call */
	uint64_t id;  /* of the revocation */
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
	const char *method = rv->path         ? "RevokePath"
			     : rv->client > 0 ? "RevokeClient"
					      : "RevokePins";
	int r;

	r = sd_bus_message_new_method_call(
		rv->bus, &m, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE, method);
	if (r < 0)
		return r;
	sd_bus_message_set_allow_interactive_authorization(m, true);
	if (rv->path)
		r = sd_bus_message_append(m, "s", rv->path);
	else if (rv->client > 0)
		r = sd_bus_message_append(m, "t", rv->client);
	else
		r = sd_bus_message_append_array(m, 't', rv->pins, rv->n_pins * sizeof(*rv->pins));
	if (r < 0)
		return r;
	r = sd_bus_message_append(m, "st", rv->reason ?: "", rv->timeout_usec);
	if (r < 0)
		return r;
	*ret = TAKE_PTR(m);
	return 0;
}

static int revoke_call(struct revoke *rv)
{
	_cleanup_(sd_bus_error_free) sd_bus_error error = SD_BUS_ERROR_NULL;
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *m = NULL;
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
	char what[PATH_MAX + 64];
	int r;

	r = revoke_request(rv, &m);
	if (r < 0)
		return fail_bus(rv->ctl, r, "Cannot ask for the revocation");
	r = sd_bus_call(rv->bus, m, 0, &error, &reply);
	if (r >= 0)
		r = sd_bus_message_read(reply, "t", &rv->id);
	if (r >= 0) {
		rv->broker = must(strdup(sd_bus_message_get_sender(reply) ?: ""));
		return 0;
	}
	if (rv->path)
		snprintf(what, sizeof(what), "Cannot revoke the pins on %s", rv->path);
	else if (rv->client > 0)
		snprintf(what, sizeof(what), "Cannot revoke the pins of client %" PRIu64,
			rv->client);
	else
		snprintf(what, sizeof(what), "Cannot revoke pin %" PRIu64 "%s", rv->pins[0],
			rv->n_pins > 1 ? " and the others" : "");
	return fail_bus_call(&error, r, what);
}

/* ---- The end ---- */

struct remaining {
	pinbroker *pb;
	uint64_t revocation, client;
	size_t n;
};

static int say_client(const struct pinbroker_client_info *info, void *userdata)
{
	const struct remaining *rm = userdata;

	if (info->client != rm->client)
		return 0;
	fprintf(stderr, " (%s, pid %d, uid %u%s)", info->comm, (int)info->pid, (unsigned)info->uid,
		info->alive ? "" : ", dead");
	return 1;
}

static int say_remaining(const struct pinbroker_pin_info *info, void *userdata)
{
	struct remaining *rm = userdata;
	_cleanup_(freep) char *path = escape_text(info->path);

	if (info->revocation != rm->revocation)
		return 0;
	rm->n++;
	rm->client = info->client;
	fprintf(stderr, "  pin %" PRIu64 " on %s, held by client %" PRIu64, info->pin, path,
		info->client);
	pinbroker_list_clients(rm->pb, say_client, rm);
	fputc('\n', stderr);
	return 0;
}

static void revoke_say_remaining(const struct revoke *rv)
{
	struct remaining rm = {.revocation = rv->id};
	int r;

	if (ctl_client(rv->ctl, &rm.pb) > 0)
		return;
	r = pinbroker_list_pins(rm.pb, 0, 0, say_remaining, &rm);
	if (r < 0)
		fail_call(rm.pb, r, "Cannot list who remains");
	else if (rm.n == 0)
		fputs("  No pin of it is listed any more.\n", stderr);
	pinbroker_unref(rm.pb);
}

static const struct ended *revoke_find_ended(const struct revoke *rv)
{
	for (size_t i = 0; i < rv->n_ended; i++)
		if (rv->ended[i].id == rv->id && strcmp(rv->ended[i].sender, rv->broker) == 0)
			return &rv->ended[i];
	return NULL;
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
	printf("revocation %" PRIu64 " %s\n", rv->id, e->outcome);
	if (strcmp(e->outcome, "released") == 0)
		return EX_OK;
	fail(0, "Revocation %" PRIu64 " ended as %s. What remains:", rv->id, e->outcome);
	revoke_say_remaining(rv);
	return EX_TEMPFAIL;
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
	if (r > 0)
		return r;
	if (rv->wait)
		return revoke_wait(rv);
	printf("revocation %" PRIu64 " started\n", rv->id);
	return EX_OK;
}

/* ---- What is asked for ---- */

/* 0 for the broker means its own grace; for a person, at once. */
static bool parse_timeout(const char *s, uint64_t *ret)
{
	double seconds;
	char *end;

	seconds = strtod(s, &end);
	if (end == s || *end || !isfinite(seconds) || seconds < 0 || seconds > 1e9)
		return false;
	*ret = (uint64_t)(seconds * USEC_PER_SEC);
	if (*ret == 0)
		*ret = 1;
	return true;
}

static int revoke_option(struct revoke *rv, int c)
{
	switch (c) {
	case OPTION_FILE:
		rv->path = optarg;
		return -1;
	case OPTION_CLIENT:
		if (!parse_u64(optarg, &rv->client) || rv->client == 0)
			return fail_usage("--client is the id of a client, not %s.", optarg);
		return -1;
	case OPTION_REASON:
		rv->reason = optarg;
		return -1;
	case OPTION_TIMEOUT:
		if (!parse_timeout(optarg, &rv->timeout_usec))
			return fail_usage("--timeout is a number of seconds, not %s.", optarg);
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
	rv->pins = must(calloc((size_t)argc, sizeof(*rv->pins)));
	for (; optind < argc; optind++)
		if (!parse_u64(argv[optind], &rv->pins[rv->n_pins++]))
			return fail_usage("A pin is given by its number, not by %s.", argv[optind]);
	if ((rv->path ? 1 : 0) + (rv->client > 0 ? 1 : 0) + (rv->n_pins > 0 ? 1 : 0) != 1)
		return fail_usage("Give either pins, or --file, or --client.");
	return -1;
}

/* The broker compares with the path as listed, and asks no file system. */
static const char *revoke_resolve(const char *path, char buffer[static PATH_MAX])
{
	return realpath(path, buffer) ?: path;
}

int ctl_revoke(struct ctl *ctl, int argc, char *argv[])
{
	struct revoke rv = {.ctl = ctl, .wait = true};
	char path[PATH_MAX];
	int r;

	r = revoke_parse(&rv, argc, argv);
	if (r < 0) {
		if (rv.path)
			rv.path = revoke_resolve(rv.path, path);
		r = revoke_run(&rv);
	}
	sd_bus_flush_close_unref(rv.bus);
	free(rv.broker);
	free(rv.ended);
	free(rv.pins);
	return r;
}
