/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ctl.h"

#include <ctype.h>
#include <getopt.h>
#include <inttypes.h>
#include <locale.h>
#include <stdarg.h>
#include <string.h>

#include "protocol/utf8.h"

static const struct {
	const char *name;
	int (*run)(struct ctl *ctl, int argc, char *argv[]);
} verbs[] = {
	{"status", ctl_status},
	{"list", ctl_list},
	{"show", ctl_show},
	{"revoke", ctl_revoke},
	{"watch", ctl_watch},
	{"map", ctl_map},
	{"preflight", ctl_preflight},
	{"hold", ctl_hold},
};

static const char help_text[] =
	"pinbrokerctl [OPTIONS…] COMMAND …\n"
	"\n"
	"See who has pinned pages of which files, and make them let go.\n"
	"\n"
	"Commands:\n"
	"  status                  Show the broker, the kernel, exposures, revocations\n"
	"  list [pins|files|clients|contexts|revocations]\n"
	"                          List objects (pins by default)\n"
	"  show ID…                Show objects, of whatever kind\n"
	"  revoke PIN…             Have pins let go of\n"
	"  revoke --file PATH      … all those on a file\n"
	"  revoke --client ID      … all those of a client\n"
	"  revoke --mount DIR      … all those on files of a mount\n"
	"  revoke --device NAME    … all those through a device\n"
	"  watch                   Show revocations as they start and end\n"
	"  map FILE                Draw the pins over a file\n"
	"  preflight FILE          Tell what can be promised for a file, and who has it\n"
	"                          open\n"
	"  hold FILE [-- COMMAND…] Pin a file (while a command runs)\n"
	"\n"
	"Options:\n"
	"     --bus ADDRESS        D-Bus address (default: $PINBROKER_BUS, the system\n"
	"                          bus)\n"
	"     --socket PATH        The broker's socket (default: $PINBROKER_SOCKET,\n"
	"                          /run/pinbroker/org.pinbroker)\n"
	"     --json=short|pretty  Print JSON\n"
	"     --no-legend          Print neither titles nor a count\n"
	"     --no-pager           Do not pipe the output into a pager\n"
	"  -h --help               Show this help\n"
	"     --version            Show the version\n"
	"\n"
	"list:\n"
	"     --file ID            Only pins on a file\n"
	"     --client ID          Only pins and contexts of a client\n"
	"revoke:\n"
	"     --reason TEXT        Tell the holders why\n"
	"     --timeout SEC        How long they have (default: RevokeGraceSec=)\n"
	"     --no-wait            Do not wait for the end\n"
	"hold:\n"
	"     --access read|write  What to open the file for (default: read)\n"
	"     --range OFFSET:LENGTH\n"
	"                          What to pin, may be repeated (default: all)\n"
	"     --on-revoke release|ignore\n"
	"                          What to do when asked to let go (default: release)\n";

/* Names of files, arguments and answers may hold anything: nothing of it reaches the terminal as a
 * command. */
static void __attribute__((format(printf, 1, 0))) say_error(const char *format, va_list ap)
{
	_cleanup_(freep) char *raw = NULL, *text = NULL;

	if (vasprintf(&raw, format, ap) < 0)
		raw = NULL;
	text = escape_text(raw ?: "Out of memory.");
	fprintf(stderr, "pinbrokerctl: %s", text);
}

int fail(int code, const char *format, ...)
{
	va_list ap;

	fflush(stdout);
	va_start(ap, format);
	say_error(format, ap);
	va_end(ap);
	fputc('\n', stderr);
	return code;
}

int fail_usage(const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	say_error(format, ap);
	va_end(ap);
	fputs("\nTry pinbrokerctl --help.\n", stderr);
	return EX_USAGE;
}

int write_out(void)
{
	static bool failed;

	if (fflush(stdout) == 0 && !ferror(stdout))
		return failed ? EX_IOERR : EX_OK;
	if (!failed)
		fprintf(stderr, "pinbrokerctl: Cannot write the output: %s.\n", strerror(errno));
	failed = true;
	return EX_IOERR;
}

