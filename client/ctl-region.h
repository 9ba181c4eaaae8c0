/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl.h"

/* A part of a file that is held; its index in the array is that of the fixed buffer. */
struct region {
	struct pinbroker_range range;
	uint64_t pin; /* 0: none, or let go */
	bool seen;    /* it was there when last looked at */
	bool wanted;  /* asked back, and to be let go of at hold::release_at */
	void *map;    /* owned; NULL: none */
	size_t map_size;
};

/* What mappings of an open file are cut by: more than a page on hugetlbfs, and of a device-DAX. */
size_t map_unit(int fd);

void region_unmap(struct region *region);

/* Maps all, and registers them with the io_uring; all or none. */
int regions_register(struct region *regions, size_t n_regions, int ring_fd, int file_fd,
	enum pinbroker_access access);
/* The same with a page of nothing in the place of each. */
int regions_register_placeholders(struct region *regions, size_t n_regions, int ring_fd);
