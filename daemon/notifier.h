/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-event.h>

struct broker;

/*
 * The service manager's socket. Nothing waits for its reader, as sd_notify() would: what does not go
 * through is told once it does, or with the next status.
 */
struct notifier {
	struct broker *broker;
	int fd; /* -1: there is no manager */
	struct sockaddr_un address;
	socklen_t address_size;
	sd_event_source *writable, *timer;
	uint64_t watchdog_usec; /* 0: none wanted */
	bool ready, stopping, alive; /* to be told */
	bool failed;
};

#define NOTIFIER_NULL { .fd = -1 }

/* Does nothing where no manager is. Tells at once that the service is ready; a status now and then, and
 * that it is alive. */
int notifier_start(struct notifier *notifier, struct broker *broker);
void notifier_tell_stopping(struct notifier *notifier);
void notifier_stop(struct notifier *notifier);
