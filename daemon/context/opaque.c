/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/context/ops.h"

/* A descriptor of which nothing is known but that it keeps something alive while it is open. */

static bool opaque_identify(int fd, const char *link)
{
	return true;
}

const struct context_ops context_opaque = {
	.kind = "opaque",
	.identify = opaque_identify,
};
