/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/config.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

#include <dirent.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

/* Stands in for the log: what was said last, and how often. */
static char warning[4096];
static unsigned n_warnings;

static void warn(const char *format, va_list ap) __attribute__((format(printf, 1, 0)));
static void warn(const char *format, va_list ap)
{
	vsnprintf(warning, sizeof(warning), format, ap);
	n_warnings++;
}

void log_event(int priority, const char *message_id, const struct log_fields *fields,
	const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	warn(format, ap);
	va_end(ap);
}

int log_errno(int priority, int error, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	warn(format, ap);
	va_end(ap);
	return -abs(error);
}

static char directory[] = "/tmp/test-config-XXXXXX";
static char path[64];
static unsigned n_descriptors;

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

static void write_file(const char *name, const char *text)
{
	char s[512];
	FILE *f;

	snprintf(s, sizeof(s), "%s/%s", directory, name);
	f = fopen(s, "we");
	assert_non_null(f);
	assert_true(fputs(text, f) >= 0);
	fclose(f);
}

static int setup(void **state)
{
	char s[80];

	n_descriptors = count_descriptors();
	strcpy(strchr(directory, '\0') - 6, "XXXXXX");
	if (!mkdtemp(directory))
		return -1;
	snprintf(path, sizeof(path), "%s/a.conf", directory);
	snprintf(s, sizeof(s), "%s.d", path);
	warning[0] = '\0';
	n_warnings = 0;
	return mkdir(s, 0700);
}

static int teardown(void **state)
{
	static const char *const names[] = {"a.conf", "a.conf.d/10-x.conf", "a.conf.d/9-x.conf",
		"a.conf.d/x.txt", "a.conf.d/.x.conf", "a.conf.d/.conf", "a.conf.d/d.conf", "a.conf.d", ""};

	for (size_t i = 0; i < ELEMENTS(names); i++) {
		char s[512];

		snprintf(s, sizeof(s), "%s/%s", directory, names[i]);
		(void)remove(s);
	}
	assert_int_equal(access(directory, F_OK), -1);
	assert_int_equal(count_descriptors(), n_descriptors);
	return 0;
}

static struct config load(const char *text)
{
	struct config c;

	write_file("a.conf", text);
	assert_int_equal(config_load(path, &c), 0);
	return c;
}

