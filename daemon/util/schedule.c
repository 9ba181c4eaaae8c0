/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/util/schedule.h"

#include <assert.h>

#include "daemon/util/turn.h"
#include "daemon/util/user.h"
#include "protocol/macro.h"

enum {
	LINE_LIGHT,
	LINE_HEAVY,
	LINE_COUNT,
};

struct line {
	TAILQ_HEAD(, user) users;
	sd_event_source *source; /* enabled while there are any */
};

struct schedule {
	struct line lines[LINE_COUNT];
};

static void leave_line(struct user *user)
{
	struct line *line = user->waiting.line;

	TAILQ_REMOVE(&line->users, user, waiting.of_line);
	user->waiting.line = NULL;
	if (TAILQ_EMPTY(&line->users))
		(void)sd_event_source_set_enabled(line->source, SD_EVENT_OFF);
}

static void join_line(struct schedule *schedule, struct user *user)
{
	struct line *line = &schedule->lines[user_is_light(user) ? LINE_LIGHT : LINE_HEAVY];

	TAILQ_INSERT_TAIL(&line->users, user, waiting.of_line);
	user->waiting.line = line;
	(void)sd_event_source_set_enabled(line->source, SD_EVENT_ON);
}

void schedule_add(struct schedule *schedule, struct scheduled *scheduled, bool asks)
{
	struct user *user = scheduled->user;

	if (scheduled->queue)
		return;
	scheduled->queue = asks ? &user->waiting.asking : &user->waiting.going_on;
	if (!user->waiting.line) {
		TAILQ_INIT(&user->waiting.asking);
		TAILQ_INIT(&user->waiting.going_on);
		join_line(schedule, user);
	}
	TAILQ_INSERT_TAIL(scheduled->queue, scheduled, of_queue);
}

static struct scheduled *first_waiting(struct user *user)
{
	struct scheduled *scheduled = TAILQ_FIRST(&user->waiting.asking);

	return scheduled ? scheduled : TAILQ_FIRST(&user->waiting.going_on);
}

void schedule_remove(struct scheduled *scheduled)
{
	struct user *user = scheduled->user;

	if (!scheduled->queue)
		return;
	TAILQ_REMOVE(scheduled->queue, scheduled, of_queue);
	scheduled->queue = NULL;
	if (!first_waiting(user))
		leave_line(user);
}

static int on_line(struct schedule *schedule, struct line *line)
{
	struct user *user = TAILQ_FIRST(&line->users);
	struct scheduled *scheduled = first_waiting(user);

	leave_line(user);
	TAILQ_REMOVE(scheduled->queue, scheduled, of_queue);
	scheduled->queue = NULL;
	/* behind the others, and in the line that is right for it now */
	if (first_waiting(user))
		join_line(schedule, user);
	scheduled->take_turn(scheduled);
	return 0;
}

static int on_light(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct schedule *schedule = userdata;

	return on_line(schedule, &schedule->lines[LINE_LIGHT]);
}

static int on_heavy(sd_event_source *source, uint64_t usec, void *userdata)
{
	struct schedule *schedule = userdata;

	return on_line(schedule, &schedule->lines[LINE_HEAVY]);
}

/* Of the same priority as everything else that is done in slices, which the loop does in turn. */
static int add_line(struct schedule *schedule, sd_event *event, struct line *line,
	sd_event_time_handler_t handler)
{
	TAILQ_INIT(&line->users);
	return turn_add_source(event, &line->source, handler, schedule);
}

int schedule_new(sd_event *event, struct schedule **ret)
{
	struct schedule *schedule = calloc(1, sizeof(*schedule));
	int r;

	if (!schedule)
		return -ENOMEM;
	r = add_line(schedule, event, &schedule->lines[LINE_LIGHT], on_light);
	if (r >= 0)
		r = add_line(schedule, event, &schedule->lines[LINE_HEAVY], on_heavy);
	if (r < 0) {
		schedule_free(schedule);
		return r;
	}
	*ret = schedule;
	return 0;
}

struct schedule *schedule_free(struct schedule *schedule)
{
	if (!schedule)
		return NULL;
	for (size_t i = 0; i < LINE_COUNT; i++) {
		assert(TAILQ_EMPTY(&schedule->lines[i].users));
		sd_event_source_disable_unref(schedule->lines[i].source);
	}
	free(schedule);
	return NULL;
}
