/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl-event.h"
#include "ctl-region.h"
#include "ctl-ring.h"
#include "ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { OPTION_ACCESS = OPTION_VERB, OPTION_RANGE, OPTION_ON_REVOKE };

extern char **environ;

/* Who it is comes in a second notice, mostly after some milliseconds. A holder that is there to
 * show what happens waits so long for it. */
#define WHO_USEC (250 * USEC_PER_MSEC)

/* A pin that is not let go of ends without a further notice. */
#define LOOK_USEC (500 * USEC_PER_MSEC)

struct hold {
	struct ctl *ctl;
	const char *path;
	enum pinbroker_access access;
	bool ignore;
	char **command; /* NULL: none */

	pinbroker *pb;
	pinbroker_file *file;
	pinbroker_context *context;
	int ring_fd;            /* owned */
	struct region *regions; /* owned */
	size_t n_regions;
	size_t n_pinned;
	uint64_t release_at; /* USEC_INFINITY: nothing is waiting */
	uint64_t look_at;    /* USEC_INFINITY: no pin is to end by force */
	bool placeholders;   /* the kernel does not pin these pages, see hold_register() */
	int code;            /* to exit with, once something has gone wrong */
	bool lost;

	int signal_fd; /* owned */
	sigset_t old_mask;
	sighandler_t old_pipe;
	pid_t child; /* 0: none, or ended */
};

/* ---- What is told ---- */

static void say_holding(const struct hold *h, const struct region *region)
{
	json_object *o = event_new("holding", h->path);

	json_add_number(o, "pin", region->pin);
	json_add_number(o, "offset", region->range.offset);
	json_add_number(o, "length", region->range.length);
	json_add_string(o, "access", pinbroker_access_name(h->access));
	json_add_string(o, "pages", h->placeholders ? "placeholder" : "pinned");
	event_say(o, h->ctl);
}

static void say_released(const struct hold *h, uint64_t pin, bool ended)
{
	json_object *o = event_new("released", h->path);

	json_add_number(o, "pin", pin);
	json_add_string(o, "by", ended ? "force" : NULL);
	event_say(o, h->ctl);
}

static void say_notice(const struct hold *h, const struct pinbroker_notice *n)
{
	json_object *o = event_new(n->update ? "updated" : "revoked", h->path);
	json_object *pins = must(json_object_new_array());
	uint64_t now = now_usec();

	for (size_t i = 0; i < n->n_pins; i++)
		json_object_array_add(pins, must(json_object_new_int64((int64_t)n->pins[i])));
	json_add(o, "pins", pins);
	json_add_number(o, "revocation", n->revocation);
	json_add_string(o, "cause", pinbroker_cause_name(n->cause));
	json_add_number(o, "offset", n->offset);
	json_add_number(o, "length", n->length);
	json_add_number(o, "size", n->size);
	json_add_number(o, "pid", n->pid > 0 ? (uint64_t)n->pid : PINBROKER_UNKNOWN);
	json_add_number(o, "uid", n->uid != PINBROKER_NO_UID ? n->uid : PINBROKER_UNKNOWN);
	json_add_string(o, "comm", n->comm);
	json_add_string(o, "reason", n->reason && *n->reason ? n->reason : NULL);
	json_add(o, "left",
		must(json_object_new_double(
			n->deadline_usec > now ? (double)(n->deadline_usec - now) / USEC_PER_SEC
					       : 0.0)));
	event_say(o, h->ctl);
}

/* ---- Letting go ---- */

/* What is claimed has to be gone before Unpin claims it. */
static void hold_deregister(struct hold *h, size_t index)
{
	int r;

	r = ring_drop(h->ring_fd, (unsigned)index);
	if (r == -EINVAL || r == -EOPNOTSUPP)
		r = ring_unregister(h->ring_fd);
	/* ENXIO: there are none. */
	if (r < 0 && r != -ENXIO)
		h->code = fail(EX_OSERR,
			"Cannot deregister the buffer over pin %" PRIu64 " on %s: %s.",
			h->regions[index].pin, h->path, strerror(-r));
	region_unmap(&h->regions[index]);
}

