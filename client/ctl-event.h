/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "ctl.h"

/*
 * What has happened to a file, for people and for scripts: a line of words, first what and the
 * path, then keys and values; or, with --json, an object.
 */

json_object *event_new(const char *name, const char *path);
/* Adds the time, and prints it; takes it over. */
void event_say(json_object *o, const struct ctl *ctl);
