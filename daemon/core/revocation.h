/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "protocol/tree.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <sys/types.h>
#include <systemd/sd-event.h>

#include "daemon/core/pin.h"
#include "daemon/core/revocation-table.h"
#include "daemon/core/selection.h"
#include "daemon/util/log.h"
#include "daemon/util/refusal.h"
#include "protocol/interface.h"

struct broker;
struct client;
struct context;
struct file;
struct pin;
struct slice;

/* What somebody does that cannot go ahead while pins live. A value. */
struct conflict {
	enum cause cause;
	uint64_t offset, length; /* length 0: to the end */
	int64_t size;            /* being truncated to, or INT_NULL */
	pid_t pid;               /* 0: not known */
	int64_t uid;             /* INT_NULL: not known */
	char comm[16];
	char reason[256]; /* an administrator's words, or what a client has done to the lease; or empty */
};

#define REVOCATION_UIDS_MAX 8

/* A pin that a revocation wants gone, or, if it is on demand, whose holder is told. */
struct target {
	struct stake *stake; /* stake::targets, which owns it */
	struct pin *pin;     /* pin::targets */
	uint64_t id;         /* the pin's */
	bool on_demand;      /* as the pin's: it is not waited for */
	LIST_ENTRY(target) of_pin;
	RB_ENTRY(target) by_pin;
};

RB_HEAD(targets, target);

/* What a revocation wants of one context. It has targets as long as it lives. */
struct stake {
	struct revocation *revocation; /* revocation::stakes, which owns it */
	struct context *context;
	uint64_t client, id;    /* identifiers, of the context's client and of the context */
	struct targets targets; /* owned */
	size_t n_awaited;       /* of them, those to wait for */
	RB_ENTRY(stake) by_context;
};

RB_HEAD(stakes, stake);

/* One among a revocation's targets, by identifiers. */
struct place {
	uint64_t client, context, pin;
};

/* A pin that its holder is yet to be told of. */
struct untold {
	uint64_t client, file, context, pin;
};

struct revocation {
	uint64_t id;
	struct broker *broker; /* broker::revocations */
	uint64_t file;         /* id; 0: several */
	char *path;            /* owned; NULL: several files */
	bool by_break;         /* a lease is under break meanwhile */
	bool forced;           /* from the beginning: its holders are told of the end of the detach */
	struct conflict conflict;
	enum revocation_state state; /* assigned by revocation.c's step() only */
	struct stakes stakes;          /* owned; freed at the end */
	size_t n_pinning, n_remaining; /* pins to wait for: those found, and those that are left of them */
	size_t n_clients;              /* whose pins they are */
	enum proof weakest; /* of the pins that ended */
	bool has_proof;     /* at least one did */
	uid_t uids[REVOCATION_UIDS_MAX]; /* of the holders, the first few: who may see it */
	size_t n_uids;

	/* CLOCK_MONOTONIC; every rung has its place from the beginning */
	uint64_t start_usec, deadline_usec, end_usec;
	uint64_t latest_usec; /* the deadline can be extended to this */
	uint64_t last_usec;   /* by_break: the lease is kept so long, if pins are not seen to be gone */
	uint64_t detach_usec, signal_usec, kill_usec; /* how long each rung may take */
	int signal;                                   /* that of its rung; 0: none */
	sd_event_source *timer;

	/* what is done in slices, in this order */
	sd_event_source *work; /* enabled while there is any of it */
	bool working;
	struct selection selection; /* owned; the pins that are yet to be found */
	bool finding, announcing;
	uint64_t found_file; /* id of the one whose pins have been found; 0: none yet; UINT64_MAX: several */
	bool alive; /* a living holder was among those found */
	struct untold *untold; /* owned; … whose holders are yet to be told, from untold[i_untold] on */
	size_t n_untold, i_untold;
	struct place tell_after; /* all are told again */
	bool telling;
	struct place start_after; /* the jobs of the present rung */
	uint64_t signalled;       /* the client that was last sent its signal */
	uint64_t only;            /* of this client alone; 0: of all */
	bool starting;
	struct place look_after; /* its signal has reached nobody: contexts are looked at */
	bool looking;
	bool dropping; /* it has ended: what is pinned all the same is not its matter any more */
	uint64_t reported; /* the client that was last said to have pins left */

