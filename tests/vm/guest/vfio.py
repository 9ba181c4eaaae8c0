#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file's pages mapped for a device through the IOMMU: a VFIO container, which the emulated card's group is in."""
import contextlib
import glob
import json
import os
import re
import shutil
import signal
import struct
import tempfile
import time
import unittest

import case
from installed import ADDRESS, SERVICE, TIMEOUT, Program, output
from client import PAGE, Connection, is_readable, truncate_in_child

HOLDER = '/build/tests/vfio-holder'
GROUP = glob.glob('/dev/vfio/[0-9]*')[0]
SIZE = 1 << 20
NOISE = 4  # pages
GRACE, SIGNAL_GRACE = 3, 3  # seconds
DROP_IN = '/etc/pinbroker/pinbroker.conf.d/test.conf'
NO_SUCH = 2  # ENOENT


def pinned():
    """Pages, of the whole machine."""
    with open('/proc/sys/vm/stat_refresh', encoding='ascii') as f:
        f.read()
    with open('/proc/vmstat', encoding='ascii') as f:
        counters = dict(line.split() for line in f)
    return int(counters['nr_foll_pin_acquired']) - int(counters['nr_foll_pin_released'])


def locked(pid):
    with open(f'/proc/{pid}/status', encoding='ascii') as f:
        return int(re.search(r'(?m)^VmLck:\s*(\d+) kB', f.read())[1]) << 10


def children(pid):
    with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as f:
        return [int(child) for child in f.read().split()]


def end(pidfd):
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def configure(force):
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Revocation]\nRevokeGraceSec={GRACE}s\nSignalGraceSec={SIGNAL_GRACE}s\n')
        if force:
            f.write('ForceUnmap=yes\n')
    output('systemctl', 'restart', SERVICE)


def set_lease_break_time(seconds):
    """How it was before."""
    with open('/proc/sys/fs/lease-break-time', 'r+', encoding='ascii') as f:
        before = f.read()
        f.write(seconds)
    return before


def setUpModule():
    """The ladder fits into it, and where nobody is signalled it is waited for."""
    before = set_lease_break_time('15')
    unittest.addModuleCleanup(set_lease_break_time, before)


def tearDownModule():
    os.unlink(DROP_IN)
    output('systemctl', 'restart', SERVICE)