int reaching(pinbroker *pb, int r)
{
	switch (-r) {
	case ENOENT:
	case ENOTDIR:
	case ELOOP:
	case EACCES:
	case EPERM:
	case EAGAIN:
		return pinbroker_last_error(pb)->name ? r : -ENOTCONN;
	default:
		return r;
	}
}

static int exit_code(int error)
{
	switch (-error) {
	case EINVAL:
	case E2BIG:
		return EX_USAGE;
	case ERANGE:
		return EX_DATAERR;
	case ENOENT:
	case ENOTDIR:
	case ELOOP:
	case ENAMETOOLONG:
		return EX_NOINPUT;
	case EACCES:
	case EPERM:
		return EX_NOPERM;
	case EBUSY:
	case EAGAIN:
	case ESTALE:
	case EDQUOT:
		return EX_TEMPFAIL;
	case EPROTO:
	case EREMOTEIO:
		return EX_PROTOCOL;
	case ENOMEM:
	case EMFILE:
	case ENFILE:
		return EX_OSERR;
	default:
		return EX_UNAVAILABLE;
	}
}

int fail_call(pinbroker *pb, int r, const char *format, ...)
{
	_cleanup_(freep) char *message = escape_text(pinbroker_last_error(pb)->message);
	va_list ap;

	fflush(stdout);
	va_start(ap, format);
	say_error(format, ap);
	va_end(ap);
	fprintf(stderr, ": %s\n", message);
	return exit_code(r);
}

void *must(void *p)
{
	if (!p) {
		fail(EX_OSERR, "Out of memory.");
		exit(EX_OSERR);
	}
	return p;
}

bool parse_u64(const char *s, uint64_t *ret)
{
	unsigned long long value;
	char *end;

	if (!isdigit((unsigned char)*s))
		return false;
	errno = 0;
	value = strtoull(s, &end, 0);
	if (errno != 0 || *end)
		return false;
	*ret = value;
	return true;
}

bool parse_id(const char *s, uint64_t *ret)
{
	return *s != '0' && parse_u64(s, ret) && *ret <= INT64_MAX;
}

static char *escape(const char *s, bool word)
{
	char *text = must(malloc(strlen(s) * 4 + 1)), *p = text;

	while (*s) {
		bool separates = word && (*s == ' ' || *s == '\\');
		size_t length = separates ? 0 : utf8_printable(s);

		if (length == 0)
			p += sprintf(p, word ? "\\%03o" : "\\x%02x", (unsigned char)*s++);
		for (; length > 0; length--)
			*p++ = *s++;
	}
	*p = 0;
	return text;
}

char *escape_word(const char *s)
{
	return escape(s, true);
}

char *escape_text(const char *s)
{
	return escape(s, false);
}

bool is_below(const char *path, const char *directory)
{
	size_t n = strlen(directory);

	if (n == 1)
		return *path == '/';
	return strncmp(path, directory, n) == 0 && (path[n] == '/' || path[n] == 0);
}

void format_when(uint64_t usec, char *ret, size_t size)
{
	uint64_t now = now_usec();
	bool past = usec < now;
	double seconds = (double)(past ? now - usec : usec - now) / USEC_PER_SEC;
	const char *unit = "s";

	if (usec == PINBROKER_UNKNOWN) {
		*ret = 0;
		return;
	}
	if (seconds >= 48 * 3600) {
		seconds /= 24 * 3600;
		unit = "d";
	} else if (seconds >= 2 * 3600) {
		seconds /= 3600;
		unit = "h";
	} else if (seconds >= 120) {
		seconds /= 60;
		unit = "min";
	}
	snprintf(ret, size, "%s%.1f %s%s", past ? "" : "in ", seconds, unit, past ? " ago" : "");
}

