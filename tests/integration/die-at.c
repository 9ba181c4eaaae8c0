/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preloaded into the daemon: ends it, as SIGKILL does, before ($DIE_AT=N) or after ($DIE_AFTER=N)
 * the Nth time that its loop writes anything or sends anything to anybody; or when it has stopped a
 * process
 * ($DIE_ON_STOP). Or has the loop hang for ever, deaf to all signals, the next time that there is a
 * file named $HANG_IF, which it removes. $SLOW: how many microseconds each fstat() of a file takes.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static long n_calls;
static pid_t daemon_pid;

__attribute__((constructor)) static void begin(void)
{
	if (strcmp(program_invocation_short_name, "pinbrokerd") == 0)
		daemon_pid = getpid();
}

/* Not another thread, nor the sentinel, nor what becomes the daemon. */
static bool is_loop(void)
{
	return gettid() == daemon_pid;
}

static void maybe_hang(void)
{
	const char *path = getenv("HANG_IF");
	sigset_t all;

	if (!path || !is_loop() || unlink(path) < 0)
		return;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	for (;;)
		pause();
}

static void maybe_die(const char *variable)
{
	const char *value = getenv(variable);

	if (value && is_loop() && atol(value) == n_calls)
		kill(getpid(), SIGKILL);
}

#define CALL(function, ...)                                                                        \
	({                                                                                         \
		__typeof__(&function) real = (__typeof__(&function))dlsym(RTLD_NEXT, #function);   \
		ssize_t result;                                                                    \
                                                                                                   \
		maybe_hang();                                                                      \
		if (is_loop())                                                          \
			n_calls++;                                                                 \
		maybe_die("DIE_AT");                                                               \
		result = real(__VA_ARGS__);                                                        \
		maybe_die("DIE_AFTER");                                                            \
		result;                                                                            \
	})

__attribute__((visibility("default"))) ssize_t write(int fd, const void *data, size_t size)
{
	return CALL(write, fd, data, size);
}

__attribute__((visibility("default"))) ssize_t send(int fd, const void *data, size_t size, int flags)
{
	return CALL(send, fd, data, size, flags);
}

__attribute__((visibility("default"))) ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	return CALL(sendmsg, fd, message, flags);
}

__attribute__((visibility("default"))) int fstat(int fd, struct stat *st)
{
	int r = fstatat(fd, "", st, AT_EMPTY_PATH);

	if (r >= 0 && S_ISREG(st->st_mode) && getenv("SLOW") && is_loop())
		usleep((useconds_t)atol(getenv("SLOW")));
	return r;
}

__attribute__((visibility("default"))) int pidfd_send_signal(int pidfd, int sig, siginfo_t *info, unsigned flags)
{
	int r = (int)syscall(SYS_pidfd_send_signal, pidfd, sig, info, flags);

	if (sig == SIGSTOP && getenv("DIE_ON_STOP"))
		kill(getpid(), SIGKILL);
	return r;
}
