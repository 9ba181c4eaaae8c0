/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

#include "daemon/core/notice.h"
#include "daemon/kernel/process.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

struct broker;
struct context;
struct file;
struct user;
struct log_fields;

#define CLIENT_TOKEN_SIZE 33 /* 128 random bits in hexadecimal, and a NUL */

/* A client's hold on a file. */
struct use {
	struct client *client; /* client::uses, which owns it */
	struct file *file;     /* file::uses; NULL: withdrawn or lost, and kept only to tell the client */
	uint64_t file_id;
	uint64_t mount;        /* that the client's descriptor was opened through; 0: not known, or several */
	uint64_t revocation;   /* withdrawn, or to be when its last pin has ended: on whose word */
	enum access access;    /* what was asked for */
	bool writable;         /* the client was given a descriptor that can write */
	unsigned n_lost; /* of its pins, that a restart has lost */
	uint64_t lost; /* a restart has lost it, or some of its pins, and tells so by this number; 0: none */
	char *path;    /* owned; of a file that was lost */
	unsigned n_pins;       /* not over */
	RB_ENTRY(use) of_client;
	RB_ENTRY(use) by_lost; /* client::lost, if a restart has lost something of it */
	LIST_ENTRY(use) of_file;
};

RB_HEAD(uses, use);
RB_HEAD(lost_uses, use);

/* Somebody who speaks for a client, or is told of what concerns it: has this in it. */
struct session {
	struct client *client;                   /* client::sessions; NULL: none yet */
	void (*forget)(struct session *session); /* the client is being freed: session_end() */
	void (*close)(struct session *session);  /* ends the connection, and with it the session, at once */
	LIST_ENTRY(session) of_client;
};

/*
 * One holder. It lives as long as its process, whatever becomes of its connections, or, when that
 * has died, as long as its pins; without pins it ends with its last connection, after a restart not
 * before all had time to resume (a Resume that nobody read in time may have been given up, and be
 * tried again).
 */
struct client {
	uint64_t id;
	struct broker *broker;  /* broker::clients */
	struct user *user;      /* reference; one LIMIT_CLIENTS */
	struct process process; /* owned */
	char *name;             /* owned; NULL: none given */
	char *bus_name;         /* owned; NULL: none */
	bool bus_name_verified; /* seen on the bus as this process's */
	bool dead;              /* the process has ended */
	bool inherited;         /* it is not the one that connected */
	bool restored; /* of the run before: without pins or connections it is waited for, too */
	char token[CLIENT_TOKEN_SIZE];
	struct uses uses;              /* owned */
	struct lost_uses lost;         /* of them */
	LIST_HEAD(, context) contexts; /* owned */
	LIST_HEAD(, session) sessions; /* owned by those who have them */
	unsigned n_files, n_contexts, n_pins;
	unsigned n_reaping; /* contexts of which it is being looked who has them */
	uint64_t pinned_bytes;
	unsigned n_told; /* of its pins: pin_is_told() */
	sd_event_source *death;
	sd_event_source *work; /* goes on with what its death or end makes to do; NULL: not yet needed */
	bool working;
	bool ended; /* it is being freed, some of it each turn of the loop, and cannot be taken up again */
	RB_ENTRY(client) by_id; /* broker::clients */
};

/* Takes the described process over on success. Charges LIMIT_CLIENTS: REFUSED with ret_refusal. */
int client_new(struct broker *broker, struct user *user, struct process *process,
	       struct client **ret, struct refusal *ret_refusal);
struct client *client_free(struct client *client);

/* Takes them over; NULL: none. The one on the bus counts once it was verified. */
void client_set_names(struct client *client, char *name, char *bus_name);
/*
 * Asks the bus whether the client's bus_name is its process's, and calls done() then: with 0, with
 * REFUSED if it is another's, or with a negative errno if it could not be asked. Returns negative errno
 * if it cannot be asked at present; the name is then asked for when the bus is there.
 */
int client_verify_bus_name(struct client *client,
			   void (*done)(int r, struct refusal *refusal, void *userdata), void *userdata);

/* Its process is dead, and this one has a context of its, and perhaps its connections: it is the holder from now
 * on. Takes the process over. */
void client_inherit(struct client *client, struct process *heir);
/* Is there a process that can be told, and let go? */
bool client_can_answer(const struct client *client);

void session_begin(struct session *session, struct client *client);
void session_end(struct session *session);
static inline bool client_is_connected(const struct client *client)
{
	return !LIST_EMPTY(&client->sessions);
}
/* Ends all of its sessions. It goes with the last of them, unless it has pins. */
void client_disconnect(struct client *client);
/* The last session has ended: frees it, unless it has pins. */
void client_disconnected(struct client *client);
/* Frees it if it is dead, or without a connection, and nothing is left of it. */
void client_collect(struct client *client);

/* For what the log has about it. */
struct log_fields client_fields(const struct client *client);

bool client_check_token(const struct client *client, const char *token);

struct use *client_find_use(struct client *client, const struct file *file);
/* By the file's id, also one that was withdrawn. NULL with a refusal. */
struct use *client_find_use_of(struct client *client, int64_t file_id, struct refusal *ret_refusal);
/* REFUSED if a limit of the user is reached. */
int client_add_use(struct client *client, struct file *file, enum access access, bool writable,
		   struct use **ret, struct refusal *ret_refusal);
/* On a file that a restart has lost, to tell the client so by this number. Charges past the limit. */
int client_add_lost_use(struct client *client, uint64_t file_id, uint64_t lost, const char *path);
struct use *use_free(struct use *use);
/* A restart has lost it, or pins on its file, and tells so by this number. */
void use_set_lost(struct use *use, uint64_t lost);
/* The next of those by that number; NULL: none. */
struct use *client_next_lost(struct client *client, uint64_t after);
/* The next by the file's identifier; NULL: none. */
struct use *client_next_use(struct client *client, uint64_t after);
/* Its file is being withdrawn by a revocation: takes it away from the client, now or with its last pin. */
void use_withdraw(struct use *use, uint64_t revocation);
/* Takes away one that is to be, if it has no pins any more. */
void use_collect(struct use *use);

/* Reserves pins, all or none. REFUSED with what stands in the way. */
int client_pin(struct client *client, const struct msg_pin_in *in, int64_t *ret_ids,
	       struct refusal *ret_refusal);
/* Lets a pin go. Returns true if its handle had been destroyed by force, so that the client must not touch it. */
bool client_unpin(struct pin *pin);

/* The client's own objects; NULL with a refusal for what is not there or another's. */
struct pin *client_find_pin(struct client *client, int64_t id, struct refusal *ret_refusal);
struct context *client_find_context(struct client *client, int64_t id,
				    struct refusal *ret_refusal);

void client_info(const struct client *client, struct msg_client_info *ret);
