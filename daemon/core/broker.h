/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/core/client.h"
#include "daemon/core/context.h"
#include "daemon/core/file.h"
#include "daemon/core/observer.h"
#include "daemon/core/pin.h"
#include "daemon/core/revocation.h"
#include "daemon/core/settle.h"
#include "daemon/manager/fd-store.h"
#include "daemon/util/config.h"
#include "daemon/util/ids.h"
#include "daemon/util/offload.h"
#include "daemon/util/user.h"

/*
 * The registries of everything there is, and what is done for clients and administrators: the faces translate,
 * the decisions are made below here.
 */

#define BROKER_ENDED_MAX 64 /* ended revocations that are remembered */

struct blame;
struct bus;
struct device_monitor;
struct hearing;
struct watch;

RB_HEAD(client_ids, client);
RB_HEAD(context_ids, context);
RB_HEAD(file_ids, file);
RB_HEAD(file_inodes, file);
RB_HEAD(file_fds, file);
RB_HEAD(pin_ids, pin);
RB_HEAD(revocation_ids, revocation);

/* Knows whose process a name on the bus is: see client_verify_bus_name(). */
struct name_authority {
	int (*verify)(struct name_authority *names, struct client *client,
		      void (*done)(int r, struct refusal *refusal, void *userdata), void *userdata);
};

/* Writes down what OBSERVED_RECORDED has told. */
struct journal {
	void (*flush)(struct journal *journal);
};

struct broker {
	sd_event *event;
	struct config *config; /* reference; the one that was read last */
	struct users *users;
	struct offload *offload;
	struct hearing *hearing; /* hears of breaks of leases */
	struct sharings *sharings; /* files whose description several uids were given */
	struct watch *watch; /* inotify, for files that are pinned, or have no lease */
	struct device_monitor *devices; /* whose removal is heard of; NULL: none */
	struct blame *blame; /* finds out who broke a lease */
	struct bus *bus; /* NULL: none wanted */

	struct observers observers;
	struct name_authority *names; /* NULL: there is no bus */
	struct journal *journal;      /* NULL: nothing outlives this process */

	struct client_ids clients;
	struct context_ids contexts;
	struct file_ids files;
	struct pin_ids pins;
	struct revocation_ids revocations; /* running and remembered ones */
	struct revocation_list ended;      /* remembered, oldest first */
	unsigned n_ended, n_running, n_files, n_clients;
	unsigned n_pins; /* those that are not over */

	struct file_inodes files_by_inode;
	struct file_fds files_by_fd; /* by the lease's descriptor: what si_fd names */

	struct listened listened;
	struct ids ids;
	struct store store;
	uint64_t resume_usec; /* holders of the run before are waited for until then; 0: no more */
	uint64_t n_overflows; /* of the signal queue */
	uint64_t looked_for;  /* contexts have been looked for with their clients, up to this one */
	sd_event_source *audit;
	bool stale_signals; /* of leases that the run before took: si_fd is as it was there */
	bool stopping;
	void (*stopped)(void *userdata); /* called once everything has been let go */
	void *stopped_userdata;
};

/* Takes the reference over on success. */
int broker_new(sd_event *event, struct config *config, struct broker **ret);
struct broker *broker_free(struct broker *broker);

/* Goes by another configuration from now on; takes the reference over. What has begun goes on as it
 * was planned. */
void broker_set_config(struct broker *broker, struct config *config);

/* Before anybody is told of a change, it has to be written down. */
void broker_flush(struct broker *broker);

/* Ids are of one series for all kinds. */
uint64_t broker_next_id(struct broker *broker);

/* Lets everything go by revocations with cause "shutdown", then calls stopped(). */
void broker_stop(struct broker *broker, void (*stopped)(void *userdata), void *userdata);

/* Calls stopped() if the broker is stopping and no revocation is running any more. */
void broker_check_stopped(struct broker *broker);

/* registry.c; next gives the first with an id greater than `after`, or NULL. */
struct client *broker_find_client(struct broker *broker, uint64_t id);
struct context *broker_find_context(struct broker *broker, uint64_t id);
struct file *broker_find_file(struct broker *broker, uint64_t id);
struct pin *broker_find_pin(struct broker *broker, uint64_t id);
struct revocation *broker_find_revocation(struct broker *broker, uint64_t id);
struct file *broker_find_inode(struct broker *broker, struct inode_key key);
struct file *broker_find_lease_fd(struct broker *broker, int fd);
struct client *broker_next_client(struct broker *broker, uint64_t after);
struct context *broker_next_context(struct broker *broker, uint64_t after);
struct file *broker_next_file(struct broker *broker, uint64_t after);
struct pin *broker_next_pin(struct broker *broker, uint64_t after);
struct revocation *broker_next_revocation(struct broker *broker, uint64_t after);

void broker_add_client(struct broker *broker, struct client *client);
void broker_remove_client(struct broker *broker, struct client *client);
void broker_add_context(struct broker *broker, struct context *context);
void broker_remove_context(struct broker *broker, struct context *context);
void broker_add_file(struct broker *broker, struct file *file);
void broker_remove_file(struct broker *broker, struct file *file);
void broker_add_lease_fd(struct broker *broker, struct file *file);
void broker_remove_lease_fd(struct broker *broker, struct file *file);
void broker_add_pin(struct broker *broker, struct pin *pin);
void broker_remove_pin(struct broker *broker, struct pin *pin);
void broker_add_revocation(struct broker *broker, struct revocation *revocation);
void broker_remove_revocation(struct broker *broker, struct revocation *revocation);
/* It has ended: remembered from now on, the oldest forgotten. */
void broker_retire_revocation(struct broker *broker, struct revocation *revocation);

/* Brings the next audit forward, which tries again what could not be done. */
void broker_audit_soon(struct broker *broker);
