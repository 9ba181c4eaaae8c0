/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <string.h>
#include <sys/utsname.h>

#define SOCKET_DEFAULT "/run/pinbroker/org.pinbroker"
/* Of revocations that have ended, the last ones. */
#define RECENT 5U

struct ids {
	uint64_t *ids; /* owned */
	size_t n;
};

/* What the broker keeps of this caller's, or of everybody's. */
struct counts {
	uint64_t clients, files, contexts, pins, pinned_bytes, running;
	uint64_t overflows, unfinished; /* PINBROKER_UNKNOWN: not for this caller */
};

struct kernel {
	struct utsname uts;
	uint64_t lease_break_seconds, leases_enabled, io_uring_disabled; /* or PINBROKER_UNKNOWN */
};

/* What the broker may look into, which need not be what this program may. */
struct powers {
	bool known, kcmp, processes;
};

struct status {
	struct ctl *ctl;
	pinbroker *pb;
	const char *version; /* pb's */
	struct counts counts;
	struct kernel kernel;
	struct powers powers;
	struct ids exposed, running, ended;
	struct table *exposures, *revocations; /* owned */
	json_object *features;                 /* owned, an array */
	char *bus_owner;                       /* owned; NULL: not on the bus, or there is none */
	int bus_error;                         /* for which the bus cannot be asked, or 0 */
	pid_t pid;                             /* 0: not known */
	char *unit;                            /* owned, or NULL */
};

static void ids_add(struct ids *ids, uint64_t id)
{
	ids->ids = must(realloc(ids->ids, (ids->n + 1) * sizeof(*ids->ids)));
	ids->ids[ids->n++] = id;
}

/* ---- What the broker says ---- */

static int add_client(const struct pinbroker_client_info *info, void *userdata)
{
	struct counts *c = userdata;

	c->clients++;
	c->contexts += info->n_contexts;
	c->pins += info->n_pins;
	c->pinned_bytes += info->pinned_bytes;
	return 0;
}

static int add_file(const struct pinbroker_file_info *info, void *userdata)
{
	struct status *s = userdata;

	s->counts.files++;
	if (info->exposed)
		ids_add(&s->exposed, info->file);
	return 0;
}

static int add_revocation(const struct pinbroker_revocation_info *info, void *userdata)
{
	struct status *s = userdata;

	ids_add(info->end_usec == PINBROKER_UNKNOWN ? &s->running : &s->ended, info->revocation);
	return 0;
}

static int add_feature(const char *feature, void *userdata)
{
	json_object_array_add(userdata, must(json_object_new_string(feature)));
	return 0;
}

static int fill(struct status *s, const char *plural, const struct ids *ids, struct table **ret)
{
	/* No ids would mean all. */
	struct list list = {.pb = s->pb, .ids = ids->ids ?: &(uint64_t){0}, .n_ids = ids->n};
	int r = 0;

	for (size_t i = 0; i < LIST_KINDS && r == 0; i++)
		if (strcmp(list_kinds[i].plural, plural) == 0)
			r = list_fill(&list, &list_kinds[i]);
	*ret = list.table;
	return r;
}

static int status_ask_broker(struct status *s)
{
	struct ids *running = &s->running;
	int r;

	r = ctl_client(s->ctl, &s->pb);
	if (r > 0)
		return r;
	/* Before there is a client of our own. */
	r = pinbroker_list_clients(s->pb, add_client, &s->counts);
	if (r >= 0)
		r = pinbroker_list_files(s->pb, add_file, s);
	if (r >= 0)
		r = pinbroker_list_revocations(s->pb, add_revocation, s);
	pinbroker_set_channels(s->pb, 0);
	if (r >= 0)
		r = pinbroker_connect(s->pb);
	if (r < 0)
		return fail_call(
			s->pb, reaching(s->pb, r), "Cannot ask the broker for its status");
	s->version = pinbroker_get_version(s->pb);
	pinbroker_list_features(s->pb, add_feature, s->features);
	s->counts.running = running->n;
	for (size_t i = s->ended.n > RECENT ? s->ended.n - RECENT : 0; i < s->ended.n; i++)
		ids_add(running, s->ended.ids[i]);
	r = fill(s, "files", &s->exposed, &s->exposures);
	return r ?: fill(s, "revocations", running, &s->revocations);
}

/* ---- What the bus knows ---- */

static void read_counts(sd_bus_message *m, struct counts *c)
{
	const char *name;
	uint64_t value;

	if (sd_bus_message_enter_container(m, 'a', "{st}") < 0)
		return;
	while (sd_bus_message_read(m, "{st}", &name, &value) > 0)
		if (strcmp(name, "signalQueueOverflows") == 0)
			c->overflows = value;
		else if (strcmp(name, "unfinishedJobs") == 0)
			c->unfinished = value;
}

