/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>
#include <systemd/sd-event.h>

/*
 * Whose turn it is. A user that has lately taken little of the loop's time (user_is_light()) is served as soon
 * as the loop hears of it. The connections of one that has taken more wait in a line, in which users take
 * turns, and of which the loop serves one connection at a time, in turn with everything else: however
 * many connections ask for however much, others wait for a turn or two.
 */

struct line;
struct schedule;
struct user;

TAILQ_HEAD(scheduled_queue, scheduled);

/* What waits for its turn, a connection, has this in it. */
struct scheduled {
	struct user *user; /* whose turn it takes */
	void (*take_turn)(struct scheduled *scheduled);
	struct scheduled_queue *queue; /* schedule's, as the next; NULL: it does not wait */
	TAILQ_ENTRY(scheduled) of_queue;
};

/* Embedded in struct user, all zero to begin with. Owned by schedule. */
struct waiting {
	struct scheduled_queue asking, going_on; /* connections that wait for their turns */
	struct line *line; /* where the user waits, if a connection does */
	TAILQ_ENTRY(user) of_line;
};

int schedule_new(sd_event *event, struct schedule **ret);
struct schedule *schedule_free(struct schedule *schedule);

/*
 * take_turn() is called once it is its turn; twice is the same as once. asks: it was heard of by the socket,
 * and comes before its user's connections that go on with what takes several turns.
 */
void schedule_add(struct schedule *schedule, struct scheduled *scheduled, bool asks);
void schedule_remove(struct scheduled *scheduled);
