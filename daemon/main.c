/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sysexits.h>
#include <systemd/sd-daemon.h>

#include "daemon/bus/bus.h"
#include "daemon/core/broker.h"
#include "daemon/core/hearing.h"
#include "daemon/kernel/search.h"
#include "daemon/manager/notify.h"
#include "daemon/state/journal.h"
#include "daemon/state/restore.h"
#include "daemon/util/log.h"
#include "daemon/util/turn.h"
#include "daemon/varlink/server.h"
#include "protocol/macro.h"
#include "protocol/utf8.h"

/* RestartKillSignal= of the unit */
#define RESTART_SIGNAL SIGUSR1
/* ExecReload= of the unit */
#define RELOAD_SIGNAL SIGHUP

#define SOCKET_PATH "/run/pinbroker/org.pinbroker"

/* Codes from 256 on have no short form. */
enum { OPTION_BUS = 256, OPTION_SOCKET, OPTION_CONFIG, OPTION_VERSION };

struct options {
	const char *bus;    /* NULL: the system bus */
	const char *socket; /* NULL: what systemd passed, else SOCKET_PATH */
	const char *config;
};

struct service {
	struct broker *broker;
	struct rpc *rpc;
	struct state *state;
	struct notifier notifier;
	const char *config; /* NULL: CONFIG_FILE */
	const char *socket; /* made here, and to be removed; NULL: not ours */
	struct stat socket_stat;
	bool leaving; /* everything is left to the next run */
};

static void help(void)
{
	fputs("pinbrokerd [OPTIONS…]\n\n"
	      "Broker long-term pins of file pages and their revocation.\n\n"
	      "     --bus=ADDRESS   D-Bus address, in place of the system bus\n"
	      "     --socket=PATH   socket to listen on, in place of\n"
	      "                     " SOCKET_PATH "\n"
	      "     --config=FILE   configuration, in place of\n"
	      "                     " CONFIG_FILE "\n"
	      "  -h --help          show this help\n"
	      "     --version       show the version\n\n"
	      "See pinbrokerd(8).\n",
	      stdout);
}

/* Arguments may hold anything: nothing of it reaches the terminal as a command. */
static int __attribute__((format(printf, 1, 2))) fail_usage(const char *format, ...)
{
	char raw[1024], text[4096];
	va_list ap;

	va_start(ap, format);
	vsnprintf(raw, sizeof(raw), format, ap);
	va_end(ap);
	utf8_escape(text, sizeof(text), raw);
	fprintf(stderr, "pinbrokerd: %s\nTry pinbrokerd --help.\n", text);
	return EX_USAGE;
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

static int wrote_out(void)
{
	if (fflush(stdout) == 0)
		return EX_OK;
	fprintf(stderr, "pinbrokerd: Cannot write the output: %s.\n", strerror(errno));
	return EX_IOERR;
}

/* Returns 0 to go on, or an exit status plus 1. */
static int parse_options(int argc, char *argv[], struct options *ret)
{
	static const struct option options[] = {
		{ "bus", required_argument, NULL, OPTION_BUS },
		{ "socket", required_argument, NULL, OPTION_SOCKET },
		{ "config", required_argument, NULL, OPTION_CONFIG },
		{ "version", no_argument, NULL, OPTION_VERSION },
		{ "help", no_argument, NULL, 'h' },
		{},
	};
	int c, i;

	opterr = 0;
	while ((c = getopt_long(argc, argv, "h", options, &i)) >= 0) {
		if (optarg && !*optarg)
			return fail_usage("The option --%s needs an argument.", options[i].name) + 1;
		switch (c) {
		case OPTION_BUS:
			ret->bus = optarg;
			break;
		case OPTION_SOCKET:
			ret->socket = optarg;
			break;
		case OPTION_CONFIG:
			ret->config = optarg;
			break;
		case 'h':
			help();
			return wrote_out() + 1;
		case OPTION_VERSION:
			puts("pinbrokerd " PINBROKER_VERSION);
			return wrote_out() + 1;
		default:
			return fail_option(argv[optind - 1]) + 1;
		}
	}
	if (optind < argc)
		return fail_usage("There is nothing to be done with %s.", *argv[optind] ? argv[optind] : "''") + 1;
	return 0;
}

/* A socket that nobody listens on any more may be replaced, one in use or anything else may not. */
static int remove_stale(const struct sockaddr_un *address)
{
	_cleanup_(close_fdp) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct stat st;

	if (fd < 0)
		return -errno;
	if (lstat(address->sun_path, &st) < 0)
		return errno == ENOENT ? 0 : -errno;
	/* connect() says of a regular file what it says of a stale socket */
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) >= 0 || errno == EAGAIN)
		return -EADDRINUSE;
	if (errno != ECONNREFUSED)
		return errno == ENOENT ? 0 : -errno;
	return unlink(address->sun_path) < 0 ? -errno : 0;
}