void format_size(uint64_t size, char ret[static 32])
{
	static const char units[] = "KMGTPE";
	int i = -1;

	for (; size >= 1024 && size % 1024 == 0 && units[i + 1]; i++)
		size /= 1024;
	snprintf(ret, 32, "%" PRIu64 "%.1s", size, i < 0 ? "" : &units[i]);
}

int ctl_client(const struct ctl *ctl, pinbroker **ret)
{
	int r;

	r = pinbroker_new("pinbrokerctl", ctl->socket_path, ret);
	if (r == -ENAMETOOLONG)
		return fail(EX_USAGE, "The socket path is too long for a socket: %s.",
			ctl->socket_path ?: "$PINBROKER_SOCKET");
	if (r < 0)
		return fail(EX_OSERR, "Cannot prepare a connection to the broker: %s.%s",
			strerror(-r), limit_advice(-r));
	return 0;
}

static int json_option(struct ctl *ctl, const char *value)
{
	if (strcmp(value, "short") == 0)
		ctl->json = JSON_SHORT;
	else if (strcmp(value, "pretty") == 0)
		ctl->json = JSON_PRETTY;
	else
		return fail_usage("--json is short or pretty, not %s.", visible(value));
	return -1;
}

/* getopt_long() would print the argument as it is. */
static int fail_option(const char *argument)
{
	if (optopt >= OPTION_BUS || optopt == 'h')
		return fail_usage("The option %s %s.", argument,
			strchr(argument, '=') ? "takes no argument" : "needs an argument");
	if (optopt != 0)
		return fail_usage("There is no option -%c.", optopt);
	return fail_usage("There is no option %s.", argument);
}

static int string_option(const char **ret, const char *name)
{
	if (!*optarg)
		return fail_usage("The option %s needs an argument.", name);
	*ret = optarg;
	return -1;
}

int ctl_common_option(struct ctl *ctl, int c)
{
	switch (c) {
	case OPTION_BUS:
		return string_option(&ctl->bus_address, "--bus");
	case OPTION_SOCKET:
		return string_option(&ctl->socket_path, "--socket");
	case OPTION_JSON:
		return json_option(ctl, optarg);
	case OPTION_NO_LEGEND:
		ctl->legend = false;
		return -1;
	case OPTION_NO_PAGER:
		ctl->pager = false;
		return -1;
	case OPTION_VERSION:
		puts("pinbrokerctl " PINBROKER_VERSION);
		return EX_OK;
	case 'h':
		fputs(help_text, stdout);
		return EX_OK;
	default:
		return fail_option(ctl->argv[optind - 1]);
	}
}

static int parse_options(struct ctl *ctl, int argc, char *argv[], const char *short_options)
{
	static const struct option options[] = {COMMON_OPTIONS};
	int c, r;

	while ((c = getopt_long(argc, argv, short_options, options, NULL)) >= 0) {
		r = ctl_common_option(ctl, c);
		if (r >= 0)
			return r;
	}
	return -1;
}

int ctl_common_options(struct ctl *ctl, int argc, char *argv[])
{
	return parse_options(ctl, argc, argv, "h");
}

static int run(int argc, char *argv[])
{
	struct ctl ctl = {.argv = argv, .legend = true, .pager = true};
	const char *verb;
	int r;

	/* "+": what comes after the verb is the verb's. */
	r = parse_options(&ctl, argc, argv, "+h");
	if (r >= 0)
		return r;
	if (optind >= argc)
		return fail_usage("There is no command.");
	verb = argv[optind];
	argc -= optind;
	argv += optind;
	ctl.argv = argv;
	/* Makes getopt_long() begin anew. */
	optind = 0;
	for (size_t i = 0; i < ELEMENTS(verbs); i++)
		if (strcmp(verb, verbs[i].name) == 0)
			return verbs[i].run(&ctl, argc, argv);
	return fail_usage("There is no command %s.", visible(verb));
}

int main(int argc, char *argv[])
{
	int r, written;

	fill_standard_descriptors();
	setlocale(LC_CTYPE, "");
	opterr = 0;
	r = run(argc, argv);
	written = write_out();
	return r != EX_OK ? r : written;
}
