/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/config.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <ini.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "daemon/util/log.h"
#include "protocol/macro.h"

#define SPAN_MAX_USEC (24 * 60 * 60 * USEC_PER_SEC)
#define WHITESPACE    " \t"

/* Others than this kernel change files there, or the files below theirs: no lease sees them. */
static const char *const unprotected_file_systems[] = {
	"9p", "afs", "ceph", "cifs", "coda", "fuse", "fuseblk", "gfs2", "lustre", "nfs", "nfs4", "ocfs2",
	"overlay", "smb3", "virtiofs",
};

static const char default_file_systems[] = "ext2 ext3 ext4 xfs btrfs tmpfs hugetlbfs";

static const struct config defaults = {
	.revoke_grace_usec = 10 * USEC_PER_SEC,
	.signal_on_timeout = SIGBUS,
	.signal_grace_usec = 5 * USEC_PER_SEC,
	.leases = LEASES_WRITERS,
	.readers = READERS_WAIT,
	.limits =
		{
			[LIMIT_CLIENTS] = 256,
			[LIMIT_FILES] = 1024,
			[LIMIT_CONTEXTS] = 256,
			[LIMIT_PINS] = 131072,
			[LIMIT_PINNED_BYTES] = UINT64_MAX,
			[LIMIT_UNFINISHED] = 64,
			[LIMIT_DESCRIPTORS] = UINT64_MAX,
			[LIMIT_QUEUED_BYTES] = 64ULL << 20,
		},
};

/* inih tells the handler no line number, so the reader that feeds it counts. */
struct reader {
	FILE *file;
	const char *path;
	unsigned line;
	int error; /* the file could not be read, or there was no memory */
	struct config *config;
};

static int parse_number(const char **s, uint64_t *ret)
{
	char *end;

	if (!isdigit((unsigned char)**s))
		return -EINVAL;
	errno = 0;
	*ret = strtoull(*s, &end, 10);
	if (errno != 0)
		return -errno;
	*s = end;
	return 0;
}

static int parse_span(const char *s, void *ret)
{
	static const struct {
		const char *name;
		uint64_t usec;
	} units[] = {
		{"", USEC_PER_SEC},
		{"us", 1},
		{"ms", USEC_PER_MSEC},
		{"s", USEC_PER_SEC},
		{"sec", USEC_PER_SEC},
		{"m", 60 * USEC_PER_SEC},
		{"min", 60 * USEC_PER_SEC},
		{"h", 60 * 60 * USEC_PER_SEC},
	};
	uint64_t sum = 0;

	do {
		uint64_t n;
		size_t length, i;
		int r = parse_number(&s, &n);

		if (r < 0)
			return r;
		s += strspn(s, WHITESPACE);
		length = strspn(s, "abcdefghijklmnopqrstuvwxyz");
		for (i = 0; i < ELEMENTS(units); i++)
			if (strlen(units[i].name) == length && !strncmp(s, units[i].name, length))
				break;
		if (i == ELEMENTS(units))
			return -EINVAL;
		if (__builtin_mul_overflow(n, units[i].usec, &n) ||
			__builtin_add_overflow(sum, n, &sum) || sum > SPAN_MAX_USEC)
			return -ERANGE;
		s += length;
		s += strspn(s, WHITESPACE);
	} while (*s);
	*(uint64_t *)ret = sum;
	return 0;
}

static int parse_amount(const char *s, uint64_t *ret)
{
	static const char suffixes[] = "KMGT";
	const char *suffix;
	uint64_t n;
	int r;

	if (!strcmp(s, "infinity")) {
		*ret = UINT64_MAX;
		return 0;
	}
	r = parse_number(&s, &n);
	if (r < 0)
		return r;
	suffix = *s ? strchr(suffixes, *s) : NULL;
	if (suffix) {
		if (__builtin_mul_overflow(n, 1ULL << (10 * (suffix - suffixes + 1)), &n))
			return -ERANGE;
		s++;
	}
	if (*s)
		return -EINVAL;
	*ret = n;
	return 0;
}

static int parse_boolean(const char *s, void *ret)
{
	static const char *const names[][2] = {{"0", "1"}, {"no", "yes"}, {"n", "y"},
		{"false", "true"}, {"f", "t"}, {"off", "on"}};

	for (size_t i = 0; i < ELEMENTS(names); i++)
		for (int value = 0; value < 2; value++)
			if (!strcasecmp(s, names[i][value])) {
				*(bool *)ret = value;
				return 0;
			}
	return -EINVAL;
}