static int listen_bound(struct service *service, int fd, const char *path)
{
	int r;

	if (chmod(path, 0666) < 0 || lstat(path, &service->socket_stat) < 0 ||
	    listen(fd, SOMAXCONN) < 0)
		return -errno;
	r = rpc_listen(service->rpc, fd);
	if (r >= 0)
		service->socket = path;
	return r;
}

static int listen_at(struct service *service, const char *path)
{
	_cleanup_(close_fdp) int fd = -1;
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int r;

	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	memcpy(address.sun_path, path, strlen(path));
	r = remove_stale(&address);
	if (r < 0)
		return r;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		return -errno;
	r = listen_bound(service, fd, path);
	if (r < 0) {
		(void)unlink(path);
		return r;
	}
	TAKE_FD(fd);
	return 0;
}

/* To be called while it is listened on: nobody else replaces it then. */
static void remove_socket(struct service *service)
{
	struct stat st;

	if (service->socket && lstat(service->socket, &st) >= 0 &&
	    st.st_dev == service->socket_stat.st_dev && st.st_ino == service->socket_stat.st_ino)
		(void)unlink(service->socket);
}

/* What the service manager has passed. */
struct passed {
	int socket; /* -1: none */
	char **names; /* owned */
	struct kept_descriptor *kept; /* owned */
	size_t n_kept;
};

static void passed_clear(struct passed *passed)
{
	for (char **name = passed->names; name && *name; name++)
		free(*name);
	free(passed->names);
	free(passed->kept);
}

static int take_passed(struct passed *ret)
{
	uint64_t id;
	int n;
	char kind;

	*ret = (struct passed){ .socket = -1 };
	n = sd_listen_fds_with_names(true, &ret->names);
	if (n <= 0)
		return n;
	ret->kept = calloc((size_t)n, sizeof(*ret->kept));
	if (!ret->kept)
		return -ENOMEM;
	for (int i = 0; i < n; i++) {
		int fd = SD_LISTEN_FDS_START + i;

		if (store_parse_name(ret->names[i], &kind, &id)) {
			ret->kept[ret->n_kept++] =
				(struct kept_descriptor){ .fd = fd, .name = ret->names[i] };
		} else if (ret->socket < 0) {
			ret->socket = fd;
		} else {
			log_error("Several descriptors were passed, where one listening socket was "
				  "expected.");
			return -EINVAL;
		}
	}
	return 0;
}

/* Beside the socket, which lies on a file system that a reboot clears: the identifiers, and what the next run
 * begins with. Only one of two that start at once has the identifiers. */
static int open_files(struct service *service, const char *socket, struct passed *passed)
{
	struct broker *broker = service->broker;
	char path[PATH_MAX];
	int r;

	snprintf(path, sizeof(path), "%s.ids", socket);
	r = ids_open(&broker->ids, path);
	if (r < 0 || !notifier_is_open(&service->notifier))
		return r;
	broker->store.notifier = &service->notifier;
	snprintf(path, sizeof(path), "%s.state", socket);
	restore(broker, path, passed->kept, passed->n_kept);
	r = state_new(broker, path, &service->state);
	if (r < 0)
		log_errno(LOG_ERR, r, "Cannot write %s: what is pinned would not outlive a crash",
			  path);
	return 0;
}

static int listen_passed(struct rpc *rpc, int fd, struct sockaddr_un *ret_address)
{
	socklen_t size = sizeof(*ret_address) - 1;
	int flags;

	if (sd_is_socket_unix(fd, SOCK_STREAM, 1, NULL, 0) <= 0) {
		log_error("Descriptor %d, which was passed, is no listening AF_UNIX stream socket.", fd);
		return -EINVAL;
	}
	*ret_address = (struct sockaddr_un){};
	flags = fcntl(fd, F_GETFL);
	/* systemd's own sockets do not wait, others' may */
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
	    getsockname(fd, (struct sockaddr *)ret_address, &size) < 0)
		return log_errno(LOG_ERR, errno, "Cannot use passed socket %d", fd);
	return rpc_listen(rpc, fd);
}

