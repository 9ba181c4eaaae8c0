/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>

/* In memory that the test shares with the daemon. */
struct refusing {
	atomic_bool on;
	atomic_long n_asked; /* allocations, while on */
	atomic_long after;   /* so many are granted, */
	atomic_long n;       /* the next so many are refused */
	atomic_long
		n_live; /* allocated and not freed, also while off; counted from the beginning */
};

/* In a test that refuses itself memory. */
struct refusing *refuse_here(void);
