/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/*
 * Who broke a lease, and what it is doing: found in /proc/locks and /proc/PID/task/TID/syscall, which
 * takes milliseconds, so that a notice never waits for it. Breakers that do not block leave no trace.
 */

struct blame;
struct broker;
struct file;

int blame_new(struct broker *broker, struct blame **ret);
struct blame *blame_free(struct blame *blame);

/* Looks who broke the file's lease and calls revocation_blame(); requests that come meanwhile are
 * answered from one more look. */
void blame_request(struct blame *blame, const struct file *file);
