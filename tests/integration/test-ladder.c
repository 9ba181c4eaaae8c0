/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <fcntl.h>
#include <liburing.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * A holder that does not let go (I2, I3, I8): forced detach, the signal, SIGKILL, each only where the
 * one before did not help, each at its time.
 */

#define GRACE_MSEC  (500 * slowness())
#define SIGNAL_MSEC 300

/* How much later than its time a step may come: before the next one would, on a machine that has more to do. */
#define LATE_MSEC (250 * slowness())
#define XDP_FREE_MSEC 250

struct end {
	enum pinbroker_revocation_state state;
	enum pinbroker_proof proof;
	bool has_proof;
	unsigned n;
};

static int on_revocation(const struct pinbroker_revocation_info *info, void *userdata)
{
	struct end *end = userdata;

	end->state = info->state;
	end->has_proof = info->has_proof;
	end->proof = info->proof;
	end->n++;
	return 0;
}

/* The one revocation that there was. */
static struct end find_end(void)
{
	struct end end = {};
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	assert_true(pinbroker_list_revocations(pb, on_revocation, &end) >= 0);
	pinbroker_unref(pb);
	assert_int_equal(end.n, 1);
	return end;
}

/* The truncate goes through after `msec`, and not much later, with the pages let go, by this proof. */
static void truncate_and_wait_late(long base, unsigned msec, unsigned late_msec, enum pinbroker_proof proof)
{
	struct result result;
	struct end end;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, msec - 5, msec + late_msec);
	expect_pinned(result.pinned, base, 0);
	end = find_end();
	assert_int_equal(end.state, PINBROKER_REVOCATION_RELEASED);
	assert_true(end.has_proof);
	assert_int_equal(end.proof, proof);
}

static void truncate_and_wait(long base, unsigned msec, enum pinbroker_proof proof)
{
	unsigned kept = proof == PINBROKER_PROOF_CLAIMED ? kept_msec() : 0;

	truncate_and_wait_late(base, msec, LATE_MSEC + kept, proof);
}

static long begin(const struct holder_options *options, struct holder *ret)
{
	char config[256];
	long base;

	snprintf(config, sizeof(config),
		 "[Revocation]\nRevokeGraceSec=%ums\nSignalGraceSec=%ums\n"
		 "[Files]\nReaders=admit\n",
		 GRACE_MSEC, SIGNAL_MSEC);
	world_start(config);
	mount_fs("tmpfs");
	make_file();
	base = pinned();
	*ret = holder_start(options);
	holder_expect(ret, "holding ");
	expect_pinned(pinned(), base, options->opaque ? 0 : PAGES);
	return base;
}

static void expect_signal(int status, int sig)
{
	assert_true(WIFSIGNALED(status));
	assert_int_equal(WTERMSIG(status), sig);
}

static void test_detach(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);
	char buffer[PAGE];
	int fd, status;

	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	/* the holder lives on, and the file is whole as far as it goes */
	assert_int_equal(kill(holder.pid, 0), 0);
	fd = open(file_path, O_RDONLY | O_CLOEXEC);
	assert_int_equal(read(fd, buffer, sizeof(buffer)), sizeof(buffer));
	assert_int_equal(read(fd, buffer + 1, 1), 0);
	for (size_t i = 0; i < sizeof(buffer); i++)
		assert_int_equal(buffer[i], 'a');
	close(fd);
	status = holder_stop(&holder, 0);
	assert_true(WIFEXITED(status));
	world_stop();
}

/* A stopped holder stays stopped: it is let go all the same. */
static void test_stopped(void **state)
{
	const struct holder_options options = {};
	struct holder holder;
	long base = begin(&options, &holder);
	int status;

	assert_int_equal(kill(holder.pid, SIGSTOP), 0);
	assert_int_equal(waitpid(holder.pid, &status, WUNTRACED), holder.pid);
	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	assert_int_equal(waitpid(holder.pid, &status, WNOHANG | WCONTINUED), 0);
	expect_signal(holder_stop(&holder, SIGKILL), SIGKILL);
	world_stop();
}

/* Detach does not help: the signal comes with no more delay than that takes. */
static void signalled(const struct holder_options *options)
{
	struct holder holder;
	long base = begin(options, &holder);

	truncate_and_wait_late(base, GRACE_MSEC, LATE_MSEC + (options->in_flight ? kept_msec() : 0),
			       PINBROKER_PROOF_PRESUMED);
	expect_signal(holder_stop(&holder, 0), SIGBUS);
	world_stop();
}

static void test_single_issuer(void **state)
{
	signalled(&(struct holder_options){ .ignore = true,
					    .ring_flags = 1U << 12 /* IORING_SETUP_SINGLE_ISSUER */ });
}

static void test_in_flight(void **state)
{
	signalled(&(struct holder_options){ .ignore = true, .in_flight = true });
	signalled(&(struct holder_options){ .ignore = true, .in_flight = true, .writes = true });
}

