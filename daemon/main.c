/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <getopt.h>
#include <limits.h>
#include <signal.h>
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

#include "broker.h"
#include "bus.h"
#include "log.h"
#include "macro.h"
#include "rpc.h"

#define SOCKET_PATH "/run/pinbroker/org.pinbroker"

struct options {
	const char *bus;    /* NULL: the system bus */
	const char *socket; /* NULL: what systemd passed, else SOCKET_PATH */
	const char *config;
};

static void help(FILE *f)
{
	fputs("pinbrokerd [OPTIONS…]\n\n"
	      "Broker long-term pins of file pages and their revocation.\n\n"
	      "     --bus=ADDRESS   D-Bus address, in place of the system bus\n"
	      "     --socket=PATH   socket to listen on, in place of " SOCKET_PATH "\n"
	      "     --config=FILE   configuration, in place of " CONFIG_FILE "\n"
	      "  -h --help          show this help\n"
	      "     --version       show the version\n\n"
	      "See pinbrokerd(8).\n",
	      f);
}

/* Returns 0 to go on, or an exit status plus 1. */
static int parse_options(int argc, char *argv[], struct options *ret)
{
	static const struct option options[] = {
		{ "bus", required_argument, NULL, 'b' },
		{ "socket", required_argument, NULL, 's' },
		{ "config", required_argument, NULL, 'c' },
		{ "help", no_argument, NULL, 'h' },
		{ "version", no_argument, NULL, 'v' },
		{},
	};
	int c;

	while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0)
		switch (c) {
		case 'b':
			ret->bus = optarg;
			break;
		case 's':
			ret->socket = optarg;
			break;
		case 'c':
			ret->config = optarg;
			break;
		case 'h':
			help(stdout);
			return EXIT_SUCCESS + 1;
		case 'v':
			puts("pinbrokerd " PINBROKER_VERSION);
			return EXIT_SUCCESS + 1;
		default:
			help(stderr);
			return EX_USAGE + 1;
		}
	if (optind < argc) {
		fprintf(stderr, "pinbrokerd: unexpected argument: %s\n", argv[optind]);
		help(stderr);
		return EX_USAGE + 1;
	}
	return 0;
}

/* A socket that nobody listens on any more may be replaced, one in use may not. */
static int remove_stale(const struct sockaddr_un *address)
{
	_cleanup_(close_fdp) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) >= 0)
		return -EADDRINUSE;
	if (errno != ECONNREFUSED)
		return errno == ENOENT ? 0 : -errno;
	return unlink(address->sun_path) < 0 ? -errno : 0;
}

static int listen_at(struct rpc *rpc, const char *path)
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
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
	    chmod(path, 0666) < 0 || listen(fd, SOMAXCONN) < 0)
		return -errno;
	r = rpc_listen(rpc, fd);
	if (r < 0)
		return r;
	TAKE_FD(fd);
	return 0;
}

/* Beside the socket, which lies on a file system that a reboot clears. */
static void open_ids(struct broker *broker, const char *socket)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s.ids", socket);
	ids_open(&broker->ids, path);
}

static int listen_all(struct rpc *rpc, const struct options *options)
{
	const char *path = options->socket ? options->socket : SOCKET_PATH;
	int n, r;

	n = sd_listen_fds(true);
	if (n < 0)
		return log_errno(LOG_ERR, n, "Cannot take the sockets that were passed");
	for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + n; fd++) {
		r = sd_is_socket_unix(fd, SOCK_STREAM, 1, NULL, 0);
		if (r == 0)
			r = -ENOTSOCK;
		if (r > 0)
			r = rpc_listen(rpc, fd);
		if (r < 0)
			return log_errno(LOG_ERR, r, "Cannot listen on passed socket %d", fd);
	}
	if (n > 0 && !options->socket)
		return 0;
	r = listen_at(rpc, path);
	return r < 0 ? log_errno(LOG_ERR, r, "Cannot listen on %s", path) : 0;
}

static void on_stopped(void *userdata)
{
	struct broker *broker = userdata;

	(void)sd_event_exit(broker->event, 0);
}

static int on_terminate(sd_event_source *source, const struct signalfd_siginfo *si, void *userdata)
{
	struct broker *broker = userdata;

	if (broker->stopping) {
		log_warning("Asked again to end: ending at once, with %u pins.", broker->n_pins);
		return sd_event_exit(broker->event, EX_TEMPFAIL);
	}
	log_notice("Ending: %u pins are to be let go.", broker->n_pins);
	broker_stop(broker, on_stopped, broker);
	return 0;
}

struct notify_job {
	struct job job;
	char state[128];
};

