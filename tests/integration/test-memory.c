/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "refuse-memory.h"

/*
 * The daemon is refused memory at one place after the other: whoever asked is told or hung up on, nothing
 * is left behind, and a lease under which pins are alive goes no earlier than they do (I2).
 */

#define BURST 20 /* the next so many allocations are refused, too */

static struct refusing *refusing;
static char scratch[] = "/tmp/pinbroker-memory-XXXXXX";

static int start_refusing(void **state)
{
	char path[64], daemon[64];
	FILE *f;
	int fd;

	assert_non_null(mkdtemp(scratch));
	snprintf(path, sizeof(path), "%s/shared", scratch);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_int_equal(ftruncate(fd, sizeof(*refusing)), 0);
	refusing = mmap(NULL, sizeof(*refusing), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_ptr_not_equal(refusing, MAP_FAILED);
	close(fd);

	snprintf(daemon, sizeof(daemon), "%s/daemon", scratch);
	f = fopen(daemon, "we");
	assert_non_null(f);
	fprintf(f, "#!/bin/sh\nexport LD_PRELOAD=%s PINBROKER_TEST_MEMORY=%s\nexec %s \"$@\"\n",
		getenv("PINBROKER_REFUSE_MEMORY"), path, getenv("PINBROKERD"));
	fclose(f);
	assert_int_equal(chmod(daemon, 0700), 0);
	setenv("PINBROKERD", daemon, 1);
	return 0;
}

static int stop_refusing(void **state)
{
	run("rm -rf %s", scratch);
	return 0;
}

static void refuse(long after, long n)
{
	atomic_store(&refusing->n_asked, 0);
	atomic_store(&refusing->after, after);
	atomic_store(&refusing->n, n);
	atomic_store(&refusing->on, true);
}

/* Returns whether anything had been refused. */
static bool grant(void)
{
	atomic_store(&refusing->on, false);
	return atomic_load(&refusing->n_asked) > atomic_load(&refusing->after);
}

/* Everything that a holder does, as far as he comes. */
static void use_broker(void)
{
	static const struct pinbroker_range ranges[] = { { 0, PAGE }, { 2 * PAGE, PAGE } };
	int fd = eventfd(0, EFD_CLOEXEC);
	pinbroker_context *context;
	pinbroker_file *file;
	uint64_t pins[2];
	pinbroker *pb;

	if (pinbroker_new("test memory", socket_path, &pb) < 0 ||
	    pinbroker_set_channels(pb, PINBROKER_CHANNEL_WATCH) < 0 || pinbroker_connect(pb) < 0)
		return;
	if (pinbroker_open_file(pb, file_path, PINBROKER_READ, &file) < 0 ||
	    pinbroker_add_context(pb, fd, "context", &context) < 0 ||
	    pinbroker_pin(pb, file, context, ranges, 2, PINBROKER_READ, "label", pins) < 0)
		return;
	(void)pinbroker_bind(pb, pins[0], 1);
	(void)pinbroker_unpin(pb, pins, 2, NULL, NULL);
	pinbroker_context_free(context);
	pinbroker_file_free(file);
	pinbroker_unref(pb);
}

static int count_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static int count_client(const struct pinbroker_client_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

static void expect_nothing_left(void)
{
	uint64_t end = usec_now() + WAIT_MSEC * 1000;
	unsigned n = 1;
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	while (n > 0 && usec_now() < end) {
		n = 0;
		assert_int_equal(pinbroker_list_pins(pb, 0, 0, count_pin, &n), 0);
		assert_int_equal(pinbroker_list_clients(pb, count_client, &n), 0);
	}
	assert_int_equal(n, 0);
	pinbroker_unref(pb);
}

/* Memory is refused at every place, or at every few. */
static unsigned refuse_calls(long n, unsigned stride)
{
	unsigned i;

	for (i = 0;; i += stride) {
		int status;
		pid_t pid;

		refuse(i, n);
		pid = fork();
		assert_true(pid >= 0);
		if (pid == 0) {
			use_broker();
			_exit(0);
		}
		status = finish(pid, 0);
		assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
		if (!grant())
			break;
		if (i % 16 == 0)
			expect_nothing_left();
	}
	expect_nothing_left();
	return i;
}

static void test_calls(void **state)
{
	unsigned one, burst;

	world_start("");
	mount_fs("tmpfs");
	make_file();
	one = refuse_calls(1, 1);
	burst = refuse_calls(BURST, BURST / 2);
	print_message("refused at %u places, and at %u for longer\n", one, burst);
	assert_in_range(one, 50, 100000);
	world_stop();
}

static int see_outcome(const struct pinbroker_revocation_info *info, void *userdata)
{
	*(struct pinbroker_revocation_info *)userdata = *info;
	return 0;
}

/* A truncate while memory is refused: the pins end before the lease. */
static bool break_once(long after, long n)
{
	struct holder holder = holder_start(&(struct holder_options){ .opaque = true });
	struct result result;
	struct pinbroker_revocation_info last = {};
	int truncate_fd;
	uint64_t begin;
	pinbroker *pb;
	bool refused;
	pid_t pid;

	holder_expect(&holder, "holding ");
	begin = usec_now();
	refuse(after, n);
	pid = truncate_start(&truncate_fd);
	result = truncate_finish(pid, truncate_fd);
	refused = grant();
	assert_int_equal(result.error, 0);
	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_int_equal(pinbroker_list_revocations(pb, see_outcome, &last), 0);
	pinbroker_unref(pb);
	if (last.state != PINBROKER_REVOCATION_RELEASED || last.start_usec < begin)
		fail_msg("refused %ld after %ld: %lu pins remain, %s", n, after, last.n_remaining,
			 pinbroker_revocation_state_name(last.state));
	holder_stop(&holder, SIGKILL);
	assert_int_equal(truncate(file_path, SIZE), 0);
	return refused;
}

static void refuse_breaks(long n, unsigned stride)
{
	for (unsigned i = 0; break_once(i, n); i += stride)
		expect_nothing_left();
	expect_nothing_left();
}

static void test_breaks(void **state)
{
	world_start("[Revocation]\nRevokeGraceSec=200ms\nSignalOnTimeout=none\n");
	mount_fs("tmpfs");
	make_file();
	refuse_breaks(1, 1);
	refuse_breaks(BURST, BURST / 4);
	world_stop();
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_calls),
		cmocka_unit_test(test_breaks),
	};

	return cmocka_run_group_tests(tests, start_refusing, stop_refusing);
}
