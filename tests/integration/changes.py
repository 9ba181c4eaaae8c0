#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""PropertiesChanged: what changes is told, nothing else is, and many changes are told as few."""

import os
import signal
import time

from client import PAGE, SLOWNESS, Connection, World, equal, expect, is_readable, truncate_in_child
from objects import NULL, ROOT
from rules import Holder, ranges
from sdbus import SIGNAL, Bus
from world import end_child

PROPERTIES = 'org.freedesktop.DBus.Properties'
UNTOLD = 'org.pinbroker1.File', 'Size'
PINS = 10000
FILES, FILES_MAX = 200, 8000


class Mirror(Bus):
    """The objects, kept up to date by signals alone."""

    def __init__(self, world):
        super().__init__(world.address)
        self.objects, self.n_changes = {}, 0
        self.news_missed = False
        self.match("type='signal',sender='org.pinbroker1'")
        for path, interfaces in self.managed().items():
            self.objects[path] = self.own(interfaces)

    @staticmethod
    def own(interfaces):
        ((interface, properties),) = [i for i in interfaces.items() if i[0].startswith('org.pinb')]
        return {name: value for name, value in properties.items()
                if (interface, name) != UNTOLD}

    def managed(self):
        return self.call(ROOT, 'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects')[0]

    def follow(self, m):
        if m.member == 'InterfacesAdded':
            expect(m.body[0] not in self.objects)
            self.objects[m.body[0]] = self.own(m.body[1])
        elif m.member == 'InterfacesRemoved':
            del self.objects[m.body[0]]
        elif m.member == 'PropertiesChanged':
            interface, changed, invalidated = m.body
            equal(interface.lower(), 'org.pinbroker1.' + m.path.split('/')[3])
            equal(invalidated, [])
            known = self.objects.get(m.path)
            if known is None and self.news_missed:
                return
            for name, value in changed.items():
                expect(known[name] != value, m.path, name, value)
            known.update(changed)
            self.n_changes += 1

    def until(self, condition):
        """Follows until it holds."""
        while not condition():
            self.follow(self.wait(lambda m: m.type == SIGNAL))

    def until_same(self):
        """Nothing is missing in the end; what changes meanwhile is asked for again."""
        while self.objects != {path: self.own(i) for path, i in self.managed().items()}:
            # those that came before the answer, or else the next
            for _ in range(max(1, sum(m.type == SIGNAL for m in self.kept))):
                self.follow(self.wait(lambda m: m.type == SIGNAL))


def test_truncate(world, mirror):
    h = Holder(world, 'one')
    file = f'{ROOT}/file/{h.open(world.file)["file"]}'
    context = h.context()
    pins = h.call('Pin', {'file': int(file.split('/')[-1]), 'context': context, 'access': 'read',
                          'ranges': ranges((0, PAGE), (PAGE, PAGE))})['pins']
    mirror.until_same()
    equal([mirror.objects[file][name] for name in ('Lease', 'Pins', 'Clients', 'Exposed')],
          ['read', 2, 1, 0])
    client = f'{ROOT}/client/{h.client["client"]}'
    equal([mirror.objects[client][name] for name in ('Pins', 'PinnedBytes', 'Contexts')],
          [2, 2 * PAGE, 1])

    pid, result = truncate_in_child(world.file, 0)
    mirror.until(lambda: mirror.objects[file]['Lease'] == 'breaking')
    (path,) = [path for path in mirror.objects if '/revocation/' in path]
    revocation = mirror.objects[path]
    # who it is comes later
    mirror.until(lambda: revocation['Pid'] == pid)
    equal([revocation[name] for name in ('State', 'Cause', 'Remaining', 'EndUSec', 'Proof')],
          ['notified', 'truncate', 2, NULL, ''])
    h.call('Unpin', {'pins': pins[:1]})
    mirror.until(lambda: revocation['Remaining'] == 1)
    equal(mirror.objects[file]['Pins'], 1)
    h.call('Unpin', {'pins': pins[1:]})
    mirror.until(lambda: revocation['State'] == 'released')
    equal((revocation['Remaining'], revocation['Proof']), (0, 'claimed'))
    expect(revocation['EndUSec'] != NULL)
    mirror.until(lambda: mirror.objects[file]['Lease'] == 'read')
    expect(is_readable(result, 10))
    os.close(result)
    end_child(pid)
    os.truncate(world.file, 4096 * PAGE)
    h.close()
    mirror.until(lambda: file not in mirror.objects and client not in mirror.objects)
    mirror.until_same()


