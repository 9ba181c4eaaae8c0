/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "holding.h"

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

	holding_begin(&h, PINBROKER_CHANNEL_WATCH);
	assert_int_equal(cut_connections(), 2);
	holding_see_truncate(&h);
	holding_end(&h);
	world_stop();
}

static void test_call_restores_its_connection(void **state)
{
	struct holding h;

	holding_begin(&h, 0);
	for (int i = 0; i < 10; i++) {
		assert_int_equal(cut_connections(), 1);
		must(h.pb, pinbroker_bind(h.pb, h.pin, 2));
	}
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	holding_end(&h);
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

	holding_begin(&h, 0);
	pid = truncate_start(&fd);
	while (pinbroker_list_revocations(h.pb, is_blamed, NULL) != 1) {
		assert_true(usec_now() < end);
		poll(NULL, 0, 1);
	}
	assert_int_equal(cut_connections(), 1);
	while (!h.seen.let_go)
		must(h.pb, holding_dispatch(&h));
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_int_equal(h.seen.n, 1);
	assert_int_equal(h.seen.n_updates, 0);
	holding_end(&h);
	world_stop();
}

static void test_bus_comes_back(void **state)
{
	struct holding h;

	holding_begin(&h, PINBROKER_CHANNEL_BUS);
	finish(bus_pid, SIGKILL);
	start_bus();
	holding_see_truncate(&h);
	holding_end(&h);
	world_stop();
}

static void test_bus_joined_late(void **state)
{
	struct holding h = {};

	world_start("");
	mount_fs("tmpfs");
	make_file();
	finish(bus_pid, SIGKILL);
	holding_connect(&h, PINBROKER_CHANNEL_BUS, false);
	holding_pin(&h);
	start_bus();
	holding_see_truncate(&h);
	holding_end(&h);
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

	holding_begin(&h, PINBROKER_CHANNEL_BUS);
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
	assert_int_equal(holding_dispatch(&h), 0);
	holding_see_truncate(&h);
	assert_int_not_equal(h.seen.revocation, 4711);
	holding_end(&h);
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

	holding_begin(&h, channels);
	finish(daemon_pid, SIGKILL);
	start_daemon();
	do
		r = holding_dispatch(&h);
	while (r >= 0);
	assert_int_equal(r, -ENOTRECOVERABLE);
	assert_int_equal(h.seen.n_lost, 1);
	assert_int_equal(h.seen.n, 0);
	assert_int_equal(pinbroker_bind(h.pb, h.pin, 1), -ENOTRECOVERABLE);
	pinbroker_context_free(h.context);
	pinbroker_file_free(h.file);
	pinbroker_unref(h.pb);
	close(h.context_fd);

	holding_connect(&h, channels, false);
	holding_pin(&h);
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	holding_end(&h);
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

static void test_descriptors_are_given_back(void **state)
{
	struct holding h;
	unsigned n = count_descriptors();

	holding_begin(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS);
	assert_int_equal(pinbroker_close_file(h.file), -EBUSY);
	assert_int_equal(pinbroker_remove_context(h.context), -EBUSY);
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	holding_end(&h);
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
		cmocka_unit_test(test_descriptors_are_given_back),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