static void hold_release(struct hold *h, size_t index)
{
	struct region *region = &h->regions[index];
	uint64_t pin = region->pin, ended;
	size_t n_ended = 0;
	int r;

	if (pin == 0)
		return;
	hold_deregister(h, index);
	region->pin = 0;
	h->n_pinned--;
	r = pinbroker_unpin(h->pb, &pin, 1, &ended, &n_ended);
	if (r < 0 && r != -ESTALE && r != -ENOENT) {
		h->code = fail_call(
			h->pb, r, "Cannot let go of pin %" PRIu64 " on %s", pin, h->path);
		return;
	}
	say_released(h, pin, r < 0 || n_ended > 0);
}

static void hold_release_wanted(struct hold *h)
{
	h->release_at = USEC_INFINITY;
	for (size_t i = 0; i < h->n_regions; i++)
		if (h->regions[i].wanted)
			hold_release(h, i);
}

static bool notice_can_wait(const struct pinbroker_notice *notice)
{
	return notice->cause == PINBROKER_CAUSE_MODIFY && notice->pid == 0 &&
	       notice->deadline_usec > now_usec() + 2 * WHO_USEC;
}

static void on_notice(pinbroker *pb, const struct pinbroker_notice *notice, void *userdata)
{
	struct hold *h = userdata;

	say_notice(h, notice);
	if (h->ignore) {
		h->look_at = now_usec() + LOOK_USEC;
		return;
	}
	for (size_t i = 0; i < notice->n_pins; i++)
		for (size_t j = 0; j < h->n_regions; j++)
			if (h->regions[j].pin == notice->pins[i])
				h->regions[j].wanted = true;
	if (!notice_can_wait(notice))
		hold_release_wanted(h);
	else if (h->release_at == USEC_INFINITY)
		h->release_at = now_usec() + WHO_USEC;
}

static int note_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct hold *h = userdata;

	for (size_t i = 0; i < h->n_regions; i++)
		if (h->regions[i].pin == info->pin)
			h->regions[i].seen = true;
	return 0;
}

/* Which of the pins are gone by force. */
static void hold_look(struct hold *h)
{
	h->look_at = now_usec() + LOOK_USEC;
	for (size_t i = 0; i < h->n_regions; i++)
		h->regions[i].seen = false;
	if (pinbroker_list_pins(h->pb, pinbroker_file_get_info(h->file)->file, 0, note_pin, h) < 0)
		return;
	for (size_t i = 0; i < h->n_regions; i++) {
		struct region *region = &h->regions[i];

		if (region->pin == 0 || region->seen)
			continue;
		say_released(h, region->pin, true);
		region->pin = 0;
		h->n_pinned--;
	}
}

/* ---- Taking hold ---- */

static int hold_open(struct hold *h)
{
	int r;

	r = ctl_client(h->ctl, &h->pb);
	if (r > 0)
		return r;
	pinbroker_set_bus_address(h->pb, h->ctl->bus_address);
	pinbroker_set_revoke_callback(h->pb, on_notice, h);
	r = pinbroker_connect(h->pb);
	if (r < 0)
		return fail_call(h->pb, reaching(h->pb, r), "Cannot hold %s", visible(h->path));
	r = pinbroker_open_file(h->pb, h->path, h->access, &h->file);
	if (r < 0)
		return fail_call(h->pb, r, "Cannot hold it for %s",
			h->access == PINBROKER_WRITE ? "writing" : "reading");
	return 0;
}

static void add_region(struct hold *h, uint64_t offset, uint64_t length)
{
	h->regions = must(realloc(h->regions, (h->n_regions + 1) * sizeof(*h->regions)));
	h->regions[h->n_regions++] = (struct region){.range = {offset, length}};
}

