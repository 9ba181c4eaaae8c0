# SPDX-License-Identifier: LGPL-2.1-or-later
"""tests/vm/skips, a line each:  SUITE TEST: REASON  (SUITE *: all)"""
import os

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../skips')


def read_skips(suite):
    """The reasons, by test."""
    skips = {}
    with open(PATH, encoding='utf-8') as f:
        for line in f:
            if line.strip() and not line.startswith('#'):
                where, reason = line.strip().split(': ', 1)
                in_suite, test = where.split()
                if in_suite in ('*', suite):
                    skips[test] = reason
    return skips