static int parse_signal(const char *s, void *ret)
{
	if (!strcmp(s, "none")) {
		*(int *)ret = 0;
		return 0;
	}
	if (!strncmp(s, "SIG", 3))
		s += 3;
	for (int i = 1; i < SIGRTMIN; i++) {
		const char *name = sigabbrev_np(i);

		if (name && !strcmp(s, name)) {
			*(int *)ret = i;
			return 0;
		}
	}
	return -EINVAL;
}

static int parse_leases(const char *s, void *ret)
{
	bool writers = !strcmp(s, "writers");

	if (!writers && strcmp(s, "owner") != 0)
		return -EINVAL;
	*(enum leases *)ret = writers ? LEASES_WRITERS : LEASES_OWNER;
	return 0;
}

static int parse_readers(const char *s, void *ret)
{
	bool admit = !strcmp(s, "admit");

	if (!admit && strcmp(s, "wait") != 0)
		return -EINVAL;
	*(enum readers *)ret = admit ? READERS_ADMIT : READERS_WAIT;
	return 0;
}

static void list_free(char **list)
{
	for (char **s = list; s && *s; s++)
		free(*s);
	free(list);
}

static void list_freep(char ***list)
{
	list_free(*list);
}

static int parse_list(const char *s, void *ret)
{
	/* every word but the last takes two characters at least */
	_cleanup_(list_freep) char **list = calloc(strlen(s) / 2 + 2, sizeof(*list));
	size_t n = 0;

	if (!list)
		return -ENOMEM;
	for (s += strspn(s, WHITESPACE); *s; s += strspn(s, WHITESPACE)) {
		size_t length = strcspn(s, WHITESPACE);

		list[n] = strndup(s, length);
		if (!list[n++])
			return -ENOMEM;
		s += length;
	}
	if (n == 0)
		return -EINVAL;
	list_free(*(char ***)ret);
	*(char ***)ret = TAKE_PTR(list);
	return 0;
}

static const struct setting {
	const char *section;
	const char *key;
	int (*parse)(const char *value, void *ret); /* leaves *ret alone when it fails */
	size_t offset;
} settings[] = {
#define MEMBER(m) offsetof(struct config, m)
	{"Revocation", "RevokeGraceSec", parse_span, MEMBER(revoke_grace_usec)},
	{"Revocation", "SignalOnTimeout", parse_signal, MEMBER(signal_on_timeout)},
	{"Revocation", "SignalGraceSec", parse_span, MEMBER(signal_grace_usec)},
	{"Revocation", "ForceUnmap", parse_boolean, MEMBER(force_unmap)},
	{"Files", "Leases", parse_leases, MEMBER(leases)},
	{"Files", "Readers", parse_readers, MEMBER(readers)},
	{"Files", "RequireOpenDescriptor", parse_boolean, MEMBER(require_open_descriptor)},
	{"Files", "FileSystems", parse_list, MEMBER(file_systems)},
#undef MEMBER
};

/* -ENOENT: no such key */
static int config_set(
	struct config *config, const char *section, const char *key, const char *value)
{
	for (size_t i = 0; i < ELEMENTS(settings); i++)
		if (!strcmp(section, settings[i].section) && !strcmp(key, settings[i].key))
			return settings[i].parse(value, (char *)config + settings[i].offset);
	for (enum limit l = 0; l < LIMIT_COUNT; l++)
		if (!strcmp(section, "Limits") && !strcmp(key, limit_name(l)))
			return parse_amount(value, &config->limits[l]);
	return -ENOENT;
}

static int read_setting(void *userdata, const char *section, const char *key, const char *value)
{
	struct reader *reader = userdata;
	int r = config_set(reader->config, section, key, value);

	if (r == -ENOMEM)
		reader->error = r;
	else if (r == -ENOENT)
		log_warning("%s:%u: Section \"%s\" has no %s=; the line is ignored.", reader->path,
			reader->line, section, key);
	else if (r < 0)
		log_warning("%s:%u: \"%s\" is no value for %s=; the line is ignored.", reader->path,
			reader->line, value, key);
	return 1;
}

/* inih tells of the first such line alone. */
static bool is_understood(const char *line)
{
	if (strchr("#;\r\n", *line))
		return true;
	return *line == '[' ? strchr(line, ']') : strpbrk(line, "=:");
}