/* Without --range the whole file; cut into what fits into one fixed buffer. */
static int hold_divide(struct hold *h)
{
	struct region *given = TAKE_PTR(h->regions);
	size_t n_given = h->n_regions;
	struct region whole = {};
	uint64_t size = pinbroker_file_get_info(h->file)->size;

	h->n_regions = 0;
	if (n_given == 0) {
		if (size == 0)
			return fail(
				EX_DATAERR, "There is nothing to pin in %s: it is empty.", h->path);
		whole.range.length = size;
	}
	for (size_t i = 0; i < (n_given > 0 ? n_given : 1); i++) {
		struct pinbroker_range range = n_given > 0 ? given[i].range : whole.range;

		while (range.length > RING_BUFFER_MAX && h->n_regions < PINBROKER_RANGES_MAX) {
			add_region(h, range.offset, RING_BUFFER_MAX);
			range.offset += RING_BUFFER_MAX;
			range.length -= RING_BUFFER_MAX;
		}
		add_region(h, range.offset, range.length);
	}
	free(given);
	if (h->n_regions > PINBROKER_RANGES_MAX)
		return fail(EX_DATAERR,
			"Cannot hold %s: it takes more than %d ranges of 1 GiB at most. Give less in "
			"--range.",
			h->path, PINBROKER_RANGES_MAX);
	return 0;
}

static int fail_ring(const struct hold *h, int error)
{
	const char *advice = limit_advice(error);

	if (error == ENOMEM)
		advice = " Raise the limit of memory that may be locked (ulimit -l).";
	else if (!*advice)
		advice = " See the sysctl kernel.io_uring_disabled.";
	return fail(error == ENOMEM || error == EMFILE ? EX_OSERR : EX_UNAVAILABLE,
		"Cannot make an io_uring to pin %s with: %s.%s", h->path, strerror(error), advice);
}

static int hold_add_context(struct hold *h)
{
	int r;

	h->ring_fd = ring_open();
	if (h->ring_fd < 0)
		return fail_ring(h, -h->ring_fd);
	r = pinbroker_add_context_remote(h->pb, h->ring_fd, "pinbrokerctl hold", &h->context);
	if (r < 0)
		return fail_call(h->pb, r, "Cannot hand an io_uring to the broker for %s", h->path);
	return 0;
}

static int hold_reserve(struct hold *h)
{
	_cleanup_(freep) struct pinbroker_range *ranges = must(
		calloc(h->n_regions, sizeof(*ranges)));
	_cleanup_(freep) uint64_t *pins = must(calloc(h->n_regions, sizeof(*pins)));
	int r;

	for (size_t i = 0; i < h->n_regions; i++)
		ranges[i] = h->regions[i].range;
	r = pinbroker_pin(h->pb, h->file, h->context, ranges, h->n_regions, h->access,
		"pinbrokerctl hold", pins);
	if (r < 0)
		return fail_call(h->pb, r, "Cannot pin %s", h->path);
	for (size_t i = 0; i < h->n_regions; i++)
		h->regions[i].pin = pins[i];
	h->n_pinned = h->n_regions;
	return 0;
}

/*
 * A fixed buffer is always pinned for writing. The kernel refuses that over a read-only mapping,
 * and over a file of most disk file systems: then a page of nothing stands in its place, so that
 * the lease, the notice and the detaching are still as they would be.
 */
static int hold_register(struct hold *h)
{
	int fd = pinbroker_file_get_fd(h->file), r;

	r = regions_register(h->regions, h->n_regions, h->ring_fd, fd, h->access);
	if (r == -EFAULT || r == -EOPNOTSUPP) {
		h->placeholders = true;
		r = regions_register_placeholders(h->regions, h->n_regions, h->ring_fd);
	}
	if (r == -ENOMEM)
		return fail(EX_OSERR,
			"Cannot pin %s: not enough memory may be locked. Raise the limit (ulimit "
			"-l), or give less in --range.",
			h->path);
	if (r < 0)
		return fail(EX_OSERR, "Cannot register %s with an io_uring: %s.", h->path,
			strerror(-r));
	return 0;
}

static int hold_bind(struct hold *h)
{
	int r;

	for (size_t i = 0; i < h->n_regions; i++) {
		r = pinbroker_bind(h->pb, h->regions[i].pin, i);
		/* A conflict came first. Its notice is under way, and tells what to do. */
		if (r < 0 && r != -ESTALE)
			return fail_call(h->pb, r, "Cannot bind pin %" PRIu64 " on %s",
				h->regions[i].pin, h->path);
		say_holding(h, &h->regions[i]);
	}
	return 0;
}

