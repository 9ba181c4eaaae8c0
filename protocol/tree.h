/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <bsd/sys/tree.h>

/* A red-black tree for one file's own use, of whose functions some may not be used. */
#define TREE_GENERATE(name, type, field, compare)                                                  \
	RB_GENERATE_INTERNAL(name, type, field, compare, static __attribute__((unused)))
