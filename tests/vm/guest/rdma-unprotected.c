/* SPDX-License-Identifier: LGPL-2.1-or-later */

/* As client/examples/rdma-server.c, but without the broker: DEVICE PORT FILE. */

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "client/examples/rdma-pair.h"

int main(int argc, char *argv[])
{
	struct offer offer = {0};
	struct pair pair = {0};
	struct ibv_mr *region;
	struct ibv_pd *pd;
	struct stat st;
	char answer;
	void *map;
	int fd, s;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 4)
		return EXIT_FAILURE;
	pd = ibv_alloc_pd(device_open(argv[1]));
	fd = open(argv[3], O_RDWR | O_CLOEXEC);
	if (!pd || fd < 0 || fstat(fd, &st) < 0)
		fail(argv[3]);
	map = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	region = ibv_reg_mr(
		pd, map, (size_t)st.st_size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	if (!region)
		fail("Cannot register the file");
	s = listen_at(argv[2]);
	printf("holding %zu bytes\n", region->length);
	s = accept(s, NULL, NULL);
	if (s < 0 || pair_connect(&pair, pd, s) < 0)
		fail("Cannot connect with the client");
	offer = (struct offer){(uintptr_t)map, region->length, region->rkey, 0};
	send_all(s, &offer, sizeof(offer));
	while (recv(s, &answer, 1, 0) > 0)
		;
	return EXIT_SUCCESS;
}
