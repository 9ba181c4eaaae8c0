/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/ids.h"

#include <assert.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>

#include "daemon/util/log.h"
#include "protocol/macro.h"

#define RESERVE 65536

/* What the file has: 20 digits and a newline. */
#define LENGTH 21

static void reserve(struct ids *ids)
{
	char text[LENGTH + 1];

	ids->reserved = ids->last + RESERVE;
	if (ids->fd < 0)
		return;
	snprintf(text, sizeof(text), "%020" PRIu64 "\n", ids->reserved);
	if (pwrite(ids->fd, text, LENGTH, 0) != LENGTH || ftruncate(ids->fd, LENGTH) < 0)
		log_errno(LOG_WARNING, errno, "Cannot record which identifiers are in use");
}

bool ids_parse(const char *text, const char **ret_end, uint64_t *ret)
{
	size_t n = strspn(text, "0123456789");
	uint64_t id;

	errno = 0;
	id = n > 0 ? strtoull(text, NULL, 10) : 0;
	if (errno != 0 || id == 0 || id > IDS_MAX)
		return false;
	*ret_end = text + n;
	*ret = id;
	return true;
}

/* A file that was cut off says less than what is in use. */
static void read_file(struct ids *ids, const char *path)
{
	char text[LENGTH + 2] = "";
	ssize_t n = pread(ids->fd, text, LENGTH + 1, 0);
	const char *end;

	if (n == 0) /* it has just been made */
		return;
	if (n != LENGTH || !ids_parse(text, &end, &ids->last) || end != text + LENGTH - 1 ||
		*end != '\n') {
		ids->last = 0;
		log_warning(
			"%s is damaged: identifiers go on after those that the state has.", path);
	}
}

int ids_open(struct ids *ids, const char *path)
{
	*ids = (struct ids){
		.fd = open(path, O_RDWR | O_CREAT | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW, 0600),
	};
	if (ids->fd < 0) {
		log_errno(LOG_WARNING, errno,
			"Cannot open %s, identifiers go on after those that the state has", path);
	} else if (flock(ids->fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK) {
		ids_close(ids);
		return -EADDRINUSE;
	} else {
		read_file(ids, path);
	}
	reserve(ids);
	return 0;
}

void ids_close(struct ids *ids)
{
	ids->fd = safe_close(ids->fd);
}

void ids_pass(struct ids *ids, uint64_t id)
{
	if (id > IDS_MAX || id <= ids->last)
		return;
	ids->last = id;
	if (ids->last > ids->reserved)
		reserve(ids);
}

void ids_give(struct ids *ids, uint64_t id)
{
	ids->given = id;
}

uint64_t ids_next(struct ids *ids)
{
	if (ids->given != 0) {
		uint64_t id = ids->given;

		ids->given = 0;
		return id;
	}
	/* nobody counts from IDS_MAX to there */
	assert(ids->last < INT64_MAX);
	if (++ids->last > ids->reserved)
		reserve(ids);
	return ids->last;
}
