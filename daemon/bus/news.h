/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include <systemd/sd-bus.h>

struct broker;
struct bus_news;

/*
 * What the bus is told of what there is, as it comes, changes and goes: ObjectManager's signals, PropertiesChanged,
 * RevocationStarted and RevocationEnded. They go out a moment later than what holders are told.
 */

int bus_news_new(struct broker *broker, struct bus_news **ret);
struct bus_news *bus_news_free(struct bus_news *news);

/* Nothing that was told before counts on a new connection. Not owned. */
void bus_news_begin(struct bus_news *news, sd_bus *bus);
/* What has not been told yet is, as far as the connection still takes it. */
void bus_news_end(struct bus_news *news);
