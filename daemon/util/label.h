/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

/* A string with a count of its users: the label that the pins of one call share. */

struct label;

struct label *label_new(const char *text); /* NULL: no memory */
struct label *label_ref(struct label *label);
struct label *label_unref(struct label *label); /* accepts NULL, returns NULL */
const char *label_text(const struct label *label); /* NULL for NULL */
