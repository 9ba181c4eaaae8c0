/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/* A holder that does what it is told, line by line: it says the result of each, 0 or the number of
 * an error, and the cause of each notice. */

#include "client/pinbroker.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct command {
	const char *name;
	int (*run)(void);
};

static pinbroker *pb;

static void check(int r)
{
	if (r < 0) {
		fprintf(stderr, "%s\n", pinbroker_last_error(pb)->message);
		exit(EXIT_FAILURE);
	}
}

static void on_revoke(pinbroker *p, const struct pinbroker_notice *notice, void *userdata)
{
	printf("notice %s\n", pinbroker_cause_name(notice->cause));
}

static void holder_connect(void)
{
	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	check(pinbroker_new(NULL, NULL, &pb));
	check(pinbroker_set_revoke_callback(pb, on_revoke, NULL));
	check(pinbroker_connect(pb));
}

static void holder_obey(const struct command *commands, const char *name)
{
	for (const struct command *c = commands; c->name; c++)
		if (strcmp(c->name, name) == 0) {
			printf("%s %d\n", name, -c->run());
			return;
		}
	exit(EXIT_FAILURE);
}

/* Until there is nothing more to do. commands: ends with one without a name. */
static void holder_run(const struct command *commands)
{
	struct pollfd pfd[] = {
		{.fd = STDIN_FILENO, .events = POLLIN},
		{.fd = pinbroker_get_fd(pb), .events = POLLIN},
	};
	char line[32];

	printf("ready\n");
	while (poll(pfd, 2, -1) >= 0) {
		if (pfd[1].revents)
			check(pinbroker_dispatch(pb));
		if (!pfd[0].revents)
			continue;
		if (!fgets(line, sizeof(line), stdin))
			return;
		line[strcspn(line, "\n")] = 0;
		holder_obey(commands, line);
	}
}
