# SPDX-License-Identifier: LGPL-2.1-or-later
"""includes.py DIRECTORY LAYER…: no file of a layer, of which the lowest comes first, includes a header of a
higher one."""

import pathlib
import re
import sys

directory, layers = pathlib.Path(sys.argv[1]), sys.argv[2:]
wrong = n = 0
for i, layer in enumerate(layers):
    for source in sorted((directory / layer).glob('*.[ch]')):
        for included in re.findall(r'^#include "daemon/([^/"]+)/', source.read_text(encoding='utf-8'), re.M):
            n += 1
            if included not in layers[:i + 1]:
                print(f'{source} is of {layer}, and includes a header of {included}', file=sys.stderr)
                wrong += 1
assert n > 100, f'{n} includes of the layers were found'
sys.exit(wrong > 0)
