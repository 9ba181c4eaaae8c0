/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "refuse-memory.h"

/* Loaded into the daemon, or linked into a test: refuses memory when the test says so. */

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t size);
void __libc_free(void *p);

__attribute__((visibility("default"))) void *malloc(size_t size);
__attribute__((visibility("default"))) void *calloc(size_t n, size_t size);
__attribute__((visibility("default"))) void *realloc(void *p, size_t size);
__attribute__((visibility("default"))) void free(void *p);

struct json_object;
struct json_tokener;
struct json_object *json_tokener_parse_ex(struct json_tokener *tokener, const char *text, int size);

static struct refusing *refusing;

struct refusing *refuse_here(void)
{
	static struct refusing here;

	return refusing = &here;
}

static void __attribute__((constructor)) begin(void)
{
	const char *path = getenv("PINBROKER_TEST_MEMORY");
	void *p;
	int fd;

	if (!path)
		return;
	fd = open(path, O_RDWR | O_CLOEXEC);
	p = mmap(NULL, sizeof(*refusing), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd < 0 || p == MAP_FAILED)
		abort();
	close(fd);
	refusing = p;
}

static __thread bool parsing;

/* json-c 0.16 crashes where its tokener is refused memory; the daemon sees to it before that there
 * is some. */
__attribute__((visibility("default"))) struct json_object *json_tokener_parse_ex(
	struct json_tokener *tokener, const char *text, int size)
{
	static struct json_object *(*real)(struct json_tokener *, const char *, int);
	struct json_object *object;

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "json_tokener_parse_ex");
	parsing = true;
	object = real(tokener, text, size);
	parsing = false;
	return object;
}

static bool refuse(void)
{
	long i;

	if (!refusing || parsing || !atomic_load(&refusing->on))
		return false;
	i = atomic_fetch_add(&refusing->n_asked, 1);
	if (i < atomic_load(&refusing->after) ||
		i >= atomic_load(&refusing->after) + atomic_load(&refusing->n))
		return false;
	errno = ENOMEM;
	return true;
}

static void *count(void *p)
{
	if (p && refusing)
		atomic_fetch_add(&refusing->n_live, 1);
	return p;
}

void *malloc(size_t size)
{
	return refuse() ? NULL : count(__libc_malloc(size));
}

void *calloc(size_t n, size_t size)
{
	return refuse() ? NULL : count(__libc_calloc(n, size));
}

void *realloc(void *p, size_t size)
{
	void *q;

	if (refuse())
		return NULL;
	q = __libc_realloc(p, size);
	return p ? q : count(q);
}

void free(void *p)
{
	if (p && refusing)
		atomic_fetch_sub(&refusing->n_live, 1);
	__libc_free(p);
}
