/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-event.h>

#include "daemon/manager/watchdog.h"


/* What is to be told besides the status, with a descriptor or without. */
struct notifier_message {
	STAILQ_ENTRY(notifier_message) of_notifier;
	uint64_t serial;
	int fd; /* owned; -1: none */
	char text[];
};

/* Wants to know when all that was told by now has gone to the manager. */
struct notifier_waiter {
	void (*told)(struct notifier_waiter *waiter);
	uint64_t serial; /* of the last message; 0: does not wait */
	TAILQ_ENTRY(notifier_waiter) of_notifier;
};

/*
 * The service manager's socket. The loop does not wait for its reader, as sd_notify() would: what
 * does not go through is told once it does, in order; of the status only the last one.
 */
struct notifier {
	sd_event *event; /* reference */
	void (*describe)(char *ret, size_t size, void *userdata);
	void *userdata;
	int fd; /* -1: there is no manager */
	struct sockaddr_un address;
	socklen_t address_size;
	sd_event_source *writable, *timer;
	STAILQ_HEAD(, notifier_message) messages; /* owned */
	uint64_t n_messages;                      /* that there ever were */
	TAILQ_HEAD(, notifier_waiter) waiters;
	sd_event_source *patience; /* of the waiters */
	bool hangs; /* it has run out: nobody waits until the manager has heard everything */
	struct watchdog watchdog; /* opened before anything else */
	uint64_t extended_usec; /* when more time to start was last asked for */
	bool ready, stopping, alive; /* to be told */
	bool failed;
};

#define NOTIFIER_NULL { .fd = -1 }

/* Finds the manager, if there is one. describe: what there is, for people, at present. */
int notifier_open(struct notifier *notifier, sd_event *event,
		  void (*describe)(char *ret, size_t size, void *userdata), void *userdata);
static inline bool notifier_is_open(const struct notifier *notifier)
{
	return notifier->fd >= 0;
}

/* It is getting on with its start, which may take its time as long as it does. */
void notifier_tell_progress(struct notifier *notifier);
/* Tells at once that the service is ready; a status now and then, and that it is alive. */
int notifier_start(struct notifier *notifier);
/* Tells something else, with a copy of the descriptor (-1: none). */
int notifier_post(struct notifier *notifier, const char *text, int fd);
/* Calls waiter->told() once all that was told by now has gone to the manager, or that takes too
 * long. False: it has, or nobody waits for a manager that hangs. */
bool notifier_wait(struct notifier *notifier, struct notifier_waiter *waiter);
void notifier_forget(struct notifier *notifier, struct notifier_waiter *waiter);
/* Does not tell it after all. False: it is too late for that. */
bool notifier_cancel(struct notifier *notifier, const char *text);
/* The configuration is being read anew; after that it is ready again. */
void notifier_tell_reloading(struct notifier *notifier);
void notifier_tell_ready(struct notifier *notifier);
void notifier_tell_stopping(struct notifier *notifier);
/* Waits a moment for the manager to hear the rest: it is to keep nothing that has been let go of.
 */
void notifier_stop(struct notifier *notifier);
