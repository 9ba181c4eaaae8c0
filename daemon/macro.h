/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define _cleanup_(f) __attribute__((cleanup(f)))
#define ELEMENTS(a)  (sizeof(a) / sizeof((a)[0]))

#define TAKE_FD(fd)                                                                                \
	({                                                                                         \
		int *_fd = &(fd), _taken = *_fd;                                                   \
		*_fd = -1;                                                                         \
		_taken;                                                                            \
	})
#define TAKE_PTR(p)                                                                                \
	({                                                                                         \
		__typeof__(p) *_p = &(p), _taken = *_p;                                            \
		*_p = NULL;                                                                        \
		_taken;                                                                            \
	})

#define container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))

#define USEC_PER_SEC  1000000ULL
#define USEC_PER_MSEC 1000ULL
#define USEC_INFINITY UINT64_MAX

/* Ends a noun after its number: "%u pin%s". */
#define PLURAL(n) ((n) == 1 ? "" : "s")

/* CLOCK_MONOTONIC, microseconds */
static inline uint64_t now_usec(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * USEC_PER_SEC + (uint64_t)ts.tv_nsec / 1000;
}

/* Good for differences */
static inline uint32_t now_msec(void)
{
	return (uint32_t)(now_usec() / USEC_PER_MSEC);
}

/* For our own descriptors, whose closing cannot wait. Clients' go through offload_close(). */
static inline int safe_close(int fd)
{
	if (fd >= 0) {
		int e = errno;

		close(fd);
		errno = e;
	}
	return -1;
}

static inline void close_fdp(int *fd)
{
	safe_close(*fd);
}

static inline void freep(void *p)
{
	free(*(void **)p);
}
