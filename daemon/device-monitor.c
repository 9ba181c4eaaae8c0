/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "device-monitor.h"

#include <sys/types.h>

#include "admin.h"
#include "broker.h"

static int on_device(sd_device_monitor *monitor, sd_device *device, void *userdata)
{
	sd_device_action_t action;
	dev_t number;

	if (sd_device_get_action(device, &action) >= 0 && action == SD_DEVICE_REMOVE &&
	    sd_device_get_devnum(device, &number) >= 0)
		admin_remove_device(userdata, number);
	return 0;
}

int device_monitor_new(struct broker *broker, sd_device_monitor **ret)
{
	sd_device_monitor *monitor = NULL;
	int r;

	r = sd_device_monitor_new(&monitor);
	if (r >= 0)
		r = sd_device_monitor_filter_add_match_subsystem_devtype(
			monitor, "infiniband_verbs", NULL);
	if (r >= 0)
		r = sd_device_monitor_attach_event(monitor, broker->event);
	if (r >= 0)
		r = sd_device_monitor_start(monitor, on_device, broker);
	if (r >= 0)
		*ret = monitor;
	else
		sd_device_monitor_unref(monitor);
	return r;
}