/* A clone in another ring of the holder is the same pin under another name: it goes, too. */
static void test_clone(void **state)
{
	const struct holder_options options = { .ignore = true, .clone = true };
	struct holder holder;
	long base;

	if (!can_clone_buffers())
		skip();
	base = begin(&options, &holder);
	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	assert_int_equal(kill(holder.pid, 0), 0);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

/* … also where the holder has let go of the original, and says that it was all. */
static void test_clone_left(void **state)
{
	const struct holder_options options = { .clone = true };
	struct holder holder;
	long base;

	if (!can_clone_buffers())
		skip();
	base = begin(&options, &holder);
	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

static void test_opaque(void **state)
{
	signalled(&(struct holder_options){ .ignore = true, .opaque = true });
}

/* It catches the signal, and goes on: SIGKILL. */
static void test_kill(void **state)
{
	const struct holder_options options = { .ignore = true, .opaque = true,
						.catch_signal = true };
	struct holder holder;
	long base = begin(&options, &holder);

	truncate_and_wait(base, GRACE_MSEC + SIGNAL_MSEC, PINBROKER_PROOF_PRESUMED);
	holder_expect(&holder, "notice modify");
	holder_expect(&holder, "notice truncate");
	holder_expect(&holder, "signal");
	expect_signal(holder_stop(&holder, 0), SIGKILL);
	world_stop();
}

/* --- holders that are not there any more --- */

static void test_unmapped(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);

	holder_command(&holder, 'm');
	holder_expect(&holder, "unmapped");
	expect_pinned(pinned(), base, PAGES);
	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	holder_stop(&holder, 0);
	world_stop();
}

/* The holder dies, and a child has all that it had: it is the holder from now on, and has its time. */
static void test_child_keeps_ring(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);
	pid_t child;

	holder_command(&holder, 'f');
	child = (pid_t)holder_number(&holder, "child ");
	kill(holder.pid, SIGKILL);
	assert_int_equal(waitpid(holder.pid, NULL, 0), holder.pid);
	expect_pinned(pinned(), base, PAGES);
	truncate_and_wait(base, GRACE_MSEC, PINBROKER_PROOF_CLAIMED);
	assert_int_equal(kill(child, 0), 0);
	kill(child, SIGKILL);
	close(holder.events);
	close(holder.commands);
	world_stop();
}

/* Killed while the truncate waits: it goes through as soon as the pages are free. */
static void test_killed(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);
	struct result result;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify");
	holder_expect(&holder, "notice truncate");
	expect_signal(holder_stop(&holder, SIGKILL), SIGKILL);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_true(result.usec < GRACE_MSEC * 1000);
	expect_pinned(result.pinned, base, 0);
	assert_int_equal(find_end().proof, PINBROKER_PROOF_PRESUMED);
	world_stop();
}

/* A umem is pinned until the last close, and we have a copy: the pages are gone when the truncate returns. */
static void test_xdp(void **state)
{
	const struct holder_options options = { .xdp = true };
	struct holder holder;
	long base = begin(&options, &holder);
	struct result result;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify -1 0 -");
	holder_expect(&holder, "notice truncate %d %d truncater", PAGE, pid);
	holder_expect(&holder, "let-go");
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, 0, GRACE_MSEC);
	expect_pinned(result.pinned, base, 0);
	assert_int_equal(find_end().proof, PINBROKER_PROOF_CLAIMED);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

static void test_xdp_ignored(void **state)
{
	const struct holder_options options = { .xdp = true, .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);

	/* The kernel frees the pages in its own time, which is longer on a busy machine. */
	truncate_and_wait_late(base, GRACE_MSEC, LATE_MSEC + XDP_FREE_MSEC, PINBROKER_PROOF_PRESUMED);
	expect_signal(holder_stop(&holder, 0), SIGBUS);
	world_stop();
}

static void test_extend(void **state)
{
	const struct holder_options options = { .ignore = true, .extend = true };
	struct holder holder;
	long base = begin(&options, &holder);
	struct result result;
	pid_t pid;
	int fd;

	pid = truncate_start(&fd);
	holder_expect(&holder, "notice modify -1 0 -");
	/* a little less than both: the notice took its time */
	assert_in_range(holder_number(&holder, "extended "), GRACE_MSEC + EXTEND_MSEC - LATE_MSEC,
			GRACE_MSEC + EXTEND_MSEC);
	holder_expect(&holder, "notice truncate %d %d truncater", PAGE, pid);
	result = truncate_finish(pid, fd);
	assert_int_equal(result.error, 0);
	assert_in_range(result.usec / 1000, GRACE_MSEC + EXTEND_MSEC - 5,
			GRACE_MSEC + EXTEND_MSEC + LATE_MSEC + kept_msec());
	expect_pinned(result.pinned, base, 0);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

/* Who waits for himself is not given the grace: the pins go by force, and at once. */
static void test_own_break(void **state)
{
	const struct holder_options options = { .ignore = true };
	struct holder holder;
	long base = begin(&options, &holder);
	uint64_t usec = usec_now();

	holder_command(&holder, 'b');
	holder_expect(&holder, "notice modify -1 0 -");
	holder_expect(&holder, "notice truncate %d %d ", PAGE, holder.pid);
	holder_expect(&holder, "truncated");
	assert_in_range((usec_now() - usec) / 1000, 0, GRACE_MSEC / 2);
	expect_pinned(pinned(), base, 0);
	assert_int_equal(find_end().state, PINBROKER_REVOCATION_RELEASED);
	assert_true(WIFEXITED(holder_stop(&holder, 0)));
	world_stop();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_detach),
		cmocka_unit_test(test_stopped),
		cmocka_unit_test(test_single_issuer),
		cmocka_unit_test(test_in_flight),
		cmocka_unit_test(test_clone),
		cmocka_unit_test(test_clone_left),
		cmocka_unit_test(test_opaque),
		cmocka_unit_test(test_kill),
		cmocka_unit_test(test_unmapped),
		cmocka_unit_test(test_child_keeps_ring),
		cmocka_unit_test(test_killed),
		cmocka_unit_test(test_xdp),
		cmocka_unit_test(test_xdp_ignored),
		cmocka_unit_test(test_extend),
		cmocka_unit_test(test_own_break),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
