/* SPDX-License-Identifier: LGPL-2.1-or-later */
#define HASH_NONFATAL_OOM 1
#define HASH_FUNCTION     HASH_OAT /* HASH_JEN falls through cases, which clang warns of */
#include "daemon/state/reader.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "daemon/manager/notify.h"
#include "daemon/state/journal.h"
#include "daemon/util/ids.h"
#include "daemon/util/log.h"
#include "protocol/macro.h"

struct entry *state_reader_find(struct state_reader *r, const uint64_t key[static 2])
{
	struct entry *e;

	HASH_FIND(hh, r->entries, key, sizeof(e->key), e);
	return e;
}

static int add_entry(struct state_reader *r, const uint64_t key[static 2], char *line)
{
	struct entry *e = state_reader_find(r, key);

	if (e) {
		e->line = line;
		return 0;
	}
	e = calloc(1, sizeof(*e));
	if (!e)
		return -ENOMEM;
	memcpy(e->key, key, sizeof(e->key));
	e->line = line;
	HASH_ADD(hh, r->entries, key, sizeof(e->key), e);
	if (!e->hh.tbl) { /* how uthash tells of missing memory */
		free(e);
		return -ENOMEM;
	}
	return 0;
}

static void remove_entry(struct state_reader *r, const uint64_t key[static 2])
{
	struct entry *e = state_reader_find(r, key);

	if (e) {
		HASH_DEL(r->entries, e);
		free(e);
	}
}

/* " KEY=123", where a line goes on: 1; something else: 0; no identifier: -EBADMSG. */
static int read_id(struct state_reader *r, const char **line, const char *key, uint64_t *ret)
{
	size_t n = strlen(key);

	if (strncmp(*line, key, n) != 0)
		return 0;
	if (!ids_parse(*line + n, line, ret) || (**line && **line != ' '))
		return -EBADMSG;
	ids_pass(r->ids, *ret);
	return 1;
}

/* What a line is about, by the fields that it begins with. */
static int read_key(struct state_reader *r, const char *line, uint64_t key[static 2])
{
	const char *fields = line + strcspn(line, " ");
	int n = read_id(r, &fields, " id=", &key[0]);

	if (n != 0)
		return n;
	n = read_id(r, &fields, " client=", &key[0]);
	if (n > 0)
		n = read_id(r, &fields, " file=", &key[1]);
	return n != 0 ? n : read_id(r, &fields, " reserved=", &key[1]);
}

static int read_line(struct state_reader *r, char *line)
{
	uint64_t key[2] = {};
	int n = read_key(r, line, key);

	if (n < 0) {
		r->n_damaged++;
		log_error("The state of the run before has a damaged line about a %.*s.",
			  (int)strcspn(line, " "), line);
	}
	if (n <= 0 || key[0] == 0)
		return 0;
	if (strncmp(line, "gone ", 5) != 0 && strncmp(line, "unuse ", 6) != 0)
		return add_entry(r, key, line);
	remove_entry(r, key);
	return 0;
}

/* What follows the last newline was cut off by the end of its writer. */
static int read_lines(struct state_reader *r, char *text)
{
	char *line = text, *end = strchr(text, '\n');
	int error = 0;

	if (!end || (size_t)(end - line) != strlen(STATE_HEADER) ||
	    strncmp(line, STATE_HEADER, strlen(STATE_HEADER)) != 0)
		return -EPROTONOSUPPORT;
	for (line = end + 1; error >= 0 && (end = strchr(line, '\n')); line = end + 1) {
		*end = 0;
		notifier_tell_progress(r->notifier);
		error = read_line(r, line);
	}
	return error;
}

/* The file's time is of when its writer was last seen awake. */
static uint64_t written_usec(const struct stat *st)
{
	struct timespec now;
	int64_t age;

	clock_gettime(CLOCK_REALTIME, &now);
	age = (now.tv_sec - st->st_mtim.tv_sec) * (int64_t)USEC_PER_SEC +
	      (now.tv_nsec - st->st_mtim.tv_nsec) / 1000;
	return age > 0 && (uint64_t)age < now_usec() ? now_usec() - (uint64_t)age : now_usec();
}

static int read_file(struct state_reader *r, const char *path)
{
	_cleanup_(close_fdp) int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
	struct stat st;
	size_t n = 0;

	if (fd < 0 || fstat(fd, &st) < 0)
		return -errno;
	r->since_usec = written_usec(&st);
	r->text = malloc((size_t)st.st_size + 1);
	if (!r->text)
		return -ENOMEM;
	while (n < (size_t)st.st_size) {
		ssize_t k = read(fd, r->text + n, (size_t)st.st_size - n);

		if (k < 0)
			return -errno;
		if (k == 0)
			break;
		n += (size_t)k;
	}
	r->text[n] = 0;
	return 0;
}

int state_reader_open(struct state_reader *r, const char *path)
{
	int error = read_file(r, path);

	return error < 0 ? error : read_lines(r, r->text);
}

struct entry *state_reader_next(const struct state_reader *r, const struct entry *e)
{
	return e ? e->hh.next : r->entries;
}

void state_reader_close(struct state_reader *r)
{
	struct entry *e;

	while ((e = r->entries)) {
		HASH_DEL(r->entries, e);
		free(e);
	}
	free(r->text);
	r->text = NULL;
}