static void assert_defaults(const struct config *c)
{
	static const char *const file_systems[] = {
		"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "hugetlbfs"};

	assert_int_equal(c->revoke_grace_usec, 10 * USEC_PER_SEC);
	assert_int_equal(c->signal_on_timeout, SIGBUS);
	assert_int_equal(c->signal_grace_usec, 5 * USEC_PER_SEC);
	assert_false(c->force_unmap);
	assert_int_equal(c->leases, LEASES_WRITERS);
	assert_int_equal(c->readers, READERS_WAIT);
	assert_false(c->require_open_descriptor);
	for (size_t i = 0; i < ELEMENTS(file_systems); i++)
		assert_string_equal(c->file_systems[i], file_systems[i]);
	assert_null(c->file_systems[ELEMENTS(file_systems)]);
	assert_int_equal(c->limits[LIMIT_CLIENTS], 256);
	assert_int_equal(c->limits[LIMIT_FILES], 1024);
	assert_int_equal(c->limits[LIMIT_CONTEXTS], 256);
	assert_int_equal(c->limits[LIMIT_PINS], 131072);
	assert_int_equal(c->limits[LIMIT_PINNED_BYTES], UINT64_MAX);
	assert_int_equal(c->limits[LIMIT_UNFINISHED], 64);
	assert_int_equal(c->limits[LIMIT_DESCRIPTORS], UINT64_MAX);
	assert_int_equal(c->limits[LIMIT_QUEUED_BYTES], 64ULL << 20);
}

static void test_empty(void **state)
{
	struct config c = load("");

	assert_defaults(&c);
	assert_int_equal(n_warnings, 0);
	config_clear(&c);
	config_clear(&c);
}

static void test_everything(void **state)
{
	struct config c = load("# comment\n"
			       "[Revocation]\n"
			       "RevokeGraceSec = 1min 30s\n"
			       "  SignalOnTimeout=TERM\n" /* indented, yet a line of its own */
			       "SignalGraceSec=500ms\n"
			       "ForceUnmap=yes\n"
			       "[Files]\n"
			       "Leases=owner\n"
			       "Readers=admit\n"
			       "RequireOpenDescriptor=Yes\n"
			       "FileSystems=xfs   tmpfs\n"
			       "; comment\n"
			       "[Limits]\n"
			       "MaxClientsPerUser=1\n"
			       "MaxFilesPerUser=infinity\n"
			       "MaxPinsPerUser=2K\n"
			       "MaxPinnedBytesPerUser=64G\n"
			       "MaxUnfinishedPerUser=0");

	assert_int_equal(n_warnings, 0);
	assert_int_equal(c.revoke_grace_usec, 90 * USEC_PER_SEC);
	assert_int_equal(c.signal_on_timeout, SIGTERM);
	assert_int_equal(c.signal_grace_usec, 500 * USEC_PER_MSEC);
	assert_true(c.force_unmap);
	assert_int_equal(c.leases, LEASES_OWNER);
	assert_int_equal(c.readers, READERS_ADMIT);
	assert_true(c.require_open_descriptor);
	assert_string_equal(c.file_systems[0], "xfs");
	assert_string_equal(c.file_systems[1], "tmpfs");
	assert_null(c.file_systems[2]);
	assert_int_equal(c.limits[LIMIT_CLIENTS], 1);
	assert_int_equal(c.limits[LIMIT_FILES], UINT64_MAX);
	assert_int_equal(c.limits[LIMIT_CONTEXTS], 256);
	assert_int_equal(c.limits[LIMIT_PINS], 2048);
	assert_int_equal(c.limits[LIMIT_PINNED_BYTES], 64ULL << 30);
	assert_int_equal(c.limits[LIMIT_UNFINISHED], 0);
	config_clear(&c);
}

/* Each word and unit for what it says. */
static void test_words(void **state)
{
	static const struct {
		const char *text;
		uint64_t usec;
	} spans[] = {
		{"7", 7 * USEC_PER_SEC},
		{"7us", 7},
		{"7ms", 7 * USEC_PER_MSEC},
		{"7s", 7 * USEC_PER_SEC},
		{"7sec", 7 * USEC_PER_SEC},
		{"7m", 7 * 60 * USEC_PER_SEC},
		{"7min", 7 * 60 * USEC_PER_SEC},
		{"7h", 7 * 60 * 60 * USEC_PER_SEC},
	};
	static const char *const booleans[][2] = {{"0", "1"}, {"no", "yes"}, {"n", "y"},
		{"false", "true"}, {"f", "t"}, {"off", "on"}};
	struct config c;
	char text[64];

	for (size_t i = 0; i < ELEMENTS(spans); i++) {
		snprintf(text, sizeof(text), "[Revocation]\nRevokeGraceSec=%s\n", spans[i].text);
		c = load(text);
		assert_int_equal(c.revoke_grace_usec, spans[i].usec);
		config_clear(&c);
	}
	for (size_t i = 0; i < 2 * ELEMENTS(booleans); i++) {
		snprintf(text, sizeof(text), "[Revocation]\nForceUnmap=%s\nForceUnmap=%s\n",
			booleans[0][i % 2 == 0], booleans[i / 2][i % 2]);
		c = load(text);
		assert_int_equal(c.force_unmap, i % 2);
		config_clear(&c);
	}
	assert_int_equal(n_warnings, 0);
}

/* A wrong line is named, and changes nothing. */
static void test_wrong_lines(void **state)
{
	static const char *const lines[] = {
		"[Revocation]\nRevokeGraceSec=\n",
		"[Revocation]\nRevokeGraceSec=-1\n",
		"[Revocation]\nRevokeGraceSec=10 parsecs\n",
		"[Revocation]\nRevokeGraceSec=infinity\n",
		"[Revocation]\nRevokeGraceSec=25h\n",
		"[Revocation]\nRevokeGraceSec=18446744073709551615h\n",
		"[Revocation]\nRevokeGraceSec=99999999999999999999\n",
		"[Revocation]\nSignalOnTimeout=SIGNONE\n",
		"[Revocation]\nSignalOnTimeout=\n",
		"[Files]\nLeases=everybody\n",
		"[Files]\nReaders=\n",
		"[Files]\nRequireOpenDescriptor=perhaps\n",
		"[Files]\nFileSystems=\n",
		"[Files]\nRevokeGraceSec=1\n",
		"[Limits]\nMaxPinsPerUser=-1\n",
		"[Limits]\nMaxPinsPerUser=1KB\n",
		"[Limits]\nMaxPinsPerUser=18014398509481984K\n",
		"[Limits]\nMaxHopesPerUser=1\n",
		"[Limit]\nMaxPinsPerUser=1\n",
		"\nMaxPinsPerUser=1\n",
		"\nnonsense\n",
	};

	for (size_t i = 0; i < ELEMENTS(lines); i++) {
		struct config c = load(lines[i]);
		char place[128];

		snprintf(place, sizeof(place), "%s:2: ", path);
		assert_int_equal(n_warnings, i + 1);
		assert_int_equal(strncmp(warning, place, strlen(place)), 0);
		assert_defaults(&c);
		config_clear(&c);
	}
}

static void test_earlier_line_stays(void **state)
{
	struct config c = load("[Revocation]\nRevokeGraceSec=3\nRevokeGraceSec=soon\n"
			       "SignalOnTimeout=none\n");

	assert_int_equal(n_warnings, 1);
	assert_int_equal(c.revoke_grace_usec, 3 * USEC_PER_SEC);
	assert_int_equal(c.signal_on_timeout, 0);
	config_clear(&c);
}

static void test_long_line(void **state)
{
	char text[2048];
	struct config c;

	snprintf(text, sizeof(text),
		"[Limits]\n#%0600d\n#%0300dMaxFilesPerUser=1\nMaxPinsPerUser=%d", 0, 0, 7);
	c = load(text);
	assert_int_equal(n_warnings, 2);
	assert_non_null(strstr(warning, ":3: "));
	assert_int_equal(c.limits[LIMIT_FILES], 1024);
	assert_int_equal(c.limits[LIMIT_PINS], 7);
	config_clear(&c);
}

static void test_drop_ins(void **state)
{
	struct config c;

	write_file("a.conf.d/10-x.conf", "[Limits]\nMaxPinsPerUser=10\nMaxFilesPerUser=10\n");
	write_file("a.conf.d/9-x.conf", "[Limits]\nMaxPinsPerUser=9\n");
	write_file("a.conf.d/x.txt", "[Limits]\nMaxPinsPerUser=11\n");
	write_file("a.conf.d/.x.conf", "[Limits]\nMaxPinsPerUser=12\n");
	write_file("a.conf.d/.conf", "[Limits]\nMaxContextsPerUser=13\n");
	c = load("[Limits]\nMaxPinsPerUser=8\nMaxFilesPerUser=8\nMaxClientsPerUser=8\n");
	assert_int_equal(n_warnings, 0);
	assert_int_equal(c.limits[LIMIT_PINS], 9);
	assert_int_equal(c.limits[LIMIT_FILES], 10);
	assert_int_equal(c.limits[LIMIT_CONTEXTS], 256);
	assert_int_equal(c.limits[LIMIT_CLIENTS], 8);
	config_clear(&c);
}

static void test_unreadable(void **state)
{
	struct config c = {.revoke_grace_usec = 1};
	char s[128];

	assert_int_equal(config_load(path, &c), -ENOENT);
	assert_int_equal(config_load(directory, &c), -EISDIR);
	assert_int_equal(c.revoke_grace_usec, 1);
	assert_int_equal(n_warnings, 0);

	snprintf(s, sizeof(s), "%s.d/d.conf", path);
	assert_int_equal(mkdir(s, 0700), 0);
	c = load("");
	assert_int_equal(n_warnings, 1);
	assert_defaults(&c);
	config_clear(&c);
}

/* The file that is shipped names every key and tells its true default. */
static void test_shipped_file(void **state)
{
	const char *shipped = getenv("PINBROKER_CONF");
	char line[256], text[16384] = "";
	struct config c;
	FILE *f;

	if (!shipped)
		skip();
	f = fopen(shipped, "re");
	assert_non_null(f);
	while (fgets(line, sizeof(line), f)) {
		size_t n = strcspn(line, " =");

		strcat(text, line[0] == '#' && n > 1 && line[n] == '=' ? line + 1 : line);
	}
	fclose(f);
	c = load(text);
	assert_string_equal(warning, "");
	assert_defaults(&c);
	config_clear(&c);
	for (enum limit l = 0; l < LIMIT_COUNT; l++) {
		snprintf(line, sizeof(line), "\n%s=", limit_name(l));
		assert_non_null(strstr(text, line));
	}
	assert_non_null(strstr(text, "\nRevokeGraceSec="));
	assert_non_null(strstr(text, "\nSignalOnTimeout="));
	assert_non_null(strstr(text, "\nSignalGraceSec="));
	assert_non_null(strstr(text, "\nLeases="));
	assert_non_null(strstr(text, "\nReaders="));
	assert_non_null(strstr(text, "\nRequireOpenDescriptor="));
	assert_non_null(strstr(text, "\nFileSystems="));
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_empty, setup, teardown),
		cmocka_unit_test_setup_teardown(test_everything, setup, teardown),
		cmocka_unit_test_setup_teardown(test_words, setup, teardown),
		cmocka_unit_test_setup_teardown(test_wrong_lines, setup, teardown),
		cmocka_unit_test_setup_teardown(test_earlier_line_stays, setup, teardown),
		cmocka_unit_test_setup_teardown(test_long_line, setup, teardown),
		cmocka_unit_test_setup_teardown(test_drop_ins, setup, teardown),
		cmocka_unit_test_setup_teardown(test_unreadable, setup, teardown),
		cmocka_unit_test_setup_teardown(test_shipped_file, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