static int listen_failed(const char *path, int r)
{
	const char *advice = r == -EEXIST ? ": something that is no socket has this name" :
			     r == -EADDRINUSE ? ": another broker does" :
			     r == -ENOENT ? ": its directory has to be made first" :
			     r == -ENAMETOOLONG ? ": the name of a socket has 107 bytes at most" : "";

	return log_errno(LOG_ERR, r, "Cannot listen on %s%s", path, advice);
}

static int listen_all(struct service *service, const struct options *options)
{
	_cleanup_(passed_clear) struct passed passed;
	const char *path = options->socket ? options->socket : SOCKET_PATH;
	struct sockaddr_un address;
	int r;

	r = take_passed(&passed);
	if (r < 0)
		return log_errno(LOG_ERR, r, "Cannot take the descriptors that were passed");
	if (passed.socket >= 0) {
		r = listen_passed(service->rpc, passed.socket, &address);
		if (r < 0)
			return r;
	}
	if (passed.socket >= 0 && !options->socket)
		return open_files(service, address.sun_path[0] ? address.sun_path : path, &passed);
	/* In this order: who has the identifiers looks at the socket. */
	r = open_files(service, path, &passed);
	if (r >= 0)
		r = listen_at(service, path);
	return r < 0 ? listen_failed(path, r) : 0;
}

static void on_stopped(void *userdata)
{
	struct broker *broker = userdata;

	(void)sd_event_exit(broker->event, 0);
}

static int on_terminate(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	struct service *service = userdata;
	struct broker *broker = service->broker;

	if (broker->stopping) {
		log_warning("Asked again to end: ending at once, with %u pin%s.", broker->n_pins,
			    PLURAL(broker->n_pins));
		return sd_event_exit(broker->event, EX_TEMPFAIL);
	}
	log_notice("Ending: %u pin%s to be let go.", broker->n_pins, PLURAL(broker->n_pins));
	broker_stop(broker, on_stopped, broker);
	notifier_tell_stopping(&service->notifier);
	return 0;
}

/* The next run is to go on with what there is: it stays where it is, in the manager's store. */
static int on_restart(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	struct service *service = userdata;
	struct broker *broker = service->broker;

	if (!service->state)
		return on_terminate(source, si, userdata);
	log_notice("Ending: %u pin%s left to the next run.", broker->n_pins,
		   PLURAL(broker->n_pins));
	service->leaving = true;
	return sd_event_exit(broker->event, 0);
}

static void log_unreadable(const char *path, int error, const char *what_then)
{
	log_errno(LOG_ERR, error, "Cannot read %s%s", path ? path : CONFIG_FILE, what_then);
}

static int on_reload(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	struct service *service = userdata;
	struct config *config;
	int r;

	notifier_tell_reloading(&service->notifier);
	r = config_read(service->config, &config);
	if (r < 0) {
		log_unreadable(service->config, r, ", going on with what was read before");
	} else {
		broker_set_config(service->broker, config);
		log_notice("Read the configuration anew.");
	}
	notifier_tell_ready(&service->notifier);
	return 0;
}

static const struct {
	int signal;
	sd_event_signal_handler_t handler;
} signals[] = {
	{SIGTERM, on_terminate},
	{SIGINT, on_terminate},
	{RESTART_SIGNAL, on_restart},
	{RELOAD_SIGNAL, on_reload},
};

/* From the first moment on: each of them would end a process that does not know them yet. */
static int block_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < ELEMENTS(signals); i++)
		sigaddset(&set, signals[i].signal);
	signal(SIGPIPE, SIG_IGN);
	return sigprocmask(SIG_BLOCK, &set, NULL) < 0 ? -errno : 0;
}

static int add_signals(struct service *service)
{
	int r = 0;

	for (size_t i = 0; i < ELEMENTS(signals) && r >= 0; i++)
		r = sd_event_add_signal(service->broker->event, NULL, signals[i].signal,
			signals[i].handler, service);
	return r;
}

/* Every lease is a descriptor or two. Signals that limits send would end it; a write that fails is
 * logged. */
static void raise_limits(void)
{
	struct rlimit limit;

	signal(SIGXCPU, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN);
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == limit.rlim_max)
		return;
	limit.rlim_cur = limit.rlim_max;
	(void)setrlimit(RLIMIT_NOFILE, &limit);
}

