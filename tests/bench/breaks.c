/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

/*
 * How long a truncate is blocked while a holder lets go as soon as he is told, by the broker's stream or
 * by D-Bus; against the least that three processes can do: a server with the lease that waits for its
 * signal, sends a message of the same size over the same transport, reads a short answer and gives the
 * lease up; and against one process that gives its own lease up on the signal.
 */

#define NOTICE_SIZE 221 /* of a real one on the stream */
#define ANSWER_SIZE 62  /* of a real Unpin */
#define BURST	    50
#define PAUSE_USEC  100000
#define AIM	    1.5

enum transport {
	NONE, /* the lease's holder lets go by itself */
	STREAM,
	BUS,
};

static char floor_path[96];

static void must(bool condition)
{
	if (!condition)
		abort();
}

static void read_all(int fd, void *buffer, size_t size)
{
	must(recv(fd, buffer, size, MSG_WAITALL) == (ssize_t)size);
}

/* --- who truncates --- */

static void truncater(int fd, void *userdata)
{
	const char *path = userdata;
	char c;

	while (read(fd, &c, 1) == 1) {
		uint64_t begin = nsec_now();

		must(truncate(path, PAGE) == 0);
		begin = nsec_now() - begin;
		must(write(fd, &begin, sizeof(begin)) == sizeof(begin));
	}
}

/* --- the floor: the lease's holder, and the pins' holder --- */

struct floor {
	enum transport transport;
	int notice, answer; /* of the pins' holder */
	char name[64];      /* on the bus */
};

static sd_bus *open_bus(void)
{
	sd_bus *bus;

	must(sd_bus_new(&bus) >= 0);
	must(sd_bus_set_address(bus, bus_address) >= 0);
	must(sd_bus_set_bus_client(bus, true) >= 0);
	must(sd_bus_start(bus) >= 0);
	return bus;
}

static void send_signal(sd_bus *bus, const char *name)
{
	sd_bus_message *m;
	uint64_t pin = 4;

	must(sd_bus_message_new_signal(bus, &m, "/org/pinbroker1", "org.pinbroker1.Manager",
				       "Revoke") >= 0);
	must(sd_bus_message_set_destination(m, name) >= 0);
	must(sd_bus_message_append(m, "ttts", (uint64_t)5, (uint64_t)1, (uint64_t)2, floor_path) >= 0);
	must(sd_bus_message_append_array(m, 't', &pin, sizeof(pin)) >= 0);
	must(sd_bus_message_append(m, "ttsust", (uint64_t)0, (uint64_t)0, "modify", 0, "",
				   (uint64_t)1) >= 0);
	must(sd_bus_send(bus, m, NULL) >= 0);
	must(sd_bus_flush(bus) >= 0);
	sd_bus_message_unref(m);
}

/* Takes the lease for each byte on fd, and answers with one; then gives it up when it is broken. */
static void lease_holder(int fd, void *userdata)
{
	struct floor *floor = userdata;
	char notice[NOTICE_SIZE] = "", answer[ANSWER_SIZE], c;
	sd_bus *bus = floor->transport == BUS ? open_bus() : NULL;
	struct signalfd_siginfo si;
	int file, signals;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	must(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
	signals = signalfd(-1, &set, SFD_CLOEXEC);
	file = open(floor_path, O_RDONLY | O_CLOEXEC);
	must(signals >= 0 && file >= 0);
	while (read(fd, &c, 1) == 1) {
		must(fcntl(file, F_SETSIG, SIGRTMIN) == 0);
		while (fcntl(file, F_SETLEASE, F_RDLCK) < 0)
			must(errno == EAGAIN);
		must(write(fd, &c, 1) == 1);
		must(read(signals, &si, sizeof(si)) == sizeof(si));
		if (floor->transport == STREAM)
			must(write(floor->notice, notice, sizeof(notice)) == sizeof(notice));
		else if (floor->transport == BUS)
			send_signal(bus, floor->name);
		if (floor->transport != NONE)
			read_all(floor->answer, answer, sizeof(answer));
		must(fcntl(file, F_SETLEASE, F_UNLCK) == 0);
	}
}

static int on_signal(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
	char answer[ANSWER_SIZE] = "";

	must(write(*(int *)userdata, answer, sizeof(answer)) == sizeof(answer));
	return 0;
}

static void pin_holder(int fd, void *userdata)
{
	enum transport transport = *(enum transport *)userdata;
	char notice[NOTICE_SIZE], answer[ANSWER_SIZE] = "";
	const char *name;
	sd_bus *bus;

	if (transport == STREAM)
		for (;;) {
			read_all(fd, notice, sizeof(notice));
			must(write(fd, answer, sizeof(answer)) == sizeof(answer));
		}
	bus = open_bus();
	must(sd_bus_match_signal(bus, NULL, NULL, "/org/pinbroker1", "org.pinbroker1.Manager",
				 "Revoke", on_signal, &fd) >= 0);
	must(sd_bus_get_unique_name(bus, &name) >= 0);
	must(write(fd, name, strlen(name) + 1) > 0);
	for (;;)
		if (sd_bus_process(bus, NULL) == 0)
			(void)sd_bus_wait(bus, UINT64_MAX);
}

/* --- ours: the pins' holder --- */

struct holder_state {
	enum transport transport;
	pinbroker_file *file;
	pinbroker_context *context;
	uint64_t pin;
};

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holder_state *h = userdata;

	if (h->pin != 0)
		must(pinbroker_unpin(pb, &h->pin, 1, NULL, NULL) >= 0);
	h->pin = 0;
}

