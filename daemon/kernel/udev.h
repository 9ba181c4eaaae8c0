/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <sys/types.h>
#include <systemd/sd-event.h>

struct device_monitor;

/*
 * Hears of the removal of RDMA devices. The kernel tells when it has begun: it then waits for all who have a
 * device open, and we are among them. sd-device takes messages from udev alone, which has them from the
 * kernel. Where there is no udev nothing is heard, and RevokeDevice() does the same.
 */
int device_monitor_new(sd_event *event, void (*removed)(dev_t number, void *userdata), void *userdata,
		       struct device_monitor **ret);
struct device_monitor *device_monitor_free(struct device_monitor *monitor);
