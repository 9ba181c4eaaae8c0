/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Preloaded into the daemon: after $FORKS_ALLOWED, no process of it can fork any more. Each process counts its
 * own, and its parent's before it. */
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static long n_forks;

__attribute__((visibility("default"))) pid_t fork(void)
{
	const char *allowed = getenv("FORKS_ALLOWED");
	pid_t (*real)(void) = (pid_t(*)(void))dlsym(RTLD_NEXT, "fork");

	if (allowed && n_forks++ >= atol(allowed)) {
		errno = EAGAIN;
		return -1;
	}
	return real();
}
