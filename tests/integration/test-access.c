/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Nobody gets through the broker what he could not open himself, or holds up whom he could not harm
 * himself (I5): real uids, the kernel's own decisions.
 */

#define ALICE 61001
#define BOB   61002
#define CREW  61003 /* a group */

static char other_path[96];

static void become(uid_t uid, bool in_crew)
{
	gid_t crew = CREW;

	assert_int_equal(setgroups(in_crew ? 1 : 0, &crew), 0);
	assert_int_equal(setresgid(uid, uid, uid), 0);
	assert_int_equal(setresuid(uid, uid, uid), 0);
	/* as a shell's child would be: setuid took that away */
	prctl(PR_SET_DUMPABLE, 1);
}

static pinbroker *client(void)
{
	pinbroker *pb;

	assert_int_equal(pinbroker_new(NULL, socket_path, &pb), 0);
	assert_int_equal(pinbroker_set_channels(pb, 0), 0);
	assert_int_equal(pinbroker_connect(pb), 0);
	return pb;
}

/* What opening the path as this user gives: 0 or a negative errno. */
static int open_as(uid_t uid, bool in_crew, const char *path, enum pinbroker_access access)
{
	int status;
	pid_t pid;

	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		pinbroker_file *file;
		pinbroker *pb;
		int r;

		become(uid, in_crew);
		pb = client();
		r = pinbroker_open_file(pb, path, access, &file);
		if (r >= 0 && access == PINBROKER_WRITE &&
		    (fcntl(pinbroker_file_get_fd(file), F_GETFL) & O_ACCMODE) != O_RDWR)
			r = -EBADF;
		pinbroker_unref(pb);
		_exit(-r);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	return -WEXITSTATUS(status);
}

static void own_file(uid_t uid, gid_t gid, mode_t mode)
{
	make_file();
	assert_int_equal(chown(file_path, uid, gid), 0);
	assert_int_equal(chmod(file_path, mode), 0);
}

static void begin(const char *fs, const char *config)
{
	world_start(config);
	mount_fs(fs);
	assert_int_equal(chmod(dir, 0755), 0);
	assert_int_equal(chmod(mount_point, 0777), 0);
}

static void test_owner(void **state)
{
	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0600);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_WRITE), 0);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_READ), 0);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_READ), -EACCES);
	own_file(0, 0, 0600);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_READ), -EACCES);
	world_stop();
}

/* He may read, and so may not hold up those who write. */
static void test_reader(void **state)
{
	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0644);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_READ), -EACCES);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	/* an owner may, even of a file that he cannot write */
	own_file(ALICE, ALICE, 0400);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_READ), 0);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_WRITE), -EACCES);
	world_stop();
}

static void test_leases_owner(void **state)
{
	begin("tmpfs", "[Files]\nLeases=owner\n");
	own_file(ALICE, ALICE, 0666);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_WRITE), 0);
	world_stop();
}

static void test_group(void **state)
{
	begin("tmpfs", "");
	own_file(ALICE, CREW, 0660);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	assert_int_equal(open_as(BOB, true, file_path, PINBROKER_WRITE), 0);
	world_stop();
}

/* The group that he has connected with counts, too, and nobody has the broker's own. */
static void test_own_group(void **state)
{
	begin("tmpfs", "");
	own_file(ALICE, BOB, 0660);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), 0);
	own_file(ALICE, 0, 0660);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	world_stop();
}

/* Root's clients are looked at by the mode bits, like everybody's. */
static void test_root(void **state)
{
	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0600);
	assert_int_equal(open_as(0, false, file_path, PINBROKER_READ), -EACCES);
	assert_int_equal(open_as(0, false, file_path, PINBROKER_WRITE), -EACCES);
	own_file(0, 0, 0600);
	assert_int_equal(open_as(0, false, file_path, PINBROKER_WRITE), 0);
	world_stop();
}

static void test_acl(void **state)
{
	begin("ext4", "");
	own_file(ALICE, ALICE, 0600);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	run("setfacl -m u:%d:rw %s", BOB, file_path);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), 0);
	world_stop();
}

static void test_read_only_mount(void **state)
{
	char read_only[80];

	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0600);
	snprintf(read_only, sizeof(read_only), "%s/ro", dir);
	snprintf(other_path, sizeof(other_path), "%s/data", read_only);
	assert_int_equal(mkdir(read_only, 0755), 0);
	assert_int_equal(mount(mount_point, read_only, NULL, MS_BIND, NULL), 0);
	assert_int_equal(mount(NULL, read_only, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL), 0);
	assert_int_equal(open_as(ALICE, false, other_path, PINBROKER_WRITE), -EACCES);
	assert_int_equal(open_as(ALICE, false, other_path, PINBROKER_READ), 0);
	/* the broker closes what it was sent a little later */
	assert_int_equal(umount2(read_only, MNT_DETACH), 0);
	world_stop();
}

static void set_flag(int fd, int flag, bool on)
{
	int flags;

	assert_int_equal(ioctl(fd, FS_IOC_GETFLAGS, &flags), 0);
	flags = on ? flags | flag : flags & ~flag;
	assert_int_equal(ioctl(fd, FS_IOC_SETFLAGS, &flags), 0);
}

/* Of a file that is leased for writing the second gets a copy of what the first was given: only if the kernel would
 * open it for him now, whatever has become of it since. */
