/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

/*
 * libpinbroker against the real daemon: connections that break under it, a bus that comes back, a
 * broker that forgets, notices that somebody forged, threads and forks (I4, I5).
 */

struct seen {
	unsigned n, n_updates, n_lost;
	uint64_t revocation;
	bool let_go;
};

struct holding {
	pinbroker *pb;
	pinbroker_file *file;
	pinbroker_context *context;
	uint64_t pin;
	int context_fd;
	struct seen seen;
};

static void on_revoke(pinbroker *pb, const struct pinbroker_notice *n, void *userdata)
{
	struct holding *h = userdata;

	assert_string_equal(n->path, file_path);
	assert_true(n->deadline_usec > usec_now());
	h->seen.n++;
	h->seen.n_updates += n->update;
	h->seen.revocation = n->revocation;
	if (n->pid == 0 || h->seen.let_go)
		return;
	assert_int_equal(pinbroker_unpin(pb, n->pins, n->n_pins, NULL, NULL), 0);
	h->seen.let_go = true;
}

static void on_lost(pinbroker *pb, void *userdata)
{
	struct holding *h = userdata;

	h->seen.n_lost++;
}

static void must(pinbroker *pb, int r)
{
	if (r < 0)
		fail_msg("%s", pinbroker_last_error(pb)->message);
}

static void connect_holder(struct holding *h, unsigned channels, bool thread)
{
	assert_int_equal(pinbroker_new("test library", socket_path, &h->pb), 0);
	must(h->pb, pinbroker_set_channels(h->pb, channels));
	must(h->pb, pinbroker_set_bus_address(h->pb, bus_address));
	must(h->pb, pinbroker_set_revoke_callback(h->pb, on_revoke, h));
	must(h->pb, pinbroker_set_lost_callback(h->pb, on_lost, h));
	must(h->pb, pinbroker_set_thread(h->pb, thread));
	must(h->pb, pinbroker_connect(h->pb));
	must(h->pb, pinbroker_open_file(h->pb, file_path, PINBROKER_READ, &h->file));
	h->context_fd = eventfd(0, EFD_CLOEXEC);
	must(h->pb, pinbroker_add_context(h->pb, h->context_fd, "none", &h->context));
}

static void hold(struct holding *h)
{
	const struct pinbroker_range range = {0, SIZE};

	must(h->pb, pinbroker_pin(
			    h->pb, h->file, h->context, &range, 1, PINBROKER_READ, NULL, &h->pin));
	must(h->pb, pinbroker_bind(h->pb, h->pin, 1));
}

static void begin(struct holding *h, unsigned channels)
{
	*h = (struct holding){};
	world_start("");
	mount_fs("tmpfs");
	make_file();
	connect_holder(h, channels, false);
	hold(h);
}

static void let_everything_go(struct holding *h)
{
	must(h->pb, pinbroker_remove_context(h->context));
	must(h->pb, pinbroker_close_file(h->file));
	assert_null(pinbroker_unref(h->pb));
	close(h->context_fd);
}

static int dispatch_once(struct holding *h)
{
	struct pollfd pfd = {.fd = pinbroker_get_fd(h->pb), .events = POLLIN};

	assert_int_equal(poll(&pfd, 1, WAIT_MSEC), 1);
	return pinbroker_dispatch(h->pb);
}

/* A truncate, which the holder hears of once and a second time with who it was, and which it lets
 * through. */
static void see_truncate(struct holding *h)
{
	struct result result;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	while (!h->seen.let_go)
		must(h->pb, dispatch_once(h));
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	/* Who it was may have been known from the start. */
	assert_int_equal(h->seen.n, 1 + h->seen.n_updates);
	assert_in_range(h->seen.n_updates, 0, 1);
}

/* Of this process's own sockets those that lead to the broker. */
static unsigned cut_connections(void)
{
	DIR *d = opendir("/proc/self/fd");
	struct dirent *e;
	unsigned n = 0;

	assert_non_null(d);
	while ((e = readdir(d))) {
		struct sockaddr_un address = {};
		socklen_t size = sizeof(address) - 1;
		int fd = atoi(e->d_name);

		if (getpeername(fd, (struct sockaddr *)&address, &size) < 0 ||
			strcmp(address.sun_path, socket_path) != 0)
			continue;
		assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
		n++;
	}
	closedir(d);
	return n;
}

