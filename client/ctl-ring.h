/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/*
 * An io_uring for its registered ("fixed") buffers only, by the raw system calls. Each returns a
 * negative errno on failure.
 */

/* The kernel's limit for one buffer. */
#define RING_BUFFER_MAX (1024UL * 1024 * 1024)

int ring_open(void); /* a descriptor, close-on-exec */
int ring_register(int ring_fd, const struct iovec *buffers, unsigned n_buffers);
int ring_drop(int ring_fd, unsigned index); /* one buffer, Linux 5.13 */
int ring_unregister(int ring_fd);           /* all */