static void read_powers(sd_bus_message *m, struct powers *p)
{
	const char *restriction;

	if (sd_bus_message_enter_container(m, 'a', "s") < 0)
		return;
	*p = (struct powers){.known = true, .kcmp = true, .processes = true};
	while (sd_bus_message_read(m, "s", &restriction) > 0)
		if (strcmp(restriction, "kcmp") == 0)
			p->kcmp = false;
		else if (strcmp(restriction, "processes") == 0)
			p->processes = false;
}

/* It need not be there, nor let this caller in: the socket has the rest. */
static void status_ask_bus(struct status *s)
{
	_cleanup_(sd_bus_flush_close_unrefp) sd_bus *bus = NULL;
	_cleanup_(sd_bus_creds_unrefp) sd_bus_creds *creds = NULL;
	_cleanup_(sd_bus_message_unrefp) sd_bus_message *m = NULL;
	const char *text;

	s->bus_error = ctl_bus_connect(s->ctl, &bus);
	if (s->bus_error >= 0)
		s->bus_error = sd_bus_get_name_creds(bus, BROKER_NAME,
			SD_BUS_CREDS_UNIQUE_NAME | SD_BUS_CREDS_PID | SD_BUS_CREDS_AUGMENT |
				SD_BUS_CREDS_UNIT,
			&creds);
	if (s->bus_error < 0)
		return;
	if (sd_bus_creds_get_unique_name(creds, &text) >= 0)
		s->bus_owner = must(strdup(text));
	(void)sd_bus_creds_get_pid(creds, &s->pid);
	if (sd_bus_creds_get_unit(creds, &text) >= 0)
		s->unit = must(strdup(text));
	if (sd_bus_get_property(bus, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE, "Counts", NULL, &m,
		    "a{st}") >= 0)
		read_counts(m, &s->counts);
	m = sd_bus_message_unref(m);
	if (sd_bus_get_property(bus, BROKER_NAME, BROKER_PATH, BROKER_INTERFACE, "Restrictions", NULL,
		    &m, "as") >= 0)
		read_powers(m, &s->powers);
}

/* ---- What the kernel says ---- */

static uint64_t read_sysctl(const char *path)
{
	_cleanup_(close_filep) FILE *f = fopen(path, "re");
	uint64_t value;

	return f && fscanf(f, "%" SCNu64, &value) == 1 ? value : PINBROKER_UNKNOWN;
}

static void status_ask_kernel(struct kernel *k)
{
	uname(&k->uts);
	k->lease_break_seconds = read_sysctl("/proc/sys/fs/lease-break-time");
	k->leases_enabled = read_sysctl("/proc/sys/fs/leases-enable");
	k->io_uring_disabled = read_sysctl("/proc/sys/kernel/io_uring_disabled");
}

/* ---- What is shown ---- */

static const char *socket_path(const struct status *s)
{
	return s->ctl->socket_path ?: environment("PINBROKER_SOCKET") ?: SOCKET_DEFAULT;
}

static json_object *kernel_to_json(const struct kernel *k)
{
	json_object *o = must(json_object_new_object());

	json_add_string(o, "release", k->uts.release);
	json_add_number(o, "leaseBreakSec", k->lease_break_seconds);
	json_add(o, "leases",
		k->leases_enabled == PINBROKER_UNKNOWN
			? NULL
			: must(json_object_new_boolean(k->leases_enabled != 0)));
	json_add_number(o, "ioUringDisabled", k->io_uring_disabled);
	return o;
}

static json_object *power_to_json(const struct powers *p, bool power)
{
	return p->known ? must(json_object_new_boolean(power)) : NULL;
}

static json_object *counts_to_json(const struct counts *c)
{
	json_object *o = must(json_object_new_object());

	json_add_number(o, "clients", c->clients);
	json_add_number(o, "files", c->files);
	json_add_number(o, "contexts", c->contexts);
	json_add_number(o, "pins", c->pins);
	json_add_number(o, "pinnedBytes", c->pinned_bytes);
	json_add_number(o, "revocations", c->running);
	json_add_number(o, "unfinishedJobs", c->unfinished);
	json_add_number(o, "signalQueueOverflows", c->overflows);
	return o;
}

static void status_print_json(const struct status *s)
{
	json_object *o = must(json_object_new_object()), *kernel;

	json_add_string(o, "version", s->version);
	json_add_string(o, "socket", socket_path(s));
	json_add_string(o, "busName", s->bus_owner);
	json_add_number(o, "pid", s->pid > 0 ? (uint64_t)s->pid : PINBROKER_UNKNOWN);
	json_add_string(o, "unit", s->unit);
	json_add(o, "features", json_object_get(s->features));
	kernel = kernel_to_json(&s->kernel);
	json_add(kernel, "kcmp", power_to_json(&s->powers, s->powers.kcmp));
	json_add(o, "kernel", kernel);
	json_add(o, "otherProcesses", power_to_json(&s->powers, s->powers.processes));
	json_add(o, "counts", counts_to_json(&s->counts));
	json_add(o, "exposed", table_to_json(s->exposures));
	json_add(o, "revocations", table_to_json(s->revocations));
	json_print(o, s->ctl);
}