def test_connection(world, mirror):
    """A client whose connection ends while it has pins."""
    h = Holder(world, 'two')
    event = os.eventfd(0)  # without it the pins would end as soon as the connection
    context = h.call('AddContext', {'fileDescriptor': 0}, [event])['context']
    pin = {'file': h.open(world.file)['file'], 'context': context, 'access': 'read',
           'ranges': ranges((0, PAGE))}
    pins = h.call('Pin', pin)['pins']
    client = f'{ROOT}/client/{h.client["client"]}'
    mirror.until_same()
    equal(mirror.objects[client]['Connected'], 1)
    h.close()
    mirror.until(lambda: not mirror.objects[client]['Connected'])
    h.connection = Connection(world.path)
    h.call('Resume', h.client)
    mirror.until(lambda: mirror.objects[client]['Connected'])
    h.call('Unpin', {'pins': pins})
    h.close()
    os.close(event)
    mirror.until_same()


def test_many_pins(world, mirror):
    h = Holder(world, 'many')
    pin = {'file': h.open(world.file)['file'], 'context': h.context(), 'access': 'read',
           'ranges': ranges(*[(0, PAGE)] * 1000)}
    mirror.until_same()
    before, begin = mirror.n_changes, time.monotonic()
    pins = [h.call('Pin', pin)['pins'] for _ in range(PINS // 1000)]
    mirror.until(lambda: mirror.objects[f'{ROOT}/file/{pin["file"]}']['Pins'] == PINS)
    mirror.until_same()
    # the file and the client, ten times a second
    most = 2 * (int((time.monotonic() - begin) / 0.1) + 1)
    expect(mirror.n_changes - before <= most, mirror.n_changes - before, most)
    for some in pins:
        h.call('Unpin', {'pins': some})
    mirror.until_same()
    h.close()
    mirror.until_same()


def test_many_objects(world, mirror):
    h = Holder(world)
    files = []
    for i in range(FILES):
        path = os.path.join(world.dir, f'file-{i}')
        with open(path, 'wb') as f:
            f.truncate(PAGE)
        files.append(h.open(path)['file'])
    mirror.until_same()
    context, before = h.context(), mirror.n_changes
    pins = [h.call('Pin', {'file': file, 'context': context, 'access': 'read',
                           'ranges': ranges((0, PAGE))})['pins'][0] for file in files]
    mirror.until_same()
    expect(mirror.n_changes - before >= FILES)
    h.call('Unpin', {'pins': pins})
    h.close()
    mirror.until_same()


def test_bus_that_does_not_read(world, mirror):
    """News are left out, but what has changed meanwhile is told when it reads again."""
    h = Holder(world)
    pin = {'file': h.open(world.file)['file'], 'context': h.context(), 'access': 'read',
           'ranges': ranges((0, PAGE))}
    mirror.until_same()
    mirror.news_missed = True
    file = mirror.objects[f'{ROOT}/file/{pin["file"]}']
    deep = os.path.join(world.dir, *['x' * 250] * 14)  # news that are long
    os.makedirs(deep)
    world.bus.send_signal(signal.SIGSTOP)
    n_files, n_read = 0, len(world.log)
    # Each file has a line of its own, and many may come at a time.
    while not any('does not keep up' in line for line in world.log[n_read:]):
        path = os.path.join(deep, str(n_files))
        with open(path, 'wb') as f:
            f.truncate(PAGE)
        h.open(path)
        n_files += 1
        expect(n_files < FILES_MAX)
    pins = h.call('Pin', pin)['pins']
    world.bus.send_signal(signal.SIGCONT)
    mirror.until(lambda: file['Pins'] == 1)
    h.call('Unpin', {'pins': pins})
    mirror.until(lambda: file['Pins'] == 0)
    h.close()


def main():
    signal.alarm(300 if SLOWNESS < 10 else 800)
    with World() as world:
        world.start(f'[Limits]\nMaxFilesPerUser={FILES_MAX}\n')
        mirror = Mirror(world)
        for test in (test_truncate, test_connection, test_many_pins, test_many_objects,
                     test_bus_that_does_not_read):
            test(world, mirror)
            print(f'ok {test.__name__}', flush=True)
        world.stop()


if __name__ == '__main__':
    main()