/* ---- The run ---- */

static int hold_block_signals(struct hold *h)
{
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	sigaddset(&mask, SIGHUP);
	sigaddset(&mask, SIGCHLD);
	sigprocmask(SIG_BLOCK, &mask, &h->old_mask);
	/* That nobody reads what is said is no reason to let go. */
	h->old_pipe = signal(SIGPIPE, SIG_IGN);
	h->signal_fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	if (h->signal_fd < 0)
		return fail(EX_OSERR, "Cannot wait for signals: %s.", strerror(errno));
	return 0;
}

static int fail_command(const struct hold *h, int error)
{
	const char *advice = error == EAGAIN ? " Raise the limit of processes (ulimit -u)." : "";
	int code = error == EACCES                      ? EX_NOPERM
		   : error == EAGAIN || error == ENOMEM ? EX_OSERR
							: EX_NOINPUT;

	return fail(code, "Cannot run %s while holding %s: %s.%s", visible(h->command[0]), h->path,
		strerror(error), advice);
}

static int hold_spawn(struct hold *h)
{
	posix_spawnattr_t attributes;
	sigset_t defaults;
	int r;

	if (!h->command)
		return 0;
	posix_spawnattr_init(&attributes);
	posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	posix_spawnattr_setsigmask(&attributes, &h->old_mask);
	sigemptyset(&defaults);
	if (h->old_pipe == SIG_DFL)
		sigaddset(&defaults, SIGPIPE);
	posix_spawnattr_setsigdefault(&attributes, &defaults);
	r = posix_spawnp(&h->child, h->command[0], NULL, &attributes, h->command, environ);
	posix_spawnattr_destroy(&attributes);
	if (r != 0) {
		h->child = 0;
		return fail_command(h, r);
	}
	return 0;
}

/* Returns 1 when it is time to end. */
static int hold_signal(struct hold *h)
{
	struct signalfd_siginfo info;
	int status;

	if (read(h->signal_fd, &info, sizeof(info)) != sizeof(info))
		return 0;
	if (info.ssi_signo != SIGCHLD) {
		/* What comes from the terminal, the command gets itself. */
		if (h->child > 0 && info.ssi_code == SI_USER)
			kill(h->child, (int)info.ssi_signo);
		return h->child == 0;
	}
	if (h->child == 0 || waitpid(h->child, &status, WNOHANG) != h->child)
		return 0;
	h->child = 0;
	h->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	return 1;
}

/* In milliseconds, for poll(). */
static int hold_timeout(const struct hold *h)
{
	uint64_t now = now_usec(), at = h->release_at < h->look_at ? h->release_at : h->look_at;

	if (at == USEC_INFINITY)
		return -1;
	return at <= now ? 0 : (int)((at - now) / USEC_PER_MSEC + 1);
}

static int hold_loop(struct hold *h)
{
	struct pollfd pfds[] = {
		{.fd = pinbroker_get_fd(h->pb), .events = POLLIN},
		{.fd = h->signal_fd, .events = POLLIN},
	};
	int r;

	while (h->command || h->n_pinned > 0) {
		if (poll(pfds, ELEMENTS(pfds), hold_timeout(h)) < 0)
			continue;
		if (h->release_at <= now_usec())
			hold_release_wanted(h);
		if (h->look_at <= now_usec())
			hold_look(h);
		if (pfds[1].revents && hold_signal(h))
			return 0;
		if (!pfds[0].revents)
			continue;
		r = pinbroker_dispatch(h->pb);
		if (r == -ENOTRECOVERABLE) {
			h->lost = true;
			return fail_call(h->pb, r, "Cannot hold %s any longer", h->path);
		}
	}
	return 0;
}

