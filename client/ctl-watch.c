/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <string.h>

struct watch {
	struct ctl *ctl;
	sd_bus *bus;   /* owned */
	pinbroker *pb; /* owned; for details, which the signals do not carry */
	bool blind;    /* there are none, which has been said */
	bool mute;     /* nothing can be written */
};

struct event {
	const char *name; /* "started", "ended" */
	uint64_t revocation;
	const char *outcome; /* NULL: it has not ended */
	bool found;          /* the rest is known */
};

static void say_time(void)
{
	char text[32];
	struct timespec ts;
	struct tm tm;

	clock_gettime(CLOCK_REALTIME, &ts);
	localtime_r(&ts.tv_sec, &tm);
	strftime(text, sizeof(text), "%b %d %H:%M:%S", &tm);
	printf("%s.%03ld", text, ts.tv_nsec / 1000000);
}

static void say_line(const struct event *e, const struct pinbroker_revocation_info *info)
{
	_cleanup_(freep) char *path = info && info->path ? escape_text(info->path) : NULL;
	_cleanup_(freep) char *comm = info && info->comm ? escape_text(info->comm) : NULL;
	_cleanup_(freep) char *reason = info && info->reason ? escape_text(info->reason) : NULL;
	char when[64];

	say_time();
	printf(" revocation %" PRIu64 " %s", e->revocation, e->name);
	if (e->outcome)
		printf(": %s", e->outcome);
	if (info && !e->outcome) {
		printf(": %s", pinbroker_cause_name(info->cause));
		if (info->size != PINBROKER_UNKNOWN)
			printf(" to %" PRIu64 " byte%s", info->size, PLURAL(info->size));
		printf(", %s, ", path ?: "several files");
		if (info->n_remaining < info->n_pins)
			printf("%" PRIu64 " of ", info->n_remaining);
		printf("%" PRIu64 " pin%s left", info->n_pins, PLURAL(info->n_pins));
		format_when(info->deadline_usec, when, sizeof(when));
		printf(", deadline %s", when);
	}
	if (info && info->pid > 0)
		printf(", wanted by %s (pid %d)", comm ?: "a process", (int)info->pid);
	if (reason)
		printf(", because: %s", reason);
	if (info && info->has_proof)
		printf(", proof: %s", pinbroker_proof_name(info->proof));
	putchar('\n');
}

static void say_json(
	const struct ctl *ctl, const struct event *e, const struct pinbroker_revocation_info *info)
{
	json_object *o = must(json_object_new_object());

	json_add_string(o, "event", e->name);
	json_add_number(o, "timeUSec", now_usec());
	json_add_number(o, "revocation", e->revocation);
	json_add_string(o, "outcome", e->outcome);
	if (info) {
		json_add_string(o, "cause", pinbroker_cause_name(info->cause));
		json_add_number(o, "size", info->size);
		json_add_number(o, "pid", info->pid > 0 ? (uint64_t)info->pid : PINBROKER_UNKNOWN);
		json_add_string(o, "comm", info->comm);
		json_add_string(o, "reason", info->reason);
		json_add_string(o, "path", info->path);
		json_add_number(o, "pins", info->n_pins);
		json_add_number(o, "remaining", info->n_remaining);
		json_add_number(o, "deadlineUSec", info->deadline_usec);
		json_add_string(
			o, "proof", info->has_proof ? pinbroker_proof_name(info->proof) : NULL);
	}
	json_print(o, ctl);
}

struct search {
	struct watch *w;
	struct event *e;
};

static void say_event(
	const struct watch *w, const struct event *e, const struct pinbroker_revocation_info *info)
{
	if (w->ctl->json != JSON_OFF)
		say_json(w->ctl, e, info);
	else
		say_line(e, info);
}

static int say_found(const struct pinbroker_revocation_info *info, void *userdata)
{
	struct search *s = userdata;

	if (info->revocation != s->e->revocation)
		return 0;
	s->e->found = true;
	say_event(s->w, s->e, info);
	return 1;
}