/* The manager may be slow to read its socket. */
static void notify_run(struct job *job)
{
	(void)sd_notify(false, container_of(job, struct notify_job, job)->state);
}

static void notify_done(struct job *job)
{
	free(container_of(job, struct notify_job, job));
}

static void notify(struct broker *broker, const char *state)
{
	struct notify_job *j = calloc(1, sizeof(*j));

	if (!j)
		return;
	j->job.run = notify_run;
	j->job.done = notify_done;
	snprintf(j->state, sizeof(j->state), "%s", state);
	offload_submit_force(broker->offload, NULL, &j->job);
}

static int on_watchdog(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct broker *broker = userdata;
	uint64_t interval = 0;
	char state[128];
	int r;

	snprintf(state, sizeof(state), "WATCHDOG=1\nSTATUS=%u pins of %u files by %u clients, %u revocations running",
		 broker->n_pins, broker->n_files, broker->n_clients, broker->n_running);
	notify(broker, state);
	if (sd_watchdog_enabled(false, &interval) <= 0)
		interval = 20 * USEC_PER_SEC;
	r = sd_event_source_set_time(source, now_usec() + interval / 2);
	return r < 0 ? r : sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
}

static int run(struct broker *broker)
{
	sd_event_source *watchdog = NULL;
	int r = 0;

	if (getenv("NOTIFY_SOCKET")) {
		r = sd_event_add_time(broker->event, &watchdog, CLOCK_MONOTONIC, now_usec(), 0,
				      on_watchdog, broker);
		notify(broker, "READY=1");
	}
	if (r >= 0)
		r = sd_event_loop(broker->event);
	sd_event_source_disable_unref(watchdog);
	return r;
}

static int add_signals(struct broker *broker)
{
	sigset_t set;
	int r;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	if (sigprocmask(SIG_BLOCK, &set, NULL) < 0)
		return -errno;
	signal(SIGPIPE, SIG_IGN);
	r = sd_event_add_signal(broker->event, NULL, SIGTERM, on_terminate, broker);
	return r < 0 ? r : sd_event_add_signal(broker->event, NULL, SIGINT, on_terminate, broker);
}

/* Every lease is a descriptor or two, and a queued signal. */
static void raise_limits(void)
{
	struct rlimit limit;

	for (size_t i = 0; i < 2; i++) {
		int resource = i == 0 ? RLIMIT_NOFILE : RLIMIT_SIGPENDING;

		if (getrlimit(resource, &limit) < 0 || limit.rlim_cur == limit.rlim_max)
			continue;
		if (resource == RLIMIT_SIGPENDING)
			continue; /* whoever lowered it meant it */
		limit.rlim_cur = limit.rlim_max;
		(void)setrlimit(resource, &limit);
	}
}

static int start(struct broker *broker, const struct options *options)
{
	int r;

	open_ids(broker, options->socket ? options->socket : SOCKET_PATH);
	r = add_signals(broker);
	if (r >= 0)
		r = rpc_new(broker, &broker->rpc);
	if (r >= 0)
		r = listen_all(broker->rpc, options);
	if (r >= 0)
		r = bus_new(broker, options->bus, &broker->bus);
	if (geteuid() != 0)
		log_notice("Running as uid %u: serving this user's own files only, and signalling "
			   "and looking into its own processes only.",
			   geteuid());
	return r;
}

int main(int argc, char *argv[])
{
	struct options options = {};
	struct config config = {};
	struct broker *broker = NULL;
	sd_event *event = NULL;
	int r;

	r = parse_options(argc, argv, &options);
	if (r != 0)
		return r - 1;
	raise_limits();
	r = log_open(LOG_INFO);
	if (r < 0) {
		fprintf(stderr, "pinbrokerd: Cannot start logging: %s\n", strerror(-r));
		return EX_OSERR;
	}
	r = config_load(options.config, &config);
	if (r < 0) {
		log_close(1000);
		return EX_CONFIG;
	}
	r = sd_event_new(&event);
	if (r >= 0)
		r = log_attach(event);
	if (r >= 0)
		r = broker_new(event, &config, &broker);
	if (r >= 0)
		r = start(broker, &options);
	if (r >= 0)
		r = run(broker);
	else
		log_errno(LOG_ERR, r, "Cannot start");

	if (broker) {
		broker->rpc = rpc_free(broker->rpc);
		broker->bus = bus_free(broker->bus);
		broker_free(broker);
	}
	config_clear(&config);
	log_detach();
	sd_event_unref(event);
	if (getenv("NOTIFY_SOCKET"))
		(void)sd_notify(false, "STOPPING=1");
	log_info("Ended.");
	log_close(1000);
	return r < 0 ? EX_UNAVAILABLE : r;
}
