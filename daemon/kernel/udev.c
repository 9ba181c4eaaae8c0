/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/kernel/udev.h"

#include <errno.h>
#include <stdlib.h>
#include <systemd/sd-device.h>

struct device_monitor {
	sd_device_monitor *monitor;
	void (*removed)(dev_t number, void *userdata);
	void *userdata;
};

static int on_device(sd_device_monitor *m, sd_device *device, void *userdata)
{
	struct device_monitor *monitor = userdata;
	sd_device_action_t action;
	dev_t number;

	if (sd_device_get_action(device, &action) >= 0 && action == SD_DEVICE_REMOVE &&
	    sd_device_get_devnum(device, &number) >= 0)
		monitor->removed(number, monitor->userdata);
	return 0;
}

int device_monitor_new(sd_event *event, void (*removed)(dev_t number, void *userdata), void *userdata,
		       struct device_monitor **ret)
{
	struct device_monitor *monitor;
	int r;

	monitor = calloc(1, sizeof(*monitor));
	if (!monitor)
		return -ENOMEM;
	monitor->removed = removed;
	monitor->userdata = userdata;
	r = sd_device_monitor_new(&monitor->monitor);
	if (r >= 0)
		r = sd_device_monitor_filter_add_match_subsystem_devtype(
			monitor->monitor, "infiniband_verbs", NULL);
	if (r >= 0)
		r = sd_device_monitor_attach_event(monitor->monitor, event);
	if (r >= 0)
		r = sd_device_monitor_start(monitor->monitor, on_device, monitor);
	if (r < 0) {
		device_monitor_free(monitor);
		return r;
	}
	*ret = monitor;
	return 0;
}

struct device_monitor *device_monitor_free(struct device_monitor *monitor)
{
	if (!monitor)
		return NULL;
	sd_device_monitor_unref(monitor->monitor);
	free(monitor);
	return NULL;
}
