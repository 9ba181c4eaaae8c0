/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/core/observer.h"

#include "daemon/core/broker.h"

void observer_add(struct observers *observers, struct observer *observer)
{
	STAILQ_INSERT_TAIL(observers, observer, observers);
}

void observer_remove(struct observers *observers, struct observer *observer)
{
	STAILQ_REMOVE(observers, observer, observer, observers);
}

#define TELL(all, function, ...)                                                                   \
	do {                                                                                       \
		struct observer *observer;                                                         \
                                                                                                   \
		STAILQ_FOREACH(observer, (all), observers)                                         \
			if (observer->function)                                                    \
				observer->function(observer, __VA_ARGS__);                         \
	} while (0)

void observe_client(struct client *client, enum observed what)
{
	TELL(&client->broker->observers, client, client, what);
}

void observe_file(struct file *file, enum observed what)
{
	TELL(&file->broker->observers, file, file, what);
}

void observe_use(struct use *use, enum observed what)
{
	TELL(&use->client->broker->observers, use, use, what);
}

void observe_context(struct context *context, enum observed what)
{
	TELL(&context->client->broker->observers, context, context, what);
}

void observe_pin(struct pin *pin, enum observed what)
{
	TELL(&pin->context->client->broker->observers, pin, pin, what);
}

void observe_revocation(struct revocation *revocation, enum observed what)
{
	TELL(&revocation->broker->observers, revocation, revocation, what);
}

void observe_notice(struct client *client, const struct msg_notice *notice)
{
	TELL(&client->broker->observers, notice, client, notice);
}

void observe_ids(struct observers *observers, uint64_t reserved)
{
	TELL(observers, ids, reserved);
}