static void second_writer(const char *fs)
{
	static const int flags[] = { FS_APPEND_FL, FS_IMMUTABLE_FL };
	pinbroker_file *file;
	pinbroker *pb;

	begin(fs, "");
	own_file(0, 0, 0666);
	pb = client();
	assert_int_equal(pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &file), 0);
	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		set_flag(pinbroker_file_get_fd(file), flags[i], true);
		/* for reading, too: what there is is the writable one, until the lease has settled */
		assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
		assert_true(open_as(0, false, file_path, PINBROKER_WRITE) == -EACCES);
		assert_true(open_as(0, false, file_path, PINBROKER_READ) == -EBUSY);
		set_flag(pinbroker_file_get_fd(file), flags[i], false);
		assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), 0);
	}
	assert_int_equal(pinbroker_close_file(file), 0);
	pinbroker_unref(pb);
	world_stop();
}

static void test_flags(void **state)
{
	static const char *const file_systems[] = { "tmpfs", "ext4", "xfs", "btrfs" };

	for (size_t i = 0; i < sizeof(file_systems) / sizeof(file_systems[0]); i++)
		second_writer(file_systems[i]);
}

static int count_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	++*(unsigned *)userdata;
	return 0;
}

/* Alice and Bob share a file, and see and touch each his own. */
static void test_sharing(void **state)
{
	const struct pinbroker_range range = { 0, PAGE };
	int pipes[2][2], status;
	uint64_t pin;
	pid_t pid;
	char c;

	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0666);
	assert_int_equal(pipe(pipes[0]), 0);
	assert_int_equal(pipe(pipes[1]), 0);
	pid = fork();
	if (pid == 0) {
		pinbroker_context *context;
		pinbroker_file *file;
		pinbroker *pb;

		become(ALICE, false);
		pb = client();
		if (pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &file) < 0 ||
		    pinbroker_add_context(pb, eventfd(0, 0), NULL, &context) < 0 ||
		    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, NULL, &pin) < 0)
			_exit(1);
		(void)!write(pipes[0][1], &pin, sizeof(pin));
		(void)!read(pipes[1][0], &c, 1);
		_exit(pinbroker_unpin(pb, &pin, 1, NULL, NULL) == 0 ? 0 : 2);
	}
	assert_int_equal(read(pipes[0][0], &pin, sizeof(pin)), sizeof(pin));
	if (fork() == 0) {
		pinbroker_context *context;
		pinbroker_file *file;
		unsigned n = 0;
		uint64_t own;
		pinbroker *pb;

		become(BOB, false);
		pb = client();
		if (pinbroker_open_file(pb, file_path, PINBROKER_WRITE, &file) < 0 ||
		    pinbroker_add_context(pb, eventfd(0, 0), NULL, &context) < 0 ||
		    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, NULL, &own) < 0)
			_exit(1);
		if (pinbroker_list_pins(pb, 0, 0, count_pin, &n) < 0 || n != 1)
			_exit(2);
		if (pinbroker_unpin(pb, &pin, 1, NULL, NULL) != -ENOENT ||
		    pinbroker_bind(pb, pin, 0) != -ENOENT)
			_exit(3);
		_exit(pinbroker_unpin(pb, &own, 1, NULL, NULL) == 0 ? 0 : 4);
	}
	assert_true(wait(&status) > 0);
	assert_int_equal(status, 0);
	assert_int_equal(write(pipes[1][1], "x", 1), 1);
	assert_true(wait(&status) > 0);
	assert_int_equal(status, 0);
	for (int i = 0; i < 4; i++)
		close(pipes[i / 2][i % 2]);
	world_stop();
}

/* Without privileges it serves its own user, and nobody else. */
static void test_unprivileged(void **state)
{
	char socket_name[80], address[80];
	const char *argv[] = { "pinbrokerd", "--socket", socket_name, "--bus", address, NULL };
	/* She may not be let into the directory where it was built. */
	int status, daemon_fd = open(getenv("PINBROKERD"), O_PATH | O_CLOEXEC);
	pid_t pid;

	begin("tmpfs", "");
	own_file(ALICE, ALICE, 0666);
	snprintf(socket_name, sizeof(socket_name), "%s/alice", mount_point);
	snprintf(address, sizeof(address), "unix:path=%s/no-bus", dir);
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		become(ALICE, false);
		fexecve(daemon_fd, (char *const *)argv, environ);
		_exit(127);
	}
	close(daemon_fd);
	wait_for_socket(socket_name);
	snprintf(socket_path, sizeof(socket_path), "%s", socket_name);
	assert_int_equal(open_as(ALICE, false, file_path, PINBROKER_WRITE), 0);
	assert_int_equal(open_as(BOB, false, file_path, PINBROKER_WRITE), -EACCES);
	status = finish(pid, SIGTERM);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	world_stop();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_owner),
		cmocka_unit_test(test_reader),
		cmocka_unit_test(test_leases_owner),
		cmocka_unit_test(test_group),
		cmocka_unit_test(test_own_group),
		cmocka_unit_test(test_root),
		cmocka_unit_test(test_acl),
		cmocka_unit_test(test_read_only_mount),
		cmocka_unit_test(test_flags),
		cmocka_unit_test(test_sharing),
		cmocka_unit_test(test_unprivileged),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