/* For STATUS=. */
static void describe(char *ret, size_t size, void *userdata)
{
	const struct broker *broker = userdata;

	snprintf(ret, size, "%s%u pin%s of %u file%s by %u client%s, %u revocation%s running",
		 broker->stopping ? "Ending: " : "", broker->n_pins, PLURAL(broker->n_pins), broker->n_files,
		 PLURAL(broker->n_files), broker->n_clients, PLURAL(broker->n_clients), broker->n_running,
		 PLURAL(broker->n_running));
}

static int start(struct service *service, const struct options *options)
{
	struct broker *broker = service->broker;
	int r;

	r = add_signals(service);
	if (r >= 0)
		r = rpc_new(broker, &service->rpc);
	if (r >= 0)
		r = notifier_open(&service->notifier, broker->event, describe, broker);
	if (r >= 0)
		r = listen_all(service, options);
	if (r >= 0)
		r = bus_new(broker, options->bus, &broker->bus);
	if (r >= 0 && !search_powers()->kcmp)
		log_warning("kcmp() is refused here, or missing in this kernel: who else has a context can be found out "
			    "for io_urings and sockets only. Pins of other contexts are not taken for gone when "
			    "their holders die, while others that may have them live.");
	if (r >= 0 && geteuid() == 0 && !search_powers()->others)
		log_warning("Other users' processes cannot be looked into (CAP_SYS_PTRACE is missing): pins of holders that "
			    "die are taken for gone only if the kernel's counters show it.");
	if (r >= 0 && geteuid() != 0)
		log_notice("Running as uid %u: serving this user's own files only, and signalling "
			   "and looking into its own processes only.",
			   geteuid());
	return r < 0 ? r : notifier_start(&service->notifier);
}

int main(int argc, char *argv[])
{
	struct options options = {};
	struct config *config = NULL;
	struct service service = { .notifier = NOTIFIER_NULL };
	struct sentinel sentinel;
	sd_event *event = NULL;
	int r, sentinel_error;

	fill_standard_descriptors();
	r = parse_options(argc, argv, &options);
	if (r != 0)
		return r - 1;
	if (block_signals() < 0)
		return EX_OSERR;
	raise_limits();
	watchdog_open(&service.notifier.watchdog);
	/* before there are threads */
	sentinel_error = sentinel_start(&sentinel);
	(void)mallopt(M_ARENA_MAX, 2); /* the threads allocate little: they share one */
	r = log_open(LOG_INFO);
	if (r < 0) {
		log_errno_limit(
			LOG_ERR, r, LOG_RESOURCE_THREAD, "Cannot start the thread that logs");
		return EX_OSERR;
	}
	if (!process_has_own_proc()) {
		log_error("/proc is not there, or is that of another pid namespace: mount that of this one "
			  "(unshare --mount-proc), or run the daemon in that of the whole machine.");
		log_close(1000);
		return EX_OSERR;
	}
	service.config = options.config;
	r = config_read(service.config, &config);
	if (r < 0) {
		log_unreadable(service.config, r, "");
		log_close(1000);
		return EX_CONFIG;
	}
	r = sd_event_new(&event);
	if (r >= 0)
		r = log_attach(event);
	if (r >= 0)
		r = broker_new(event, config, &service.broker);
	if (r >= 0)
		config = NULL; /* the broker's now */
	if (r >= 0)
		r = hearing_add_sentinel(service.broker->hearing, &sentinel, sentinel_error);
	if (r >= 0)
		r = start(&service, &options);
	if (r >= 0)
		r = turn_loop(event);
	else
		log_errno_limit(LOG_ERR, r, LOG_RESOURCE_EVENT, "Cannot start");

	watchdog_close(&service.notifier.watchdog);
	remove_socket(&service);
	if (service.leaving) {
		/* to be freed would be to be let go */
		state_free(service.state, false);
		notifier_stop(&service.notifier);
		log_close(1000);
		_exit(EXIT_SUCCESS);
	}
	if (service.broker) {
		service.rpc = rpc_free(service.rpc);
		service.broker->bus = bus_free(service.broker->bus);
		service.state = state_free(service.state, r >= 0);
		broker_free(service.broker);
	}
	notifier_stop(&service.notifier);
	config_unref(config);
	log_detach();
	sd_event_unref(event);
	log_info("Ended.");
	log_close(1000);
	return r < 0 ? EX_UNAVAILABLE : r;
}
