#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A forced detach hits only what it names (I8): a handle that is gone is given to the next region at once, so
nobody who has the context may run between the look at a handle and its destruction.

hold-destroy.c stops the daemon there until it is told to go on.
"""
import ctypes
import json
import os
import re
import socket
import subprocess

import case
from installed import SERVICE, TESTER, TIMEOUT, journal, output
from rdma_server import DEVICE, OTHER, PAGES, Case, configure, regions, unconfigure
from client import is_readable

UNIT_DROP_IN = f'/run/systemd/system/{SERVICE}.d/hold.conf'
HOLD, LIBRARY = '/run/pinbroker/test-hold', '/build/tests/hold-destroy.so'
CYCLES = '/build/tests/rdma-cycles'
LIBC, PIDFD_GETFD = ctypes.CDLL(None, use_errno=True), 438
HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, '../../../daemon/util/log.h'), encoding='utf-8') as header:
    ESCALATED = re.search(r'#define MESSAGE_REVOKE_ESCALATED\s+"(\w{32})"', header.read()).group(1)


def setUpModule():
    os.makedirs(os.path.dirname(UNIT_DROP_IN), exist_ok=True)
    with open(UNIT_DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Service]\nEnvironment=LD_PRELOAD={LIBRARY} PINBROKER_TEST_HOLD={HOLD}\n')
    output('systemctl', 'daemon-reload')
    configure(signal_grace=25)  # what is held longer than a detach may take is not killed for it


def tearDownModule():
    os.unlink(UNIT_DROP_IN)
    output('systemctl', 'daemon-reload')
    unconfigure()


def listen(address):
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(TIMEOUT)
    listener.bind(address)
    listener.listen()
    return listener


def states(pid):
    """Of all its threads."""
    found = set()
    for task in os.listdir(f'/proc/{pid}/task'):
        with open(f'/proc/{pid}/task/{task}/stat', encoding='ascii') as f:
            found.add(f.read().rsplit(')', 1)[1].split()[0])
    return found


class Child:
    """A process that has the server's context."""

    def __init__(self, test, server):
        address = os.path.join(os.path.dirname(test.path), 'child')
        with listen(address) as listener:
            os.chmod(address, 0o777)
            self.pid = server.tell('fork_server', address)
            self.socket, _ = listener.accept()
        test.addCleanup(self.socket.close)
        self.socket.settimeout(TIMEOUT)
        self.lines = self.socket.makefile('rw', encoding='utf-8')
        test.addCleanup(self.lines.close)
        self.reply()

    def ask(self, command):
        self.lines.write(json.dumps([command]) + '\n')
        self.lines.flush()

    def reply(self):
        return json.loads(self.lines.readline())


class Handles(Case):
    def setUp(self):
        super().setUp()
        self.holds = listen(HOLD)
        self.addCleanup(os.unlink, HOLD)
        self.addCleanup(self.holds.close)

    def serve(self, **options):
        server = super().serve(**options)
        server.tell('ignore_signal')
        return server

    def held(self):
        """Until the daemon is about to destroy a region."""
        hold, _ = self.holds.accept()
        self.addCleanup(hold.close)
        return hold

    def finish(self, result):
        self.truncated(result)
        self.expect_released('provable')
        self.assertEqual(regions(), [])

    def test_holder(self):
        """It cannot run meanwhile, and goes on afterwards."""
        server = self.serve(uid=TESTER)
        result = self.truncate()
        hold = self.held()
        self.assertEqual(states(server.pid), {'T'})
        hold.close()
        self.finish(result)
        error, gone, other = server.tell('reuse')
        self.assertNotEqual(error, 0)
        self.assertEqual(gone, other)

    def expect_kept_from_reuse(self, **options):
        server = self.serve(**options)
        child = Child(self, server)
        result = self.truncate()
        hold = self.held()
        self.assertEqual(states(child.pid), {'T'})
        child.ask('reuse')
        hold.close()
        self.finish(result)
        error, gone, other = child.reply()
        self.assertNotEqual(error, 0, 'the child was faster than the daemon')
        self.assertEqual(gone, other)
        self.assertEqual(regions(OTHER), [(child.pid, OTHER)])

    def test_child(self):
        """A forked child that shares the context is kept from reusing the handle, too."""
        self.expect_kept_from_reuse()

    def test_child_of_a_user(self):
        self.expect_kept_from_reuse(uid=TESTER)

    def test_child_of_the_dead(self):
        """Whoever has outlived the client may use its context as well."""
        server = self.serve()
        child = Child(self, server)
        os.kill(server.pid, 9)
        os.waitpid(server.pid, 0)
        result = self.truncate()
        hold = self.held()
        self.assertEqual(states(child.pid), {'T'})
        hold.close()
        self.finish(result)
        child.ask('ping')
        self.assertEqual(child.reply(), 'pong')

    def test_destroyed_and_not_ended(self):
        """As the memory is registered once more the pin lives on, but its handle may be another's by now."""
        server = self.serve()
        server.tell('register')
        result = self.truncate()
        self.held().close()
        journal(ESCALATED, PINBROKER_REVOCATION=self.revocation()['revocation'])
        self.assertEqual(len(regions()), 1)
        self.assertEqual(server.tell('unpin'), server.tell('pins'))
        self.truncated(result, pages=PAGES)
        server.close()

    def test_unpin_meanwhile(self):
        """Whether what is let go of has been destroyed is known only afterwards."""
        server = self.serve()
        child = Child(self, server)
        child.ask('close_device')  # so that it is not stopped; it has the connection still
        child.reply()
        result = self.truncate()
        hold = self.held()
        child.ask('unpin')
        for _ in range(3):  # behind it
            self.assertEqual(self.revocation()['remaining'], 1)
        self.assertEqual(states(server.pid), {'T'})
        hold.close()
        self.finish(result)
        self.assertEqual(child.reply(), server.tell('pins'))

    def take_context(self, server):
        pidfd = os.pidfd_open(server.pid)
        context = LIBC.syscall(PIDFD_GETFD, pidfd, server.tell('device'), 0)
        self.assertGreaterEqual(context, 0)
        os.close(pidfd)
        return os.fdopen(context, 'rb', buffering=0)

    def test_others(self):
        """Who has been sent the context by a user whom he does not obey is not stopped, so that the region cannot
        be destroyed: the next rungs follow, and say aloud that they did not help.
        """
        server = super().serve(uid=TESTER)
        with self.take_context(server):
            result = self.truncate()
            self.truncated(result, pages=PAGES)
            self.assertEqual(len(regions()), 1)
            self.assertFalse(is_readable(self.holds.fileno(), 0), 'it was about to be destroyed')
            self.assertIn('lost', [r['state'] for r in self.revocations()])
        self.wait_until_gone()

    def test_two_contexts(self):
        """Each of them is detached by a job of its own: the first one to be done must not let the holder go on."""
        server = self.serve()
        server.tell('export_second')
        result = self.truncate()
        holds = [self.held(), self.held()]
        self.assertEqual(states(server.pid), {'T'})
        revocation = self.revocation()['revocation']
        holds[0].close()
        journal(ESCALATED, PINBROKER_REVOCATION=revocation)
        self.assertEqual(states(server.pid), {'T'})
        holds[1].close()
        self.finish(result)
        self.assertEqual(server.tell('ping'), 'pong')


class Cycles(Case):
    """Nothing is held here."""

    def test_cycles(self):
        """Two threads whose regions come and go, and have their handles reused, while the broker destroys some."""
        subprocess.run([CYCLES, DEVICE, self.path, '10000'], check=True, timeout=7 * TIMEOUT)


if __name__ == '__main__':
    case.main()
