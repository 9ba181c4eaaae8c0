/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define SD_JOURNAL_SUPPRESS_LOCATION
#include "daemon/util/log-rate.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <systemd/sd-journal.h>

#include <cmocka.h>

static unsigned n_descriptors;
static int saved_stderr, pipe_end;
static atomic_bool allocations_fail;
static char journal[8192]; /* what sd_journal_sendv() was given, one field a line */

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
int __wrap_sd_journal_sendv(const struct iovec *iov, int n);

void *__wrap_malloc(size_t size)
{
	return allocations_fail ? NULL : __real_malloc(size);
}

int __wrap_sd_journal_sendv(const struct iovec *iov, int n)
{
	for (int i = 0; i < n; i++) {
		strncat(journal, iov[i].iov_base, iov[i].iov_len);
		strcat(journal, "\n");
	}
	return 0;
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

/* From here on stderr is a pipe, one page long. */
static int setup(void **state)
{
	int fds[2];

	n_descriptors = count_descriptors();
	unsetenv("JOURNAL_STREAM");
	if (pipe2(fds, O_CLOEXEC) < 0 || fcntl(fds[1], F_SETPIPE_SZ, 4096) < 0)
		return -1;
	saved_stderr = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
	dup2(fds[1], STDERR_FILENO);
	close(fds[1]);
	pipe_end = fds[0];
	journal[0] = '\0';
	return 0;
}

static void restore_stderr(void)
{
	if (saved_stderr >= 0)
		dup2(saved_stderr, STDERR_FILENO);
	saved_stderr = safe_close(saved_stderr);
}

static int teardown(void **state)
{
	restore_stderr();
	safe_close(pipe_end);
	return count_descriptors() == n_descriptors ? 0 : -1;
}

/* All that was written. No assertion before: its message would go into the pipe. */
static const char *written(void)
{
	static char s[65536];
	size_t n = 0;
	ssize_t k;

	log_close(10000);
	restore_stderr();
	while ((k = read(pipe_end, s + n, sizeof(s) - 1 - n)) > 0)
		n += (size_t)k;
	s[n] = '\0';
	return s;
}

static void test_plain(void **state)
{
	log_open(LOG_INFO);
	log_info("One %d", 1);
	log_debug("Not %d", 2);
	errno = ENOENT;
	log_error("Three");
	log_event(LOG_NOTICE, MESSAGE_LEASE_BROKEN,
		&(struct log_fields){.file = 3, .uid = &(uid_t){0}, .path = "/srv/a"},
		"Lease of %s broken.", "/srv/a");
	assert_string_equal(written(),
		"pinbrokerd: One 1\n"
		"pinbrokerd: Three\n"
		"pinbrokerd: Lease of /srv/a broken. [MESSAGE_ID=" MESSAGE_LEASE_BROKEN
		" PINBROKER_FILE=3 PINBROKER_CLIENT_UID=0 PINBROKER_PATH=/srv/a]\n");
	assert_int_equal(errno, ENOENT);
}

static void test_errno(void **state)
{
	int r;

	log_open(LOG_INFO);
	r = log_errno(LOG_WARNING, -EACCES, "Cannot open %s", "/a");
	assert_string_equal(
		written(), "pinbrokerd: Cannot open /a: Permission denied [ERRNO=13]\n");
	assert_int_equal(r, -EACCES);
}

/* Whose limit it was, and how much it is, where the error alone does not say. */
static void test_limits(void **state)
{
	struct rlimit files, size;
	char line[128];
	const char *s;

	getrlimit(RLIMIT_NOFILE, &files);
	getrlimit(RLIMIT_FSIZE, &size);
	setrlimit(RLIMIT_FSIZE, &(struct rlimit){4711, size.rlim_max});
	log_open(LOG_INFO);
	log_errno(LOG_ERR, EFBIG, "Write");
	setrlimit(RLIMIT_FSIZE, &size);
	log_errno(LOG_ERR, ENFILE, "Table");
	log_errno_limit(LOG_ERR, EMFILE, LOG_RESOURCE_EVENT, "Open");
	log_errno_limit(LOG_ERR, EMFILE, LOG_RESOURCE_INOTIFY, "Init");
	log_errno_limit(LOG_ERR, ENOSPC, LOG_RESOURCE_INOTIFY, "Add");
	log_errno_limit(LOG_ERR, ENOSPC, LOG_RESOURCE_EVENT, "Poll");
	log_errno_limit(LOG_ERR, EAGAIN, LOG_RESOURCE_THREAD, "Run");
	log_errno(LOG_ERR, ENOSPC, "Disk");
	log_errno(LOG_ERR, EAGAIN, "Lease");
	s = written();
	assert_non_null(
		strstr(s, "Write: File too large (the limit is RLIMIT_FSIZE, LimitFSIZE=: 4711) "));
	assert_non_null(strstr(
		s, "Table: Too many open files in system (the limit is /proc/sys/fs/file-max: "));
	snprintf(line, sizeof(line),
		"Open: Too many open files (the limit is RLIMIT_NOFILE, LimitNOFILE=: %ju) ",
		(uintmax_t)files.rlim_cur);
	assert_non_null(strstr(s, line));
	assert_non_null(strstr(s, "Init: Too many open files (the limit is "
				  "/proc/sys/fs/inotify/max_user_instances: "));
	assert_non_null(strstr(s, "Add: No space left on device (the limit is "
				  "/proc/sys/fs/inotify/max_user_watches: "));
	assert_non_null(strstr(s, "Poll: No space left on device (the limit is "
				  "/proc/sys/fs/epoll/max_user_watches: "));
	assert_non_null(strstr(s,
		"Run: Resource temporarily unavailable (the limit is TasksMax=, RLIMIT_NPROC or "
		"/proc/sys/kernel/threads-max) "));
	assert_non_null(strstr(s, "Disk: No space left on device ["));
	assert_non_null(strstr(s, "Lease: Resource temporarily unavailable ["));
}

/* inotify_init1() says the same of the process's limit. */
static void test_limit_of_descriptors(void **state)
{
	struct rlimit files;
	char line[128];

	getrlimit(RLIMIT_NOFILE, &files);
	log_open(LOG_INFO);
	setrlimit(RLIMIT_NOFILE, &(struct rlimit){3, files.rlim_max});
	log_errno_limit(LOG_ERR, EMFILE, LOG_RESOURCE_INOTIFY, "Init");
	setrlimit(RLIMIT_NOFILE, &files);
	snprintf(line, sizeof(line),
		"pinbrokerd: Init: Too many open files (the limit is RLIMIT_NOFILE, LimitNOFILE=: "
		"3) [ERRNO=%d]\n",
		EMFILE);
	assert_string_equal(written(), line);
}

/* I5: a name cannot forge a line or a field. */
static void test_hostile_names(void **state)
{
	static const char path[] = "/a\nPINBROKER_PIN=9\r\033[2J PINBROKER_PIN=8]\177\x9b\xc2\x9b";

	log_open(LOG_INFO);
	log_event(LOG_INFO, NULL, &(struct log_fields){.breaker_comm = "x\ny", .path = path},
		"Broken: %s", "x [PINBROKER_PIN=7]\npinbrokerd: y\t\xc3\xa4\xe2\x82\xac");
	assert_string_equal(written(),
		"pinbrokerd: Broken: x \\x5bPINBROKER_PIN=7]?pinbrokerd: y?\xc3\xa4\xe2\x82\xac "
		"[PINBROKER_BREAKER_COMM=x?y PINBROKER_PATH=/a?PINBROKER_PIN=9??\\x5b2J"
		"\\x20PINBROKER_PIN=8\\x5d????]\n");
}

static void test_journal(void **state)
{
	char stream[64];
	struct stat st;

	fstat(STDERR_FILENO, &st);
	snprintf(stream, sizeof(stream), "%ju:%ju", (uintmax_t)st.st_dev, (uintmax_t)st.st_ino);
	setenv("JOURNAL_STREAM", stream, 1);
	log_open(LOG_INFO);
	log_event(LOG_NOTICE, MESSAGE_LEASE_LOST,
		&(struct log_fields){.client = 1, .pid = 7, .path = "/a b\nPINBROKER_PIN=9"},
		"Lost\nPRIORITY=0");
	assert_string_equal(written(), "");
	unsetenv("JOURNAL_STREAM");
	assert_string_equal(journal, "PRIORITY=5\n"
				     "SYSLOG_IDENTIFIER=pinbrokerd\n"
				     "MESSAGE=Lost?PRIORITY=0\n"
				     "MESSAGE_ID=" MESSAGE_LEASE_LOST "\n"
				     "PINBROKER_CLIENT=1\n"
				     "PINBROKER_CLIENT_PID=7\n"
				     "PINBROKER_PATH=/a b?PINBROKER_PIN=9\n");
}

static void test_long(void **state)
{
	static char s[10000];
	const char *line;

	memset(s, 'x', sizeof(s) - 1);
	log_open(LOG_INFO);
	log_info("%s", s);
	line = written();
	assert_in_range(strlen(line), 2048, 2100);
	assert_ptr_equal(strchr(line, '\n'), strchr(line, '\0') - 1);
}

static void test_long_path(void **state)
{
	static char s[20000];
	size_t n = 0;

	memset(s, 'x', sizeof(s) - 1);
	log_open(LOG_INFO);
	log_event(LOG_INFO, NULL, &(struct log_fields){.error = 1, .path = s}, "Long");
	/* longer than the pipe: cannot be flushed before it is read */
	log_close(0);
	while (n == 0 || s[n - 1] != '\n') {
		ssize_t k = read(pipe_end, s + n, sizeof(s) - n);

		assert_true(k > 0);
		n += (size_t)k;
	}
	assert_in_range(n, 8000, 8300);
	assert_int_equal(memcmp(s + n - 3, "x]\n", 3), 0);
	assert_string_equal(written(), "");
}

static void test_no_memory(void **state)
{
	log_open(LOG_INFO);
	allocations_fail = true;
	log_info("One");
	log_info("Two");
	allocations_fail = false;
	log_info("Three");
	assert_string_equal(
		written(), "pinbrokerd: 2 log messages lost.\npinbrokerd: Three\n");
}

/* I6: nobody reads, and neither log_info() nor log_close() waits. */
static void test_blocked(void **state)
{
	enum { N_SENT = 3 * LOG_QUEUE_MAX };
	unsigned n_lines = 0, n_lost = 0;
	FILE *f = fdopen(pipe_end, "r");
	char line[256];

	log_open(LOG_INFO);
	for (unsigned i = 0; i < N_SENT; i++)
		log_event(LOG_INFO, NULL,
			&(struct log_fields){.charged_uid = &(uid_t){i / LOG_RATE_BURST}},
			"Line %u", i);
	log_close(1);

	while (n_lines + n_lost < N_SENT && fgets(line, sizeof(line), f)) {
		unsigned n;

		if (sscanf(line, "pinbrokerd: %u log messages lost.", &n) == 1)
			n_lost += n;
		else
			n_lines++;
	}
	log_close(10000);
	restore_stderr();
	fclose(f);
	pipe_end = -1;
	assert_int_equal(n_lines + n_lost, N_SENT);
	assert_in_range(n_lines, LOG_QUEUE_MAX, LOG_QUEUE_MAX + 1000);
}

/* Who makes much noise is counted, and keeps out neither others nor what is urgent. */
static void test_storm(void **state)
{
	const struct log_fields noisy = {.uid = &(uid_t){1007}}, other = {.uid = &(uid_t){1008}};
	char *s;

	fcntl(STDERR_FILENO, F_SETPIPE_SZ, 1 << 20);
	log_open(LOG_INFO);
	for (unsigned i = 0; i < LOG_RATE_BURST + 9; i++) {
		log_event(LOG_INFO, NULL, &noisy, "Noise");
		log_errno(LOG_NOTICE, EPERM, "Place");
	}
	log_event(LOG_CRIT, NULL, &noisy, "Urgent");
	log_event(LOG_INFO, NULL, &other, "Other");
	log_info("Elsewhere");
	s = strstr(written(), "pinbrokerd: Urgent");
	assert_non_null(s);
	assert_string_equal(s,
		"pinbrokerd: Urgent [PINBROKER_CLIENT_UID=1007]\n"
		"pinbrokerd: Other [PINBROKER_CLIENT_UID=1008]\n"
		"pinbrokerd: Elsewhere\n"
		"pinbrokerd: Left out 9 messages about uid 1007. [PINBROKER_CLIENT_UID=1007]\n"
		"pinbrokerd: Left out 9 messages like: Place\n");
}

static void test_without_thread(void **state)
{
	log_info("Before");
	log_open(LOG_INFO);
	log_close(10000);
	log_info("After");
	assert_string_equal(written(), "pinbrokerd: Before\npinbrokerd: After\n");
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_plain, setup, teardown),
		cmocka_unit_test_setup_teardown(test_errno, setup, teardown),
		cmocka_unit_test_setup_teardown(test_limits, setup, teardown),
		cmocka_unit_test_setup_teardown(test_limit_of_descriptors, setup, teardown),
		cmocka_unit_test_setup_teardown(test_hostile_names, setup, teardown),
		cmocka_unit_test_setup_teardown(test_journal, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long_path, setup, teardown),
		cmocka_unit_test_setup_teardown(test_no_memory, setup, teardown),
		cmocka_unit_test_setup_teardown(test_blocked, setup, teardown),
		cmocka_unit_test_setup_teardown(test_storm, setup, teardown),
		cmocka_unit_test_setup_teardown(test_without_thread, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
