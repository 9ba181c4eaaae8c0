/* SPDX-License-Identifier: LGPL-2.1-or-later */

/*
 * Holds a file through a device, with libpinbroker-verbs, and does what it is told, line by line:
 * DEVICE FILE. Says the result of each, 0 or the number of an error, and the cause of each notice.
 */

#include "client/examples/rdma-pair.h"
#include "pinbroker-verbs.h"

#include <errno.h>
#include <poll.h>
#include <sys/mman.h>

#define SIZE 65536

static pinbroker *pb;
static pinbroker_file *file;
static struct ibv_context *device;
static struct ibv_pd *pd;
static struct ibv_mr *region;
static void *map;

static void on_revoke(pinbroker *p, const struct pinbroker_notice *notice, void *userdata)
{
	printf("notice %s\n", pinbroker_cause_name(notice->cause));
}

static int do_register(void)
{
	struct ibv_mr *mr = pinbroker_reg_mr(pb, file, 0, pd, map, SIZE, IBV_ACCESS_LOCAL_WRITE);

	if (!mr)
		return -errno;
	region = mr;
	return 0;
}

static int do_deregister(void)
{
	return pinbroker_dereg_mr(pb, region);
}

static int do_close(void)
{
	ibv_dealloc_pd(pd);
	return pinbroker_close_device(pb, device);
}

/* … of this process's own, without a word to the broker. */
static int do_drop(void)
{
	ibv_dealloc_pd(pd);
	return ibv_close_device(device);
}

static int do_close_file(void)
{
	munmap(map, SIZE);
	return pinbroker_close_file(file);
}

static const struct {
	const char *name;
	int (*run)(void);
} commands[] = {
	{"register\n", do_register},
	{"deregister\n", do_deregister},
	{"close\n", do_close},
	{"drop\n", do_drop},
	{"close-file\n", do_close_file},
};

static void obey(const char *line)
{
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
		if (strcmp(line, commands[i].name) == 0)
			printf("%s %d\n", strtok(strdup(line), "\n"), -commands[i].run());
}

static void check(int r)
{
	if (r < 0) {
		fprintf(stderr, "%s\n", pinbroker_last_error(pb)->message);
		exit(EXIT_FAILURE);
	}
}

int main(int argc, char *argv[])
{
	struct pollfd pfd[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.events = POLLIN}};
	char line[32];

	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	device = device_open(argv[1]);
	pd = ibv_alloc_pd(device);
	if (!pd || pinbroker_new(NULL, NULL, &pb) < 0)
		fail(argv[1]);
	check(pinbroker_set_revoke_callback(pb, on_revoke, NULL));
	check(pinbroker_connect(pb));
	check(pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file));
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, pinbroker_file_get_fd(file), 0);
	if (map == MAP_FAILED)
		fail(argv[2]);
	printf("ready\n");
	pfd[1].fd = pinbroker_get_fd(pb);
	while (poll(pfd, 2, -1) >= 0) {
		if (pfd[1].revents)
			check(pinbroker_dispatch(pb));
		if (pfd[0].revents) {
			if (!fgets(line, sizeof(line), stdin))
				break;
			obey(line);
		}
	}
	return 0;
}
