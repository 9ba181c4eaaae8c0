#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.pinbroker1.Manager as an administrator uses it: what is listed, page by page, and what is revoked, by
whichever name."""

import contextlib
import json
import os
import signal
import time

from client import PAGE, SLOWNESS, WAIT, World, equal, expect
from objects import ROOT, Bus
from rules import PB, Holder, ranges

SECOND = 10 ** 6


class Manager(Bus):
    def call(self, method, signature='', *args):
        out = self.run('--json=short', 'call', 'org.pinbroker1', ROOT, 'org.pinbroker1.Manager',
                       method, *([signature] if signature else []), *map(str, args))
        return json.loads(out)['data']

    def refused(self, error, method, signature, *args):
        out = self.fails('call', 'org.pinbroker1', ROOT, 'org.pinbroker1.Manager', method,
                         signature, *map(str, args))
        expect(error in out, method, out)

    def list(self, what, after=0, limit=0, **filters):
        variants = [x for key, value in filters.items() for x in (key, 't', value)]
        objects, after = self.call('List' + what, 'a{sv}tu', len(filters), *variants, after, limit)
        return [{key: value['data'] for key, value in o.items()} for o in objects], after


def inode(path):
    st = os.stat(path)
    return st.st_dev, st.st_ino


def pin(holder, file, context, *offsets):
    return holder.call('Pin', {'file': file, 'context': context, 'access': 'read',
                               'ranges': ranges(*((o, PAGE) for o in offsets))})['pins']


def test_lists(world, manager):
    h, other = Holder(world, 'one'), Holder(world, 'two')
    file, context = h.open(world.file)['file'], h.context()
    pins = pin(h, file, context, 0, PAGE, 2 * PAGE)
    other.open(world.file)
    others = pin(other, file, other.context(), 4 * PAGE)

    listed, after = manager.list('Pins')
    equal(([p['pin'] for p in listed], after), (pins + others, 0))
    equal((listed[1]['offset'], listed[1]['length'], listed[1]['path'], listed[1]['state']),
          (PAGE, PAGE, world.file, 'reserved'))
    expect('handle' not in listed[1])
    equal([p['pin'] for p in manager.list('Pins', client=other.client['client'])[0]], others)
    equal([p['pin'] for p in manager.list('Pins', file=file)[0]], pins + others)
    equal(manager.list('Pins', file=999)[0], [])
    # page by page
    seen, after = [], 0
    for _ in range(4):
        page, after = manager.list('Pins', after=after, limit=1)
        seen += [p['pin'] for p in page]
    equal(seen, pins + others)
    equal(manager.list('Pins', after=others[-1], limit=1), ([], 0))

    equal([(f['file'], f['clients'], f['pins']) for f in manager.list('Files')[0]], [(file, 2, 4)])
    equal([(c['client'], c['name'], c['pid']) for c in manager.list('Clients')[0]],
          [(h.client['client'], 'one', os.getpid()), (other.client['client'], 'two', os.getpid())])
    equal([c['kind'] for c in manager.list('Contexts', client=h.client['client'])[0]], ['opaque'])
    equal(manager.list('Revocations'), ([], 0))
    manager.refused('Invalid argument', 'ListPins', 'a{sv}tu', 1, 'colour', 't', 1, 0, 0)
    manager.refused('', 'ListPins', 'a{sv}tu', 1, 'file', 's', 'x', 0, 0)

    def prop(name):
        return json.loads(manager.run('--json=short', 'get-property', 'org.pinbroker1', ROOT,
                                      'org.pinbroker1.Manager', name))['data']
    counts = prop('Counts')
    equal([counts[key] for key in ('clients', 'files', 'pins', 'revocations')], [2, 1, 4, 0])
    expect(prop('Version'))
    equal(prop('Restrictions'), [])
    equal(set(prop('Features')), {'io_uring', 'af_xdp', 'rdma', 'vfio', 'opaque'})
    h.call('Unpin', {'pins': pins})
    other.call('Unpin', {'pins': others})
    h.close()
    other.close()


def test_revokes(world, manager):
    h = Holder(world)
    watch = Holder.__new__(Holder)
    watch.connection = type(h.connection)(world.path)
    file, context = h.open(world.file)['file'], h.context()
    watch.connection.send(PB + 'Watch', h.client, more=True)

    for method, signature, named, wrong in (
            ('RevokePins', 'at', lambda pins: (len(pins), *pins), (1, 999)),
            ('RevokeFile', 't', lambda pins: (file,), (999,)),
            ('RevokeClient', 't', lambda pins: (h.client['client'],), (999,)),
            ('RevokePath', 's', lambda pins: (world.file,), ('/dev/null',)),
            ('RevokeInode', 'tt', lambda pins: inode(world.file), inode('/dev/null')),
            ('RevokeMount', 's', lambda pins: ('/dev/shm',), ('/dev/shm-not',))):
        pins = pin(h, file, context, 0, PAGE)
        manager.refused('', method, signature + 'st', *wrong, 'why', 60 * SECOND)
        revocation = manager.call(method, signature + 'st', *named(pins), 'why', 60 * SECOND)[0]
        notice = watch.connection.reply(PB + 'Watch')[0]['notice']
        equal((notice['revocation'], sorted(notice['pins'])), (revocation, pins))
        equal((notice['conflict']['cause'], notice['conflict']['reason']), ('admin', 'why'))
        left = notice['deadlineUSec'] - time.monotonic() * SECOND
        expect(50 * SECOND < left <= 60 * SECOND, left)
        h.call('Unpin', {'pins': pins})
        last = manager.list('Revocations')[0][-1]
        equal((last['revocation'], last['state'], last['remaining'], last['pins'], last['clients']),
              (revocation, 'released', 0, 2, 1))

    # The mount's files are withdrawn: whoever wants to go on opens them anew.
    h.refused('Revoked', {'revocation': revocation, 'pins': []}, 'Pin',
              {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((0, PAGE))})
    h.call('CloseFile', {'file': file})
    file = h.open(world.file)['file']

    # One of two pins: the other, and the lease, stay.
    pins = pin(h, file, context, 0, PAGE)
    manager.call('RevokePins', 'atst', 1, pins[0], '', 60 * SECOND)
    h.call('Unpin', {'pins': pins[:1]})
    equal([p['pin'] for p in manager.list('Pins')[0]], pins[1:])
    equal(manager.list('Files')[0][0]['lease'], 'read')
    # the context has no device, which is no device's name
    manager.refused('', 'RevokeDevice', 'sst', '', '', 0)
    manager.refused('No context and no file', 'RevokeDevice', 'sst', 'mlx5_0', '', 0)
    h.call('Unpin', {'pins': pins[1:]})
    h.close()
    watch.close()


def files_of_daemon(world):
    """What it has open."""
    found = []
    for fd in os.scandir(f'/proc/{world.daemon.pid}/fd'):
        with contextlib.suppress(FileNotFoundError):  # closed just now
            found.append(os.readlink(fd.path))
    return found


def expect_closed(world, path):
    """The pool does it, a moment later."""
    end = time.monotonic() + WAIT
    while path in files_of_daemon(world):
        expect(time.monotonic() < end)


def test_withdrawal(world, manager):
    """What an administrator wants to unmount the broker closes as soon as nobody pins it, for all who have it
    open, and says so to each when he next names it."""
    h, other = Holder(world), Holder(world)
    file, context = h.open(world.file, 'write')['file'], h.context()
    equal(other.open(world.file, 'write')['file'], file)
    pins = pin(h, file, context, 0, PAGE)
    revocation = manager.call('RevokeMount', 'sst', '/dev/shm', '', 60 * SECOND)[0]
    more = {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((2 * PAGE, PAGE))}
    gone = {'revocation': revocation, 'pins': []}
    h.refused('Revoked', gone, 'Pin', more)
    other.open(world.file, refused='Busy', cause='revoking')
    h.call('Unpin', {'pins': pins[:1]})
    equal([f['file'] for f in manager.list('Files')[0]], [file])
    h.call('Unpin', {'pins': pins[1:]})
    equal(manager.list('Files')[0], [])
    equal([c['files'] for c in manager.list('Clients')[0]], [0, 0])
    expect_closed(world, world.file)
    h.refused('Revoked', gone, 'Pin', more)
    other.refused('Revoked', gone, 'Pin', more | {'context': other.context()})
    # One goes on, with the same file under another name; what the other has left of it ends with him.
    again = h.open(world.file, 'write')['file']
    expect(again != file)
    h.call('CloseFile', {'file': file})
    h.refused('NoSuchObject', {'type': 'file', 'id': file}, 'CloseFile', {'file': file})
    h.call('Unpin', {'pins': pin(h, again, context, 0)})
    other.close()
    # Without pins it is closed at once, …
    manager.call('RevokeMount', 'sst', '/', '', 0)
    equal(manager.list('Files')[0], [])
    expect_closed(world, world.file)
    # … and of what is elsewhere nothing is.
    file = h.open(world.file)['file']
    manager.refused('No file is listed', 'RevokeMount', 'sst', '/dev/shm-not', '', 0)
    h.call('Unpin', {'pins': pin(h, file, context, 0)})
    h.close()


def test_time(world, manager):
    """A holder that does not let go is made to when its time is up: here, by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        h = Holder(world)
        held = os.eventfd(0)  # it has to be seen to hold its context
        context = h.call('AddContext', {'fileDescriptor': 0}, [held])['context']
        pin(h, h.open(world.file)['file'], context, 0)
        while True:
            signal.pause()
    end = time.monotonic() + WAIT
    while not manager.list('Pins')[0]:
        expect(time.monotonic() < end)
    begin = time.monotonic()
    manager.call('RevokePath', 'sst', world.file, '', SECOND // 2)
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGKILL)
    took = time.monotonic() - begin
    expect(0.5 <= took < 0.5 + 0.25 * SLOWNESS, took)
    while manager.list('Revocations')[0][-1]['state'] != 'released':
        expect(time.monotonic() < end)


def main():
    signal.alarm(300)
    with World() as world:
        world.start('[Revocation]\nSignalOnTimeout=none\n')
        manager = Manager(world)
        for test in (test_lists, test_revokes, test_withdrawal, test_time):
            test(world, manager)
            print(f'ok {test.__name__}', flush=True)
        world.stop()


if __name__ == '__main__':
    main()
