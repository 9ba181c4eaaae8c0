#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""With very many objects no answer on the bus becomes long, and nobody waits for one (I6)."""

import os
import signal
import threading
import time
from xml.etree import ElementTree

from client import PAGE, SLOWNESS, Connection, World, equal, expect
from objects import ROOT
from rules import Holder, ranges
from sdbus import Bus

MANAGER = 'org.pinbroker1.Manager'
PINS, FILES = 40000 // SLOWNESS, 5000
MANAGED_MAX, NODES_MAX, LIST_MAX = 4096, 1024, 1000
LONGEST = 0.5 if SLOWNESS == 1 else 5  # seconds that another waits


class Other(threading.Thread):
    """Somebody else's calls meanwhile."""

    def __init__(self, world):
        super().__init__()
        self.connection, self.longest, self.over = Connection(world.path), 0, False
        self.start()

    def run(self):
        while not self.over:
            begin = time.monotonic()
            self.connection.call('org.varlink.service.GetInfo')
            self.longest = max(self.longest, time.monotonic() - begin)

    def end(self):
        self.over = True
        self.join()
        self.connection.close()
        return self.longest


def children(bus, path):
    xml = bus.call(path, 'org.freedesktop.DBus.Introspectable', 'Introspect')[0]
    return [node.get('name') for node in ElementTree.fromstring(xml).findall('node')]


def pages(bus, method, **filters):
    """The ids of all, and how many each reply had."""
    after, ids, lengths = 0, [], []
    variants = [x for key, value in filters.items() for x in (key, 't', value)]
    while True:
        objects, after = bus.call(ROOT, MANAGER, method, 'a{sv}tu', len(filters), *variants, after, 0)
        ids += [o[method[4:-1].lower()] for o in objects]
        lengths.append(len(objects))
        if after == 0:
            return ids, lengths


def test_pages(world, bus):
    h = Holder(world)
    files = []
    for i in range(FILES):
        path = os.path.join(world.dir, f'file-{i}')
        with open(path, 'wb') as f:
            f.truncate(PAGE)
        files.append(h.open(path)['file'])
    pin = {'file': files[0], 'context': h.context(), 'access': 'read',
           'ranges': ranges(*[(0, PAGE)] * 1000)}
    pins = [p for _ in range(PINS // 1000) for p in h.call('Pin', pin)['pins']]

    other = Other(world)
    for what, seen in (
            ('objects', lambda: list(bus.call(ROOT, 'org.freedesktop.DBus.ObjectManager',
                                              'GetManagedObjects')[0])),
            ('files', lambda: children(bus, ROOT + '/file')),
            ('pins', lambda: children(bus, f'{ROOT}/file/{files[0]}/pin')),
            ('file', lambda: children(bus, f'{ROOT}/file/{files[0]}')),
            ('pin', lambda: children(bus, f'{ROOT}/file/{files[0]}/pin/{pins[0]}'))):
        seen = seen()
        equal((what, len(seen)),
              (what, {'objects': MANAGED_MAX, 'pin': 0}.get(what, NODES_MAX)))
        expect(what != 'objects' or not any('/pin/' in path for path in seen))
    # all that there is can be paged through
    for method, ids in (('ListPins', pins), ('ListFiles', files)):
        listed, lengths = pages(bus, method)
        equal(listed, ids)
        expect(1 < max(lengths) <= LIST_MAX, lengths)  # fewer where they take longer
    listed, lengths = pages(bus, 'ListPins', file=files[1])
    equal((listed, max(lengths)), ([], 0))
    # 4,096 objects with all their properties are the longest answer
    longest = other.end()
    expect(longest < LONGEST, longest)
    h.close()


def main():
    signal.alarm(550)
    with World() as world:
        world.start(f'[Limits]\nMaxFilesPerUser={FILES}\nMaxPinsPerUser={PINS}\n')
        bus = Bus(world.address)
        test_pages(world, bus)
        bus.close()
        world.stop()


if __name__ == '__main__':
    main()