class Case(unittest.TestCase):
    def setUp(self):
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, directory)
        self.path = os.path.join(directory, 'data')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)
        self.wait_for_none('Contexts')
        self.before = pinned()

    def hold(self, command='hold'):
        holder = Program(self, HOLDER, GROUP, self.path)
        holder.expect('ready')
        holder.tell(command)
        self.assertEqual(locked(holder.pid), SIZE)
        self.expect_pinned(SIZE // PAGE)
        return holder

    def expect_pinned(self, pages):
        self.assertLessEqual(abs(pinned() - self.before - pages), NOISE)

    def truncate(self):
        pid, result = truncate_in_child(self.path, PAGE)
        self.addCleanup(os.close, result)
        self.addCleanup(os.waitpid, pid, 0)
        return result

    def expect_truncated(self, result, least=0, pages=0):
        """So many were pinned still when it returned."""
        self.assertTrue(is_readable(result, TIMEOUT), 'the truncate does not return')
        error, seconds, pinned_then = struct.unpack('idq', os.read(result, 64))
        self.assertEqual(error, 0, os.strerror(error))
        self.assertLessEqual(abs(pinned_then - self.before - pages), NOISE)
        self.assertGreaterEqual(seconds, least)
        self.assertEqual(os.stat(self.path).st_size, PAGE)

    def list(self, what):
        connection = Connection(ADDRESS)
        try:
            return connection.list('org.pinbroker.List' + what)
        finally:
            connection.close()

    def expect_outcome(self, state, proof):
        # One that was lost is followed by another: what is pinned beyond the new end is to go at once.
        revocation = [r for r in self.list('Revocations') if r['conflict']['cause'] != 'shrink'][-1]
        self.assertEqual((revocation['state'], revocation.get('proof')), (state, proof))

    def expect_signalled(self, holder):
        """Nothing but its end helps."""
        result = self.truncate()
        holder.expect('notice modify')
        self.expect_truncated(result, GRACE * 0.9)
        self.assertEqual(holder.process.wait(TIMEOUT), -signal.SIGBUS)
        self.expect_outcome('released', 'presumed')
        self.expect_pinned(0)

    def wait_for_none(self, what):
        """The daemon has to hear of a death first, and looks every 5 s who has what the dead one had."""
        end = time.monotonic() + TIMEOUT
        while self.list(what):
            self.assertLess(time.monotonic(), end)

    def die(self, holder, keeping):
        """It is killed, with a child, of which this is the pidfd, that keeps what it has of the container."""
        holder.tell('keep-' + keeping)
        child, = children(holder.pid)
        pidfd = os.pidfd_open(child)
        self.addCleanup(os.close, pidfd)
        self.addCleanup(end, pidfd)
        os.kill(holder.pid, signal.SIGKILL)
        holder.process.wait()
        return pidfd


class Default(Case):
    """ForceUnmap=no."""

    @classmethod
    def setUpClass(cls):
        configure(force=False)

    def test_listed(self):
        holder = self.hold()
        context, = json.loads(output('pinbrokerctl', '--json=short', 'list', 'contexts'))
        self.assertEqual([context[name] for name in ('kind', 'device', 'forcible', 'proof', 'pins')],
                         ['vfio', 'vfio', False, 'claimed', 1])
        pin, = self.list('Pins')
        self.assertEqual((pin['state'], pin['handle']), ('bound', 0x10000000))
        holder.tell('unmap')
        holder.tell('unpin')
        holder.tell('remove')
        self.assertEqual(self.list('Contexts'), [])

    def test_cooperative(self):
        holder = self.hold()
        result = self.truncate()
        holder.expect('notice modify')
        self.assertFalse(is_readable(result, 0))
        holder.tell('unmap')
        self.assertEqual(locked(holder.pid), 0)
        holder.tell('unpin')
        self.expect_truncated(result)
        self.expect_outcome('released', 'claimed')
        self.expect_pinned(0)

    def test_ignoring(self):
        self.expect_signalled(self.hold())

    def test_killed(self):
        holder = self.hold()
        holder.end()
        self.wait_for_none('Pins')
        self.expect_pinned(0)

    def test_killed_keeping_both(self):
        """The child goes on in its place: it has the time that its parent would have had, and is signalled."""
        child = self.die(self.hold(), 'both')
        self.expect_pinned(SIZE // PAGE)
        self.expect_truncated(self.truncate(), GRACE * 0.9)
        self.assertTrue(is_readable(child, TIMEOUT))
        self.expect_outcome('released', 'presumed')
        self.expect_pinned(0)

    def test_killed_keeping_both_as_another(self):
        """What is another user's by now is no heir, and not signalled: the pages that its device writes to are taken
        away in the end, which is said."""
        child = self.die(self.hold(), 'both-as-another')
        self.expect_truncated(self.truncate(), pages=SIZE // PAGE)
        self.expect_outcome('lost', None)
        self.assertFalse(is_readable(child, 0))
        self.expect_pinned(SIZE // PAGE)

    def test_killed_keeping_group(self):
        """Nobody is found with the container, and the kernel knows better."""
        self.die(self.hold(), 'group')
        self.expect_pinned(SIZE // PAGE)
        self.expect_truncated(self.truncate(), pages=SIZE // PAGE)
        self.expect_outcome('lost', None)

    def test_killed_keeping_container(self):
        """Somebody has the container, in which there is nothing any more."""
        self.die(self.hold(), 'container')
        self.wait_for_none('Pins')
        self.expect_pinned(0)


class Forced(Case):
    """ForceUnmap=yes."""

    @classmethod
    def setUpClass(cls):
        configure(force=True)

    def test_forced_ignoring(self):
        holder = self.hold()
        context, = self.list('Contexts')
        self.assertEqual((context['forcible'], context['proof']), (True, 'claimed'))
        result = self.truncate()
        self.expect_truncated(result, GRACE * 0.9)
        self.expect_outcome('released', 'claimed')
        self.assertEqual(locked(holder.pid), 0)
        self.expect_pinned(0)
        # it lives, and can go on
        holder.tell('ended')
        holder.tell('unmap', NO_SUCH)
        os.truncate(self.path, SIZE)
        holder.tell('map')
        holder.tell('unmap')

    def test_forced_stopped(self):
        holder = self.hold()
        os.kill(holder.pid, signal.SIGSTOP)
        self.expect_truncated(self.truncate(), GRACE * 0.9)
        self.expect_outcome('released', 'claimed')
        os.kill(holder.pid, signal.SIGCONT)
        holder.tell('ended')

    def test_forced_lie(self):
        """What it has bound is not mapped: that proves nothing."""
        self.expect_signalled(self.hold('lie'))

    def test_forced_divided(self):
        """One of two pins cannot be unmapped without the other."""
        holder = self.hold('hold-two')
        pin = self.list('Pins')[0]['pin']
        result = output('pinbrokerctl', 'revoke', '--timeout=0', pin)
        self.assertIn('released', result)
        self.assertEqual(holder.process.wait(TIMEOUT), -signal.SIGBUS)
        self.expect_pinned(0)

    def test_forced_killed_keeping_both(self):
        self.die(self.hold(), 'both')
        self.expect_truncated(self.truncate())
        self.expect_outcome('released', 'claimed')
        self.expect_pinned(0)


if __name__ == '__main__':
    case.main()
