/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl-probe.h"

/*
 * A long-term pin of a mapping, made and let go at once. 0 or the negative errno of making it;
 * -ENODEV: there is no such device; -ENOTTY: it cannot be tried by a program like this.
 */
int try_pin(enum mechanism mechanism, void *map, size_t size, enum pinbroker_access access);

/* ctl-try-rdma.c: on the first RDMA device; -ENODEV also where built without libibverbs. */
int try_rdma(void *map, size_t size, enum pinbroker_access access, bool on_demand);