static void print_kernel(const struct kernel *k)
{
	printf("   Kernel: Linux %s", k->uts.release);
	if (k->leases_enabled == 0)
		fputs(", LEASES ARE OFF (sysctl fs.leases-enable)", stdout);
	if (k->lease_break_seconds == 0)
		fputs(", lease-break-time 0 (without limit)", stdout);
	else if (k->lease_break_seconds != PINBROKER_UNKNOWN)
		printf(", lease-break-time %" PRIu64 " s", k->lease_break_seconds);
	if (k->io_uring_disabled == 1)
		fputs(", io_uring for the group in kernel.io_uring_group only", stdout);
	else if (k->io_uring_disabled == 2)
		fputs(", io_uring is off (sysctl kernel.io_uring_disabled)", stdout);
	putchar('\n');
}

static void print_powers(const struct powers *p)
{
	if (!p->known)
		return;
	if (!p->kcmp)
		puts("           The broker may not use kcmp(2): who else has a context other than an io_uring "
		     "or a socket is not found");
	if (!p->processes)
		puts("           The broker may not look into other users' processes: a dead holder's pins are "
		     "taken for gone only if the kernel's counters show it");
}

static void print_count(uint64_t n, const char *what)
{
	printf("%" PRIu64 " %s%s, ", n, what, PLURAL(n));
}

static void print_counts(const struct counts *c)
{
	char size[32];

	format_size(c->pinned_bytes, size);
	fputs("   Counts: ", stdout);
	print_count(c->clients, "client");
	print_count(c->files, "file");
	print_count(c->contexts, "context");
	print_count(c->pins, "pin");
	printf("%s pinned%s\n", size, geteuid() == 0 ? "" : " (of this user)");
	if (c->overflows != PINBROKER_UNKNOWN && c->overflows > 0)
		printf("           %" PRIu64 " time%s the queue of lease signals ran over "
		       "(LimitSIGPENDING=)\n",
			c->overflows, PLURAL(c->overflows));
}

static void status_print(const struct status *s)
{
	const char *separator = "";

	pager_open(s->ctl);
	printf("pinbrokerd %s at %s\n", s->version, socket_path(s));
	if (s->bus_owner) {
		printf("      Bus: %s as %s", BROKER_NAME, s->bus_owner);
		if (s->pid > 0)
			printf(", pid %d", (int)s->pid);
		if (s->unit)
			printf(", %s", s->unit);
		putchar('\n');
	} else if (s->bus_error == -ENXIO) {
		puts("      Bus: " BROKER_NAME " is not on it");
	} else {
		printf("      Bus: cannot be asked (%s): %s\n", bus_address(s->ctl) ?: "system bus",
			strerror(-s->bus_error));
	}
	print_kernel(&s->kernel);
	print_powers(&s->powers);
	fputs(" Contexts: ", stdout);
	for (size_t i = 0; i < json_object_array_length(s->features); i++, separator = ", ")
		printf("%s%s", separator,
			json_object_get_string(json_object_array_get_idx(s->features, i)));
	putchar('\n');
	print_counts(&s->counts);
	if (s->exposed.n > 0) {
		printf("\nEXPOSED, pinned without a lease: %zu\n", s->exposed.n);
		table_print_rows(s->exposures, s->ctl);
	}
	printf("\nRevocations running: %" PRIu64 "%s\n", s->counts.running,
		table_rows(s->revocations) > s->counts.running ? ", and the last to end:" : "");
	table_print_rows(s->revocations, s->ctl);
	pager_close();
}

int ctl_status(struct ctl *ctl, int argc, char *argv[])
{
	struct status s = {.ctl = ctl};
	int r;

	r = ctl_common_options(ctl, argc, argv);
	if (r >= 0)
		return r;
	if (optind < argc)
		return fail_usage("status takes no arguments.");
	s.counts.overflows = s.counts.unfinished = PINBROKER_UNKNOWN;
	s.features = must(json_object_new_array());
	r = status_ask_broker(&s);
	if (r == 0) {
		status_ask_bus(&s);
		status_ask_kernel(&s.kernel);
		if (ctl->json != JSON_OFF)
			status_print_json(&s);
		else
			status_print(&s);
	}
	json_object_put(s.features);
	table_free(s.exposures);
	table_free(s.revocations);
	free(s.exposed.ids);
	free(s.running.ids);
	free(s.ended.ids);
	free(s.bus_owner);
	free(s.unit);
	pinbroker_unref(s.pb);
	return r;
}
