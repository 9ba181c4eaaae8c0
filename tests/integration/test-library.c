/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "holding.h"

#include <dirent.h>
#include <errno.h>
#include <linux/sockios.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

/*
 * libpinbroker against the real daemon: connections that break under it, a bus that comes back, a
 * broker that forgets, notices that somebody forged, and what notices say (I4, I5).
 */

static bool is_cut(int fd)
{
	struct pollfd pfd = {.fd = fd, .events = POLLRDHUP};

	return poll(&pfd, 1, 0) > 0;
}

/* Of this process's own sockets those that lead to the broker: how many there are, or were. */
static unsigned count_connections(bool cut)
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
			strcmp(address.sun_path, socket_path) != 0 || is_cut(fd))
			continue;
		if (cut)
			assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
		n++;
	}
	closedir(d);
	return n;
}

static unsigned cut_connections(void)
{
	return count_connections(true);
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

/* Restarts in quick succession: that it broke before is no reason to let the holder wait for its
 * notice. */
static void test_watch_comes_back_with_the_requests(void **state)
{
	struct holding h;
	uint64_t begin;

	holding_begin(&h, PINBROKER_CHANNEL_WATCH);
	begin = usec_now();
	for (int i = 0; i < 8; i++) {
		assert_int_equal(cut_connections(), 2);
		while (count_connections(false) < 2)
			must(h.pb, holding_dispatch(&h));
	}
	assert_true(usec_now() - begin < 1000000 * slowness());
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
	holding_drop(&h);

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

/* ---- A call under way when the connection breaks ---- */

static int find_broker_socket(void)
{
	DIR *d = opendir("/proc/self/fd");
	struct dirent *e;
	int found = -1;

	assert_non_null(d);
	while ((e = readdir(d))) {
		struct sockaddr_un address = {};
		socklen_t size = sizeof(address) - 1;
		int fd = atoi(e->d_name);

		if (getpeername(fd, (struct sockaddr *)&address, &size) == 0 &&
			strcmp(address.sun_path, socket_path) == 0)
			found = fd;
	}
	closedir(d);
	assert_true(found >= 0);
	return found;
}

struct call {
	struct holding *h;
	uint64_t pin;
	int r, error;
};

static void *pin_again(void *p)
{
	const struct pinbroker_range range = {0, PAGE};
	struct call *c = p;

	c->r = pinbroker_pin(
		c->h->pb, c->h->file, c->h->context, &range, 1, PINBROKER_READ, NULL, &c->pin);
	c->error = pinbroker_last_error(c->h->pb)->error;
	return NULL;
}

struct pin_list {
	uint64_t pins[8];
	size_t n;
};

static int add_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	struct pin_list *list = userdata;

	assert_true(list->n < 8);
	list->pins[list->n++] = info->pin;
	return 0;
}

/* The broker has got the request, and does it, but the answer finds nobody: it is not claimed that
 * nothing was done, and the list tells the truth. */
static void test_outcome_of_a_call_that_was_cut_off(void **state)
{
	struct call call = {.r = 1};
	struct pin_list list = {};
	struct holding h;
	pthread_t thread;
	uint64_t client;
	int fd, unread = 0;

	holding_begin(&h, 0);
	call.h = &h;
	fd = find_broker_socket();
	assert_int_equal(kill(daemon_pid, SIGSTOP), 0);
	assert_int_equal(pthread_create(&thread, NULL, pin_again, &call), 0);
	while (unread == 0)
		assert_int_equal(ioctl(fd, SIOCOUTQ, &unread), 0);
	assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
	assert_int_equal(kill(daemon_pid, SIGCONT), 0);
	pthread_join(thread, NULL);
	assert_int_equal(call.r, -ECONNRESET);
	assert_int_equal(call.error, -ECONNRESET);

	must(h.pb, pinbroker_get_client(h.pb, &client));
	must(h.pb, pinbroker_list_pins(h.pb, 0, client, add_pin, &list));
	assert_int_equal(list.n, 2);
	must(h.pb, pinbroker_unpin(h.pb, list.pins, list.n, NULL, NULL));
	holding_end(&h);
	world_stop();
}

/* A broker that has nothing to protect need not remember who it was for. */
static void test_client_without_pins_is_forgotten(void **state)
{
	struct holding h;

	holding_begin(&h, 0);
	must(h.pb, pinbroker_unpin(h.pb, &h.pin, 1, NULL, NULL));
	assert_int_equal(cut_connections(), 1);
	assert_int_equal(pinbroker_close_file(h.file), -ENOTRECOVERABLE);
	assert_int_equal(holding_dispatch(&h), -ENOTRECOVERABLE);
	assert_int_equal(h.seen.n_lost, 1);
	holding_drop(&h);
	world_stop();
}

/* ---- What a notice says ---- */

#define EXTENSION_USEC 1500000

static void check_notice(struct holding *h, const struct pinbroker_notice *n)
{
	uint64_t client, deadline;

	must(h->pb, pinbroker_get_client(h->pb, &client));
	assert_int_equal(n->client, client);
	assert_int_equal(n->file, pinbroker_file_get_id(h->file));
	assert_int_equal(n->n_pins, 1);
	assert_int_equal(n->pins[0], h->pin);
	assert_int_equal(n->length, 0);
	assert_null(n->reason);
	assert_true(
		n->deadline_usec <= usec_now() + 10000000 + (h->seen.n > 1 ? EXTENSION_USEC : 0));
	if (n->pid == 0) {
		assert_int_equal(n->cause, PINBROKER_CAUSE_MODIFY);
		assert_int_equal(n->offset, 0);
		assert_int_equal(n->size, PINBROKER_UNKNOWN);
		assert_int_equal(n->uid, PINBROKER_NO_UID);
		assert_null(n->comm);
	} else {
		assert_int_equal(n->cause, PINBROKER_CAUSE_TRUNCATE);
		assert_int_equal(n->offset, PAGE);
		assert_int_equal(n->size, PAGE);
		assert_int_equal(n->uid, getuid());
		assert_string_equal(n->comm, "truncater");
	}
	if (h->seen.n > 1)
		return;
	/* There and then more time can be asked for. */
	must(h->pb, pinbroker_extend(h->pb, n->revocation, EXTENSION_USEC, &deadline));
	assert_int_equal(deadline, n->deadline_usec + EXTENSION_USEC);
	assert_int_equal(pinbroker_extend(h->pb, n->revocation + 1000, 1, NULL), -ENOENT);
}

static void test_notice_says_everything(void **state)
{
	struct holding h;

	holding_begin(&h, PINBROKER_CHANNEL_WATCH);
	h.on_notice = check_notice;
	holding_see_truncate(&h);
	holding_end(&h);
	world_stop();
}

static void check_reason(struct holding *h, const struct pinbroker_notice *n)
{
	assert_int_equal(n->cause, PINBROKER_CAUSE_ADMIN);
	assert_int_equal(n->pins[0], h->pin);
	if (!n->reason)
		return;
	assert_string_equal(n->reason, "umount soon");
	must(h->pb, pinbroker_unpin(h->pb, n->pins, n->n_pins, NULL, NULL));
	h->seen.let_go = true;
}

/* The bus does not tell the reason: whichever channel is first, it comes. */
static void test_reason_comes_by_either_channel(void **state)
{
	struct holding h;

	holding_begin(&h, PINBROKER_CHANNEL_WATCH | PINBROKER_CHANNEL_BUS);
	h.on_notice = check_reason;
	run("busctl --address %s call org.pinbroker1 /org/pinbroker1 org.pinbroker1.Manager "
	    "RevokePins atst 1 %lu 'umount soon' 5000000 >/dev/null",
		bus_address, h.pin);
	while (!h.seen.let_go)
		must(h.pb, holding_dispatch(&h));
	holding_end(&h);
	world_stop();
}

static void expect_on_loop_device(
	enum pinbroker_backing backing, const char *device, const char *namespace, uint64_t node)
{
	assert_int_equal(backing, PINBROKER_BACKING_PAGE_CACHE);
	assert_string_equal(pinbroker_backing_name(backing), "pageCache");
	assert_non_null(device);
	assert_memory_equal(device, "loop", 4);
	assert_null(namespace);
	assert_true(node == PINBROKER_UNKNOWN);
}

static void test_backing_is_told(void **state)
{
	const struct pinbroker_file_info *info;
	struct pinbroker_preflight_info *flight;
	struct holding h = {};

	world_start("");
	mount_fs("ext4");
	make_file();
	holding_connect(&h, 0, false);
	info = pinbroker_file_get_info(h.file);
	expect_on_loop_device(
		info->backing, info->device_name, info->nvdimm_namespace, info->numa_node);
	assert_null(info->nvdimm_region);
	for (int access = PINBROKER_READ; access <= PINBROKER_WRITE; access++) {
		must(h.pb, pinbroker_preflight(h.pb, pinbroker_file_get_fd(h.file),
				   (enum pinbroker_access)access, &flight));
		assert_true(flight->has_backing);
		expect_on_loop_device(flight->backing, flight->device_name,
			flight->nvdimm_namespace, flight->numa_node);
		assert_string_equal(pinbroker_pinnable_name(flight->pinnable),
			access == PINBROKER_READ ? "yes" : "unknown");
		assert_int_equal(flight->pin_reason != NULL, access == PINBROKER_WRITE);
		pinbroker_preflight_free(flight);
	}
	holding_end(&h);
	world_stop();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_cut_connections_are_restored),
		cmocka_unit_test(test_watch_comes_back_with_the_requests),
		cmocka_unit_test(test_call_restores_its_connection),
		cmocka_unit_test(test_notices_of_an_outage_come_with_resume),
		cmocka_unit_test(test_bus_comes_back),
		cmocka_unit_test(test_bus_joined_late),
		cmocka_unit_test(test_forged_notice_is_ignored),
		cmocka_unit_test(test_restarted_broker_watch),
		cmocka_unit_test(test_restarted_broker_bus),
		cmocka_unit_test(test_outcome_of_a_call_that_was_cut_off),
		cmocka_unit_test(test_client_without_pins_is_forgotten),
		cmocka_unit_test(test_notice_says_everything),
		cmocka_unit_test(test_reason_comes_by_either_channel),
		cmocka_unit_test(test_descriptors_are_given_back),
		cmocka_unit_test(test_backing_is_told),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
