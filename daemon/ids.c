/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ids.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/file.h>

#include "log.h"
#include "macro.h"

#define RESERVE 65536

static void reserve(struct ids *ids)
{
	char text[24];
	int n;

	ids->reserved = ids->last + RESERVE;
	if (ids->fd < 0)
		return;
	n = snprintf(text, sizeof(text), "%020" PRIu64 "\n", ids->reserved);
	if (pwrite(ids->fd, text, (size_t)n, 0) != n)
		log_errno(LOG_WARNING, errno, "Cannot record which identifiers are in use");
}

int ids_open(struct ids *ids, const char *path)
{
	char text[24] = "";

	*ids = (struct ids){ .fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600) };
	if (ids->fd < 0) {
		log_errno(LOG_WARNING, errno, "Cannot open %s, identifiers begin anew", path);
	} else if (flock(ids->fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK) {
		ids_close(ids);
		return -EADDRINUSE;
	} else if (pread(ids->fd, text, sizeof(text) - 1, 0) > 0) {
		ids->last = strtoull(text, NULL, 10);
	}
	reserve(ids);
	return 0;
}

void ids_close(struct ids *ids)
{
	ids->fd = safe_close(ids->fd);
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
	if (++ids->last > ids->reserved)
		reserve(ids);
	return ids->last;
}