static char *read_line(char *line, int size, void *userdata)
{
	struct reader *reader = userdata;
	size_t blank;

	if (!fgets(line, size, reader->file)) {
		if (ferror(reader->file))
			reader->error = -errno;
		return NULL;
	}
	reader->line++;
	if (!strchr(line, '\n') && !feof(reader->file)) {
		/* inih would take the rest for a line of its own */
		for (int c = 0; c != EOF && c != '\n';)
			c = fgetc(reader->file);
		log_warning("%s:%u: The line is too long and ignored.", reader->path, reader->line);
		*line = '\0';
	}
	/* inih would take an indented line for a continuation */
	blank = strspn(line, WHITESPACE);
	memmove(line, line + blank, strlen(line + blank) + 1);
	if (!is_understood(line)) {
		log_warning("%s:%u: This is neither a section nor Key=value; the line is ignored.",
			reader->path, reader->line);
		*line = '\0';
	}
	return line;
}

/* Devices and pipes may have no end, or be waited for. One that is empty, as /dev/null, is as good as a file. */
static int open_file(const char *path, FILE **ret)
{
	_cleanup_(close_fdp) int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	*ret = fdopen(fd, "re");
	if (!*ret)
		return -errno;
	TAKE_FD(fd);
	if (S_ISREG(st.st_mode) || fgetc(*ret) == EOF)
		return 0;
	fclose(*ret);
	return -EMEDIUMTYPE;
}

static int read_file(struct config *config, const char *path)
{
	struct reader reader = { .path = path, .config = config };
	int r;

	r = open_file(path, &reader.file);
	if (r < 0)
		return r;
	r = ini_parse_stream(read_line, &reader, read_setting, &reader);
	fclose(reader.file);
	if (reader.error < 0)
		return reader.error;
	return r == -2 ? -ENOMEM : 0;
}

static int is_configuration(const struct dirent *d)
{
	const char *suffix = strrchr(d->d_name, '.');

	return suffix && suffix != d->d_name && !strcmp(suffix, ".conf");
}

/* alphasort() would follow the locale */
static int compare_names(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static int read_directory(struct config *config, const char *directory)
{
	struct dirent **entries;
	int n, r = 0;

	n = scandir(directory, &entries, is_configuration, compare_names);
	if (n < 0) {
		if (errno == ENOMEM)
			return -ENOMEM;
		if (errno != ENOENT)
			log_errno(
				LOG_WARNING, errno, "Cannot read %s, going on without", directory);
		return 0;
	}
	for (int i = 0; i < n; i++) {
		_cleanup_(freep) char *path = NULL;

		if (r == 0 && asprintf(&path, "%s/%s", directory, entries[i]->d_name) < 0) {
			path = NULL;
			r = -ENOMEM;
		}
		if (path)
			r = read_file(config, path);
		if (r < 0 && r != -ENOMEM) {
			log_errno(LOG_WARNING, r, "Cannot read %s, going on without", path);
			r = 0;
		}
		free(entries[i]);
	}
	free(entries);
	return r;
}

static bool is_protected(const char *file_system)
{
	for (size_t i = 0; i < ELEMENTS(unprotected_file_systems); i++)
		if (!strcmp(file_system, unprotected_file_systems[i]))
			return false;
	return strncmp(file_system, "fuse.", strlen("fuse.")) != 0;
}

static void warn_of_file_systems(const struct config *config)
{
	for (char *const *name = config->file_systems; *name; name++)
		if (!is_protected(*name))
			log_warning("FileSystems= has %s: leases there do not see all who change a file, "
				    "such as its server, another machine, or who uses the layer below. What "
				    "is pinned there is not protected from them.",
				*name);
}

int config_load(const char *path, struct config *ret)
{
	_cleanup_(config_clear) struct config config = defaults;
	_cleanup_(freep) char *directory = NULL;
	int r;

	r = parse_list(default_file_systems, &config.file_systems);
	if (r < 0)
		return r;
	r = read_file(&config, path ? path : CONFIG_FILE);
	if (r < 0 && (path || r != -ENOENT))
		return r;
	if (asprintf(&directory, "%s.d", path ? path : CONFIG_FILE) < 0) {
		directory = NULL;
		return -ENOMEM;
	}
	r = read_directory(&config, directory);
	if (r < 0)
		return r;
	warn_of_file_systems(&config);
	*ret = config;
	config.file_systems = NULL;
	return 0;
}

void config_clear(struct config *config)
{
	list_free(config->file_systems);
	config->file_systems = NULL;
}

int config_read(const char *path, struct config **ret)
{
	struct config *config;
	int r;

	config = malloc(sizeof(*config));
	if (!config)
		return -ENOMEM;
	r = config_load(path, config);
	if (r < 0) {
		free(config);
		return r;
	}
	config->n_refs = 1;
	*ret = config;
	return 0;
}

struct config *config_ref(struct config *config)
{
	config->n_refs++;
	return config;
}

struct config *config_unref(struct config *config)
{
	if (!config || --config->n_refs > 0)
		return NULL;
	config_clear(config);
	free(config);
	return NULL;
}
