/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <errno.h>
#include <fcntl.h>
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

/* NULL where it is empty, too. */
static inline const char *environment(const char *name)
{
	const char *value = secure_getenv(name);

	return value && *value ? value : NULL;
}

/* Behind what strerror() says: what to do where it is a limit of this process. */
static inline const char *limit_advice(int error)
{
	return error == EMFILE ? " Raise the limit of open files (ulimit -n)." : "";
}

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

/* Before anything else is opened, which would get the number of a standard descriptor that is closed, and with it
 * what is said to people. Writing fails all the same. */
static inline void fill_standard_descriptors(void)
{
	int fd;

	do
		fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	while (fd >= 0 && fd <= STDERR_FILENO);
	safe_close(fd);
}

static inline void freep(void *p)
{
	free(*(void **)p);
}
