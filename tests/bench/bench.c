/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "bench.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

unsigned n_rounds;

void bench_start(int argc, char *argv[], unsigned rounds)
{
	cpu_set_t all, one;
	int cpu = 0;

	n_rounds = argc > 1 && strcmp(argv[1], "short") == 0 ? 2 : rounds;
	assert_true(n_rounds <= ROUNDS_MAX);
	assert_int_equal(sched_getaffinity(0, sizeof(all), &all), 0);
	for (int i = 0; i < CPU_SETSIZE; i++)
		if (CPU_ISSET(i, &all))
			cpu = i; /* the last: interrupts prefer the first */
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	assert_int_equal(sched_setaffinity(0, sizeof(one), &one), 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
}

uint64_t nsec_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

void series_add(struct series *series, double value)
{
	assert_true(series->n < ROUNDS_MAX);
	series->values[series->n++] = value;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

double series_median(struct series *series)
{
	double sorted[ROUNDS_MAX];

	assert_true(series->n > 0);
	memcpy(sorted, series->values, series->n * sizeof(double));
	qsort(sorted, series->n, sizeof(double), compare);
	return (sorted[(series->n - 1) / 2] + sorted[series->n / 2]) / 2;
}

void report(const char *name, double value, const char *unit)
{
	printf("%s %.6g %s\n", name, value, unit);
}

void report_against(const char *name, struct series *usec, const char *floor_name,
		    struct series *floor_usec, double aim)
{
	struct series ratios = {};
	char line[128];

	for (unsigned i = 0; i < usec->n; i++)
		series_add(&ratios, usec->values[i] / floor_usec->values[i]);
	report(name, series_median(usec), "us");
	report(floor_name, series_median(floor_usec), "us");
	snprintf(line, sizeof(line), "%s-ratio", name);
	report(line, series_median(&ratios), "x");
	if (aim > 0) {
		snprintf(line, sizeof(line), "%s-aim", name);
		report(line, aim, "x");
	}
}

pid_t serve(void (*run_server)(int fd, void *userdata), void *userdata, int *ret_fd)
{
	int fds[2];
	pid_t pid;

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(fds[0]);
		run_server(fds[1], userdata);
		_exit(0);
	}
	close(fds[1]);
	*ret_fd = fds[0];
	return pid;
}

size_t receive_message(int s, char *buffer, size_t size)
{
	size_t n = 0;

	do {
		char control[CMSG_SPACE(sizeof(int))];
		struct iovec iov = { buffer + n, size - n };
		struct msghdr mh = { .msg_iov = &iov,
				     .msg_iovlen = 1,
				     .msg_control = control,
				     .msg_controllen = sizeof(control) };
		ssize_t r = recvmsg(s, &mh, MSG_CMSG_CLOEXEC);
		struct cmsghdr *c;

		if (r <= 0)
			return 0;
		c = CMSG_FIRSTHDR(&mh);
		if (c && c->cmsg_type == SCM_RIGHTS) {
			int fd;

			memcpy(&fd, CMSG_DATA(c), sizeof(int));
			close(fd);
		}
		n += (size_t)r;
		assert_true(n < size);
	} while (buffer[n - 1] != 0);
	return n;
}

const char *call(int s, const char *text, int fd)
{
	static char reply[65536];

	assert_true(send_with_fd(s, text, strlen(text) + 1, fd));
	assert_true(receive_message(s, reply, sizeof(reply)) > 0);
	if (strstr(reply, "\"error\""))
		fail_msg("%s: %s", text, reply);
	return reply;
}

long reply_number(const char *reply, const char *name)
{
	char key[64];
	const char *p;

	snprintf(key, sizeof(key), "\"%s\":", name);
	p = strstr(reply, key);
	assert_non_null(p);
	return strtol(p + strlen(key) + strspn(p + strlen(key), "["), NULL, 10);
}
