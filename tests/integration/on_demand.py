#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pins on demand hold no pages: their holders are told of conflicts, and nobody waits for them (I2, I3, I4).
As their holders are believed, the context may be anything, here an eventfd.
"""

import os
import signal
import time

from admin import Manager, SECOND
from client import PAGE, SIZE, WAIT, Connection, World, equal, expect, is_readable, truncate_in_child
from rules import PB, Holder, ranges


class OnDemand(Holder):
    """A holder with one such pin, over the whole file."""

    def __init__(self, world, on_demand=True):
        super().__init__(world)
        self.world = world
        self.event = os.eventfd(0)  # it has to be seen to hold its context
        self.context_id = self.call('AddContext', {'fileDescriptor': 0}, [self.event])['context']
        self.request = {'file': self.open(world.file, 'write')['file'], 'context': self.context_id,
                        'access': 'write', 'ranges': ranges((0, SIZE)), 'onDemand': on_demand}
        self.pins = self.call('Pin', self.request)['pins']
        self.call('Bind', {'pin': self.pins[0], 'handle': 0})
        self.watch = None

    def start_watch(self):
        self.watch = Connection(self.world.path)
        self.watch.list(PB + 'ListPins')
        self.watch.send(PB + 'Watch', self.client, more=True)
        for _ in range(2):  # of requests that are there at once, the first to be served may be any
            self.connection.list(PB + 'ListPins')

    def expect_notice(self, revocation, cause):
        notice = self.watch.reply(PB + 'Watch')[0]['notice']
        equal((notice['revocation'], notice['pins'], notice['conflict']['cause']),
              (revocation, self.pins, cause))
        return notice

    def expect_shrunk(self, size):
        notice = self.watch.reply(PB + 'Watch')[0]['notice']
        equal((notice['pins'], notice['conflict']['cause'], notice['conflict']['size']),
              (self.pins, 'shrink', size))
        return notice

    def unpin(self):
        equal(self.call('Unpin', {'pins': self.pins})['ended'], [])
        self.call('RemoveContext', {'context': self.context_id})

    def close(self):
        super().close()
        os.close(self.event)
        if self.watch:
            self.watch.close()


def truncate(world, size):
    """Nothing stands in the way of it."""
    pid, result = truncate_in_child(world.file, size)
    expect(is_readable(result, WAIT))
    os.close(result)
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
    equal(os.stat(world.file).st_size, size)


def expect_ended(manager, cause, pins=0):
    """The last revocation with that cause: as the truncate goes ahead at once, what it did is told in a second
    one (shrink)."""
    revocation = [r for r in manager.list('Revocations')[0] if r['cause'] == cause][-1]
    equal((revocation['state'], revocation['cause'], revocation['pins'], revocation['remaining']),
          ('released', cause, pins, 0))
    return revocation['revocation']


def test_list(world, manager):
    """It is a pin, but counts for no bytes, of which none are allowed here."""
    h = OnDemand(world)
    (pin,), _ = manager.list('Pins')
    equal((pin['pin'], pin['onDemand'], pin['state']), (h.pins[0], True, 'bound'))
    equal(h.connection.list(PB + 'ListPins')[0]['onDemand'], True)
    equal([(c['pins'], c['pinnedBytes']) for c in manager.list('Clients')[0]], [(1, 0)])
    for not_so in (False, None):
        h.refused('LimitExceeded', {'limit': 'MaxPinnedBytesPerUser'}, 'Pin',
                  h.request | {'onDemand': not_so})
    for bad in ('yes', 1, []):
        h.invalid('onDemand', 'Pin', h.request | {'onDemand': bad})
    h.refused('Busy', {'cause': 'pinned'}, 'RemoveContext', {'context': h.context_id})
    h.unpin()
    equal(manager.list('Pins')[0], [])
    h.close()


def test_truncate(world, manager):
    h = OnDemand(world)
    h.start_watch()
    for size in (2 * PAGE, PAGE):
        truncate(world, size)
        notice = h.expect_notice(expect_ended(manager, 'modify'), 'modify')
        expect(notice['deadlineUSec'] <= time.monotonic_ns() // 1000)
        h.expect_shrunk(size)
        h.refused('NoSuchObject', {'type': 'revocation'}, 'Extend',
                  {'revocation': notice['revocation'], 'byUSec': SECOND})
        # it lives, and is under a lease again
        (pin,), _ = manager.list('Pins')
        equal((pin['pin'], pin['state']), (h.pins[0], 'bound'))
        expect('revocation' not in pin)
    h.unpin()
    h.close()


def test_own_truncate(world, manager):
    """It does not wait for itself."""
    h = OnDemand(world)
    h.start_watch()
    os.truncate(world.file, PAGE)
    h.expect_notice(expect_ended(manager, 'modify'), 'modify')
    h.expect_shrunk(PAGE)
    h.unpin()
    h.close()


def test_administrator(world, manager):
    h = OnDemand(world)
    h.start_watch()
    (revocation,) = manager.call('RevokePins', 'atst', 1, h.pins[0], 'why not', SECOND)
    equal(expect_ended(manager, 'admin'), revocation)
    equal(h.expect_notice(revocation, 'admin')['conflict']['reason'], 'why not')
    equal([p['pin'] for p in manager.list('Pins')[0]], h.pins)
    h.unpin()
    h.close()


def test_missed(world, manager):
    """Who was away is told when he is back, until he binds anew (I4)."""
    h = OnDemand(world)
    h.connection.close()
    truncate(world, 2 * PAGE)
    truncate(world, PAGE)
    end = time.monotonic() + WAIT
    while manager.list('Revocations')[0][-1].get('size') != PAGE:
        expect(time.monotonic() < end)
    revocation = expect_ended(manager, 'shrink')
    h.connection = Connection(world.path)
    (notice,) = h.call('Resume', h.client)['notices']
    equal((notice['revocation'], notice['pins']), (revocation, h.pins))
    h.start_watch()
    equal(h.expect_notice(revocation, 'shrink')['conflict']['size'], PAGE)
    h.call('Bind', {'pin': h.pins[0], 'handle': 1})
    other = Connection(world.path)
    equal(other.call(PB + 'Resume', h.client)['notices'], [])
    other.close()
    h.unpin()
    h.close()


def test_mixed(world, manager):
    """Beside a pin that holds pages: that one is waited for, and nobody else is forced."""
    pid = os.fork()
    if pid == 0:
        other = Holder(world)
        held = os.eventfd(0)
        context = other.call('AddContext', {'fileDescriptor': 0}, [held])['context']
        other.call('Pin', {'file': other.open(world.file, 'write')['file'], 'context': context,
                           'access': 'write', 'ranges': ranges((0, PAGE))})
        while True:
            signal.pause()
    end = time.monotonic() + WAIT
    while not manager.list('Pins')[0]:
        expect(time.monotonic() < end)
    h = OnDemand(world)
    h.start_watch()
    truncating, result = truncate_in_child(world.file, PAGE)
    notice = h.watch.reply(PB + 'Watch')[0]['notice']
    equal(notice['pins'], h.pins)
    h.refused('NoSuchObject', {'type': 'revocation'}, 'Extend',
              {'revocation': notice['revocation'], 'byUSec': SECOND})
    expect(not is_readable(result, 0))
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGKILL)
    expect(is_readable(result, WAIT))
    os.close(result)
    os.waitpid(truncating, 0)
    equal(expect_ended(manager, 'truncate', pins=1), notice['revocation'])
    equal([p['pin'] for p in manager.list('Pins')[0]], h.pins)
    h.unpin()
    h.close()


def test_shrink(world, manager):
    """While somebody has the file open for writing there is no lease, and no harm is done."""
    h = OnDemand(world)
    h.start_watch()
    writer = os.open(world.file, os.O_RDWR)
    h.expect_notice(expect_ended(manager, 'modify'), 'modify')
    equal([f['exposed'] for f in manager.list('Files')[0]], [False])
    os.ftruncate(writer, PAGE)
    h.expect_shrunk(PAGE)
    expect_ended(manager, 'shrink')
    os.close(writer)
    h.unpin()
    h.close()


def test_killed(world, manager):
    pid = os.fork()
    if pid == 0:
        OnDemand(world)
        while True:
            signal.pause()
    end = time.monotonic() + WAIT
    while not manager.list('Pins')[0]:
        expect(time.monotonic() < end)
    os.kill(pid, signal.SIGSTOP)
    truncate(world, PAGE)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while manager.list('Pins')[0] or manager.list('Clients')[0]:
        expect(time.monotonic() < end)


def test_shutdown(world, manager):
    """Nobody waits for it then, either."""
    h = OnDemand(world)
    h.start_watch()
    (revocation,) = manager.call('RevokePins', 'atst', 1, h.pins[0], '', SECOND)
    h.expect_notice(revocation, 'admin')
    world.stop()
    notice = h.watch.reply(PB + 'Watch')[0]['notice']
    equal((notice['pins'], notice['conflict']['cause']), (h.pins, 'shutdown'))
    h.close()


def main():
    signal.alarm(300)
    tests = (test_list, test_truncate, test_own_truncate, test_administrator, test_missed, test_mixed,
             test_shrink, test_killed, test_shutdown)
    for test in tests:
        with World() as world:
            limit = 'MaxPinnedBytesPerUser=0\n' if test is test_list else ''
            world.start('[Revocation]\nRevokeGraceSec=1s\nSignalOnTimeout=none\n'
                        f'[Files]\nReaders=admit\n[Limits]\n{limit}')
            test(world, Manager(world))
            print(f'ok {test.__name__}', flush=True)


if __name__ == '__main__':
    main()