static void watch_event(struct watch *w, struct event *e)
{
	struct search s = {w, e};
	int r;

	/* What cannot be looked up is told without details. */
	r = pinbroker_list_revocations(w->pb, say_found, &s);
	if (r < 0 && !w->blind)
		fail_call(w->pb, r, "Cannot look up what revocation %" PRIu64 " is about",
			e->revocation);
	w->blind = r < 0;
	if (!e->found)
		say_event(w, e, NULL);
	w->mute = write_out() != 0;
}

static int on_started(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct event e = {.name = "started"};

	if (sd_bus_message_read(m, "t", &e.revocation) >= 0)
		watch_event(userdata, &e);
	return 0;
}

static int on_ended(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	struct event e = {.name = "ended"};

	if (sd_bus_message_read(m, "ts", &e.revocation, &e.outcome) >= 0)
		watch_event(userdata, &e);
	return 0;
}

/* What nobody sends cannot be seen: it is said that there is none, and when there is one. */
static void say_broker(bool present)
{
	fputs(present ? "pinbrokerctl: The broker is on the bus.\n"
		      : "pinbrokerctl: The broker is not on the bus, and nothing is seen until it "
			"is. See "
			"whether it is running (systemctl status pinbrokerd) and on this bus.\n",
		stderr);
}

static int on_owner(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	const char *name, *old, *new;

	if (sd_bus_message_read(m, "sss", &name, &old, &new) >= 0)
		say_broker(*new);
	return 0;
}

static int on_answer(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	if (sd_bus_message_is_method_error(m, SD_BUS_ERROR_NO_REPLY) ||
		sd_bus_message_is_method_error(m, "org.freedesktop.DBus.Error.Timeout"))
		fputs("pinbrokerctl: The broker does not answer, and nothing is seen until it does: it is "
		      "stopped, or hangs. See systemctl status pinbrokerd.\n",
			stderr);
	return 0;
}

static int watch_broker(struct watch *w)
{
	sd_bus_message *reply = NULL;
	int r, present = true;

	r = sd_bus_add_match(w->bus, NULL,
		"type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',"
		"arg0='" BROKER_NAME "'",
		on_owner, w);
	if (r >= 0)
		r = sd_bus_call_method(w->bus, "org.freedesktop.DBus", "/org/freedesktop/DBus",
			"org.freedesktop.DBus", "NameHasOwner", NULL, &reply, "s", BROKER_NAME);
	if (r >= 0)
		r = sd_bus_message_read(reply, "b", &present);
	sd_bus_message_unref(reply);
	if (r >= 0 && !present)
		say_broker(false);
	else if (r >= 0)
		r = sd_bus_call_method_async(w->bus, NULL, BROKER_NAME, BROKER_PATH,
			"org.freedesktop.DBus.Peer", "Ping", on_answer, w, NULL);
	return r;
}

static int watch_run(struct watch *w)
{
	int r;

	r = ctl_client(w->ctl, &w->pb);
	if (r > 0)
		return r;
	r = ctl_bus_open(w->ctl, &w->bus);
	if (r > 0)
		return r;
	r = sd_bus_match_signal(w->bus, NULL, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE,
		"RevocationStarted", on_started, w);
	if (r >= 0)
		r = sd_bus_match_signal(w->bus, NULL, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE,
			"RevocationEnded", on_ended, w);
	if (r >= 0)
		r = watch_broker(w);
	if (r < 0)
		return fail_bus(w->ctl, r, "Cannot listen for revocations");
	if (w->ctl->legend && w->ctl->json == JSON_OFF)
		fputs("Watching for revocations, until interrupted.\n", stderr);
	while (!w->mute) {
		r = sd_bus_process(w->bus, NULL);
		if (r == 0)
			r = sd_bus_wait(w->bus, UINT64_MAX);
		if (r < 0 && r != -EINTR)
			return fail_bus(w->ctl, r, "Lost the connection while watching");
	}
	return EX_IOERR;
}

int ctl_watch(struct ctl *ctl, int argc, char *argv[])
{
	struct watch w = {.ctl = ctl};
	int r;

	r = ctl_common_options(ctl, argc, argv);
	if (r >= 0)
		return r;
	if (optind < argc)
		return fail_usage("watch takes no arguments.");
	r = watch_run(&w);
	sd_bus_flush_close_unref(w.bus);
	pinbroker_unref(w.pb);
	return r;
}