/* Pins for each byte on fd, and answers with one; lets go when it is told. */
static void broker_holder(int fd, void *userdata)
{
	struct holder_state h = { .transport = *(enum transport *)userdata };
	static const struct pinbroker_range range = { 0, PAGE };
	pinbroker *pb;
	char c;

	must(pinbroker_new("bench", socket_path, &pb) == 0);
	must(pinbroker_set_channels(pb, h.transport == BUS ? PINBROKER_CHANNEL_BUS
							   : PINBROKER_CHANNEL_WATCH) == 0);
	must(pinbroker_set_bus_address(pb, bus_address) == 0);
	must(pinbroker_set_revoke_callback(pb, on_revoke, &h) == 0);
	must(pinbroker_connect(pb) == 0);
	must(pinbroker_open_file(pb, file_path, PINBROKER_READ, &h.file) == 0);
	must(pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &h.context) == 0);
	for (;;) {
		struct pollfd fds[] = {
			{ .fd = pinbroker_get_fd(pb), .events = POLLIN },
			{ .fd = fd, .events = POLLIN },
		};

		must(poll(fds, 2, -1) > 0);
		if (fds[0].revents)
			must(pinbroker_dispatch(pb) >= 0);
		if (!fds[1].revents)
			continue;
		if (read(fd, &c, 1) != 1)
			_exit(0);
		while (pinbroker_pin(pb, h.file, h.context, &range, 1, PINBROKER_READ, NULL,
				     &h.pin) < 0)
			;
		must(write(fd, &c, 1) == 1);
	}
}

/* --- rounds --- */

struct side {
	pid_t pids[3];
	int lease, truncater; /* one byte to each, in turn */
};

static void side_start_floor(struct side *side, enum transport transport)
{
	struct floor floor = { .transport = transport, .notice = -1, .answer = -1 };

	*side = (struct side){};
	if (transport != NONE) {
		side->pids[2] = serve(pin_holder, &transport, &floor.notice);
		floor.answer = floor.notice;
	}
	if (transport == BUS)
		assert_true(read(floor.notice, floor.name, sizeof(floor.name)) > 0);
	side->pids[0] = serve(lease_holder, &floor, &side->lease);
	side->pids[1] = serve(truncater, floor_path, &side->truncater);
	close(floor.notice);
}

static void side_start(struct side *side, enum transport transport)
{
	*side = (struct side){};
	side->pids[0] = serve(broker_holder, &transport, &side->lease);
	side->pids[1] = serve(truncater, file_path, &side->truncater);
}

static void side_stop(struct side *side)
{
	close(side->lease);
	close(side->truncater);
	for (size_t i = 0; i < ELEMENTS(side->pids); i++)
		if (side->pids[i] > 0)
			finish(side->pids[i], SIGKILL);
}

/* The time that a truncate is blocked, in µs: the median of n. */
static double blocked(struct side *side, unsigned n, unsigned pause_usec)
{
	struct series usec = {};

	for (unsigned i = 0; i < n; i++) {
		uint64_t nsec;
		char c = 0;

		assert_int_equal(write(side->lease, &c, 1), 1);
		assert_int_equal(read(side->lease, &c, 1), 1);
		if (pause_usec > 0)
			usleep(pause_usec);
		assert_int_equal(write(side->truncater, &c, 1), 1);
		assert_int_equal(read(side->truncater, &nsec, sizeof(nsec)), sizeof(nsec));
		series_add(&usec, (double)nsec / 1e3);
	}
	return series_median(&usec);
}

static void bench(const char *name, enum transport transport, bool apart)
{
	struct series usec = {}, floor = {}, alone = {};
	unsigned n = apart ? 1 : BURST, pause = apart ? PAUSE_USEC : 0;
	struct side ours, least, in_process;
	char floor_name[64], alone_name[64];

	side_start(&ours, transport);
	side_start_floor(&least, transport);
	for (unsigned round = 0; round < n_rounds; round++) {
		series_add(&floor, blocked(&least, n, pause));
		series_add(&usec, blocked(&ours, n, pause));
	}
	side_stop(&least);
	side_stop(&ours);
	side_start_floor(&in_process, NONE);
	for (unsigned round = 0; round < n_rounds; round++)
		series_add(&alone, blocked(&in_process, n, pause));
	side_stop(&in_process);
	snprintf(floor_name, sizeof(floor_name), "%s-floor", name);
	snprintf(alone_name, sizeof(alone_name), "%s-in-process", name);
	report_against(name, &usec, floor_name, &floor, AIM);
	report(alone_name, series_median(&alone), "us");
}

int main(int argc, char *argv[])
{
	bench_start(argc, argv, 61);
	world_start("");
	mount_fs("tmpfs");
	make_file();
	snprintf(floor_path, sizeof(floor_path), "%s/mnt/floor", dir);
	run("cp %s %s", file_path, floor_path);
	bench("blocked-stream", STREAM, false);
	bench("blocked-stream-100ms-apart", STREAM, true);
	bench("blocked-bus", BUS, false);
	bench("blocked-bus-100ms-apart", BUS, true);
	world_stop();
	return 0;
}
