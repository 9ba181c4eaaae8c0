/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "context.h"

/* Between context.c, which knows what a context is, and context-job.c, which does the work on it. */

/* All that use its descriptor have come back: the reap that waited for that begins. */
void context_start_reap(struct context *context);

/* The service manager's copy is to be closed. */
void context_drop_copy(struct context *context);

/* What they waited for has come. */
void context_wake(struct context_waiters *waiters);
