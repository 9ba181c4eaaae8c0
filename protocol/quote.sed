# SPDX-License-Identifier: LGPL-2.1-or-later
# Turns text into a C string literal.
s/["\\]/\\&/g
s/.*/"&\\n"/