	unsigned n_jobs;    /* of the present rung */
	unsigned n_reached; /* processes that the present rung's signal reached */
	bool again; /* the present rung has to be tried again: it was short of memory, or a holder has changed */
	bool searching; /* its signal reached nobody: it is looked who has the contexts */

	RB_ENTRY(revocation) by_id;
	bool retired; /* in broker::ended */
	TAILQ_ENTRY(revocation) of_ended;
};

TAILQ_HEAD(revocation_list, revocation);

struct conflict conflict_new(enum cause cause);

/*
 * Starts a revocation of the pins that are selected; takes the selection over, also when it fails. file: the
 * one whose lease is under break or that has been shrunk, NULL for an administrator's or a shutdown.
 * grace_usec: UINT64_MAX for the configured one. If none of the pins holds pages, or there are none, it ends
 * at once. Of many pins some are found and told of, the others in the next turns.
 */
int revocation_start(struct broker *broker, struct file *file, bool by_break,
		     const struct conflict *conflict, struct selection *selection,
		     uint64_t grace_usec, bool forced, uint64_t *ret_id);
struct revocation *revocation_free(struct revocation *revocation);

void revocation_event(struct revocation *revocation, enum revocation_event event);
/* Does a slice of what is to be done, and has the loop do the rest. */
void revocation_go_on(struct revocation *revocation);

/* A pin has ended; called by pin_end() for each of the pin's targets. */
void revocation_target_gone(struct target *target, enum proof proof);

/* Has the present rung's jobs done again, where they are still to be. */
void revocation_repeat(struct revocation *revocation, uint64_t client);

/* revocation-signal.c: sends a holder the signal of the present rung, if it is still who connected and holds
 * a context of its pins; revocation_job_done() follows. 1, or -ENOMEM. */
int revocation_signal(struct revocation *revocation, struct client *client, int sig);

/* A job that a rung started has come back; reached: a signal was delivered. */
void revocation_job_done(struct broker *broker, uint64_t id, enum revocation_state rung,
			 bool reached);

/* revocation-holder.c: it has been found out who is behind it: the first of those who wait for the lease, what
 * it does, and all of them. */
#define BREAKERS_MAX 8
void revocation_blame(struct revocation *revocation, const struct conflict *who,
		      const pid_t *breakers, size_t n_breakers);
/* Is it being looked who has the context of one of its pins? */
bool revocation_is_reaping(struct revocation *revocation);
/*
 * The rung's signal reached nobody, which proves nothing: the holder may be dying of another revocation's, with
 * its descriptors closed already. Looks who has the contexts; revocation_check_reachable() follows.
 */
void revocation_search(struct revocation *revocation);
/* One slice of that. */
void revocation_look(struct revocation *revocation, const struct slice *slice);
/* Another process is the client now: the rung's signal is for it, too. */
void revocation_inherited(const struct client *client);
/* Is there anybody left to turn to, by a notice or a signal, as the rung is? */
bool revocation_has_living(struct revocation *revocation);
/* The same, for all: it has been looked who has a context. */
void revocation_check_reachable(struct broker *broker);

/* REFUSED if it is not running, or the client has no pin in it. */
int revocation_extend(struct revocation *revocation, const struct client *client,
		      uint64_t by_usec, uint64_t *ret_deadline_usec, struct refusal *ret_refusal);

/* revocation-target.c. Each returns the next one in order, or NULL. */
struct stake *stake_next(struct revocation *revocation, struct place after);
struct stake *stake_after(const struct stake *stake);
struct target *target_next(struct revocation *revocation, struct place after);
/* 1; 0: the pin is one of the targets already; -ENOMEM. */
int target_new(struct revocation *revocation, struct pin *pin);
/* Its pin has forgotten it. */
void target_free(struct target *target);

void revocation_info(const struct revocation *revocation, struct msg_revocation_info *ret);
void conflict_message(const struct conflict *conflict, struct msg_conflict *ret);

struct log_fields revocation_fields(const struct revocation *revocation);
const char *revocation_path(const struct revocation *revocation);

/* One that wants the pin gone; NULL: none. */
static inline struct revocation *pin_revocation(const struct pin *pin)
{
	const struct target *target = LIST_FIRST(&pin->targets);

	return target ? target->stake->revocation : NULL;
}

static inline bool revocation_is_running(const struct revocation *revocation)
{
	return !revocation_state_is_end(revocation->state);
}