static void test_cut_connections_are_restored(void **state)
{
	struct holding h;

	begin(&h, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(cut_connections(), 2);
	see_truncate(&h);
	let_everything_go(&h);
	world_stop();
}

static void test_call_restores_its_connection(void **state)
{
	struct holding h;

	begin(&h, 0);
	for (int i = 0; i < 10; i++) {
		assert_int_equal(cut_connections(), 1);
		must(h.pb, pinbroker_bind(h.pb, h.pin, 2));
	}
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	let_everything_go(&h);
	world_stop();
}

static int is_blamed(const struct pinbroker_revocation_info *info, void *userdata)
{
	return info->pid > 0 && info->end_usec == PINBROKER_UNKNOWN;
}

static void test_notices_of_an_outage_come_with_resume(void **state)
{
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	struct result result;
	struct holding h;
	pid_t pid;
	int fd;

	begin(&h, 0);
	pid = truncate_start(&fd);
	while (pinbroker_list_revocations(h.pb, is_blamed, NULL) != 1) {
		assert_true(usec_now() < end);
		poll(NULL, 0, 1);
	}
	assert_int_equal(cut_connections(), 1);
	while (!h.seen.let_go)
		must(h.pb, dispatch_once(&h));
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_int_equal(h.seen.n, 1);
	assert_int_equal(h.seen.n_updates, 0);
	let_everything_go(&h);
	world_stop();
}

static void test_bus_comes_back(void **state)
{
	struct holding h;

	begin(&h, PINBROKER_CHANNEL_BUS);
	finish(bus_pid, SIGKILL);
	start_bus();
	see_truncate(&h);
	let_everything_go(&h);
	world_stop();
}

static void test_bus_joined_late(void **state)
{
	struct holding h = {};

	world_start("");
	mount_fs("tmpfs");
	make_file();
	finish(bus_pid, SIGKILL);
	connect_holder(&h, PINBROKER_CHANNEL_BUS, false);
	hold(&h);
	start_bus();
	see_truncate(&h);
	let_everything_go(&h);
	world_stop();
}

static int find_bus_name(const struct pinbroker_client_info *info, void *userdata)
{
	if (!info->bus_name)
		return 0;
	snprintf(userdata, 64, "%s", info->bus_name);
	return 1;
}

/* Anybody can send a signal to anybody. */
static void test_forged_notice_is_ignored(void **state)
{
	char name[64] = "";
	sd_bus_message *m;
	struct holding h;
	uint64_t client;
	sd_bus *bus;

	begin(&h, PINBROKER_CHANNEL_BUS);
	must(h.pb, pinbroker_get_client(h.pb, &client));
	assert_int_equal(pinbroker_list_clients(h.pb, find_bus_name, name), 1);

	assert_true(sd_bus_new(&bus) >= 0);
	assert_true(sd_bus_set_address(bus, bus_address) >= 0);
	assert_true(sd_bus_set_bus_client(bus, true) >= 0);
	assert_true(sd_bus_start(bus) >= 0);
	assert_true(sd_bus_message_new_signal(
			    bus, &m, "/org/pinbroker1", "org.pinbroker1.Manager", "Revoke") >= 0);
	assert_true(sd_bus_message_append(m, "ttts", (uint64_t)4711, client,
			    pinbroker_file_get_id(h.file), file_path) >= 0);
	assert_true(sd_bus_message_append_array(m, 't', &h.pin, sizeof(h.pin)) >= 0);
	assert_true(sd_bus_message_append(m, "ttsust", (uint64_t)0, (uint64_t)0, "admin", 1,
			    "forger", usec_now() + 1000000) >= 0);
	assert_true(sd_bus_send_to(bus, m, name, NULL) >= 0);
	sd_bus_message_unref(m);
	sd_bus_flush_close_unref(bus);

	/* It comes, and is dropped; the first that is passed on is the truth. */
	assert_int_equal(dispatch_once(&h), 0);
	see_truncate(&h);
	assert_int_not_equal(h.seen.revocation, 4711);
	let_everything_go(&h);
	world_stop();
}

static void start_daemon(void)
{
	char config[128];
	const char *broker[] = {getenv("PINBROKERD"), "--socket", socket_path, "--bus", bus_address,
		"--config", config, NULL};

	snprintf(config, sizeof(config), "%s/conf", dir);
	daemon_pid = start(broker);
	wait_for_socket(socket_path);
}

/* Without its state (the daemon keeps none yet) it knows nothing of the pins. */
static void forget(unsigned channels)
{
	struct holding h;
	int r;

	begin(&h, channels);
	finish(daemon_pid, SIGKILL);
	start_daemon();
	do
		r = dispatch_once(&h);
	while (r >= 0);
	assert_int_equal(r, -ENOTRECOVERABLE);
	assert_int_equal(h.seen.n_lost, 1);
	assert_int_equal(h.seen.n, 0);
	assert_int_equal(pinbroker_bind(h.pb, h.pin, 1), -ENOTRECOVERABLE);
	pinbroker_context_free(h.context);
	pinbroker_file_free(h.file);
	pinbroker_unref(h.pb);
	close(h.context_fd);

	connect_holder(&h, channels, false);
	hold(&h);
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	let_everything_go(&h);
	world_stop();
}

static void test_restarted_broker_watch(void **state)
{
	forget(PINBROKER_CHANNEL_WATCH);
}

static void test_restarted_broker_bus(void **state)
{
	forget(PINBROKER_CHANNEL_BUS);
}

#define THREADS 4
#define ROUNDS  100

struct worker {
	struct holding *h;
	unsigned n_failed;
	pthread_t thread;
};

static int list_in_list(const struct pinbroker_pin_info *info, void *userdata)
{
	pinbroker *pb = userdata;

	/* Calls are allowed in callbacks; here the pin may already be gone, and another's. */
	pinbroker_bind(pb, info->pin, 7);
	return 1;
}

static void *work(void *p)
{
	struct worker *w = p;
	pinbroker *pb = w->h->pb;

	for (unsigned i = 0; i < ROUNDS; i++) {
		const struct pinbroker_range range = {i * PAGE, PAGE};
		uint64_t pin, ended;
		size_t n_ended;
		int r;

		r = pinbroker_pin(
			pb, w->h->file, w->h->context, &range, 1, PINBROKER_READ, NULL, &pin);
		if (r >= 0)
			r = pinbroker_bind(pb, pin, i);
		if (r >= 0)
			r = pinbroker_list_pins(pb, 0, 0, list_in_list, pb);
		if (r >= 0)
			r = pinbroker_unpin(pb, &pin, 1, &ended, &n_ended);
		if (r < 0 || n_ended != 0)
			w->n_failed++;
		/* Each thread has its own last error. */
		if (pinbroker_bind(pb, UINT64_MAX, i) != -EINVAL ||
			pinbroker_last_error(pb)->error != -EINVAL)
			w->n_failed++;
	}
	return NULL;
}

static void test_threads(void **state)
{
	struct worker workers[THREADS] = {};
	struct holding h = {};

	world_start("");
	mount_fs("tmpfs");
	make_file();
	connect_holder(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS, true);
	for (size_t i = 0; i < THREADS; i++) {
		workers[i].h = &h;
		assert_int_equal(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
	}
	for (size_t i = 0; i < THREADS; i++) {
		pthread_join(workers[i].thread, NULL);
		assert_int_equal(workers[i].n_failed, 0);
	}
	let_everything_go(&h);
	world_stop();
}

static void test_own_thread_lets_go(void **state)
{
	struct holding h = {};
	struct result result;
	pid_t pid;
	int fd;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	connect_holder(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS, true);
	hold(&h);
	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	let_everything_go(&h);
	assert_true(h.seen.let_go);
	world_stop();
}

static void test_child_disturbs_nothing(void **state)
{
	struct holding h;
	int status;
	pid_t pid;

	begin(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS);
	pid = fork();
	if (pid == 0) {
		bool ok = pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL) == -ECHILD &&
			  pinbroker_dispatch(h.pb) == -ECHILD &&
			  pinbroker_close_file(h.file) == -ECHILD;

		pinbroker_context_free(h.context);
		pinbroker_file_free(h.file);
		pinbroker_unref(h.pb);
		_exit(ok ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	see_truncate(&h);
	let_everything_go(&h);
	world_stop();
}

static unsigned count_descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	assert_non_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void test_descriptors_are_given_back(void **state)
{
	struct holding h;
	unsigned n = count_descriptors();

	begin(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS);
	assert_int_equal(pinbroker_close_file(h.file), -EBUSY);
	assert_int_equal(pinbroker_remove_context(h.context), -EBUSY);
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	let_everything_go(&h);
	world_stop();
	assert_int_equal(count_descriptors(), n);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_cut_connections_are_restored),
		cmocka_unit_test(test_call_restores_its_connection),
		cmocka_unit_test(test_notices_of_an_outage_come_with_resume),
		cmocka_unit_test(test_bus_comes_back),
		cmocka_unit_test(test_bus_joined_late),
		cmocka_unit_test(test_forged_notice_is_ignored),
		cmocka_unit_test(test_restarted_broker_watch),
		cmocka_unit_test(test_restarted_broker_bus),
		cmocka_unit_test(test_threads),
		cmocka_unit_test(test_own_thread_lets_go),
		cmocka_unit_test(test_child_disturbs_nothing),
		cmocka_unit_test(test_descriptors_are_given_back),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
