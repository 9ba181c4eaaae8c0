/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-device.h>

struct broker;

/*
 * Hears of the removal of RDMA devices. The kernel tells when it has begun: it then waits for all who have a
 * device open, and we are among them. sd-device takes messages from udev alone, which has them from the
 * kernel. Where there is no udev nothing is heard, and RevokeDevice() does the same.
 */
int device_monitor_new(struct broker *broker, sd_device_monitor **ret);