static int hold_run(struct hold *h)
{
	int r;

	r = hold_block_signals(h);
	r = r ?: hold_open(h);
	r = r ?: hold_divide(h);
	r = r ?: hold_add_context(h);
	r = r ?: hold_reserve(h);
	r = r ?: hold_register(h);
	r = r ?: hold_bind(h);
	r = r ?: hold_spawn(h);
	return r ?: hold_loop(h);
}

static void hold_close(struct hold *h)
{
	for (size_t i = 0; i < h->n_regions && !h->lost; i++)
		hold_release(h, i);
	for (size_t i = 0; i < h->n_regions; i++)
		region_unmap(&h->regions[i]);
	/* What cannot be given back here is taken back when this process ends, in a moment. */
	if (h->context && (h->lost || pinbroker_remove_context(h->context) < 0))
		pinbroker_context_free(h->context);
	safe_close(h->ring_fd);
	if (h->file && (h->lost || pinbroker_close_file(h->file) < 0))
		pinbroker_file_free(h->file);
	pinbroker_unref(h->pb);
	safe_close(h->signal_fd);
	free(h->regions);
}

/* ---- What is asked for ---- */

static bool parse_range(const char *text, struct pinbroker_range *ret)
{
	_cleanup_(freep) char *s = must(strdup(text));
	struct pinbroker_range range;
	char *colon = strchr(s, ':');

	if (!colon)
		return false;
	*colon = 0;
	if (!parse_u64(s, &range.offset) || !parse_u64(colon + 1, &range.length))
		return false;
	if (range.length == 0 || range.offset > INT64_MAX ||
		range.length > INT64_MAX - range.offset)
		return false;
	*ret = range;
	return true;
}

static int hold_option(struct hold *h, int c)
{
	struct pinbroker_range range;

	switch (c) {
	case OPTION_ACCESS:
		if (strcmp(optarg, "read") != 0 && strcmp(optarg, "write") != 0)
			return fail_usage("--access is read or write, not %s.", visible(optarg));
		h->access = *optarg == 'w' ? PINBROKER_WRITE : PINBROKER_READ;
		return -1;
	case OPTION_RANGE:
		if (!parse_range(optarg, &range))
			return fail_usage("--range is OFFSET:LENGTH, in bytes, of one at least, not %s.",
				visible(optarg));
		add_region(h, range.offset, range.length);
		return -1;
	case OPTION_ON_REVOKE:
		if (strcmp(optarg, "release") != 0 && strcmp(optarg, "ignore") != 0)
			return fail_usage("--on-revoke is release or ignore, not %s.", visible(optarg));
		h->ignore = *optarg == 'i';
		return -1;
	default:
		return ctl_common_option(h->ctl, c);
	}
}

static int hold_parse(struct hold *h, int argc, char *argv[])
{
	static const struct option options[] = {
		{"access", required_argument, NULL, OPTION_ACCESS},
		{"range", required_argument, NULL, OPTION_RANGE},
		{"on-revoke", required_argument, NULL, OPTION_ON_REVOKE},
		COMMON_OPTIONS,
	};
	int c, r, at;

	/* "-": in order, so that what follows "--" is known from what comes before it. */
	while (at = optind, (c = getopt_long(argc, argv, "-h", options, NULL)) >= 0) {
		if (c == 1 && h->path)
			return fail_usage(
				"One file can be held at a time; a command comes after --.");
		if (c == 1) {
			h->path = optarg;
			continue;
		}
		r = hold_option(h, c);
		if (r >= 0)
			return r;
	}
	if (!h->path)
		return fail_usage("There is no file to hold.");
	if (optind < argc)
		h->command = argv + optind;
	else if (optind > at)
		return fail_usage("There is no command behind --.");
	return -1;
}

int ctl_hold(struct ctl *ctl, int argc, char *argv[])
{
	struct hold h = {.ctl = ctl,
		.ring_fd = -1,
		.signal_fd = -1,
		.release_at = USEC_INFINITY,
		.look_at = USEC_INFINITY};
	int r;

	r = hold_parse(&h, argc, argv);
	if (r < 0) {
		r = hold_run(&h);
		hold_close(&h);
		return r ?: h.code;
	}
	free(h.regions);
	return r;
}
