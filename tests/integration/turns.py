#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A turn of the loop is short, whatever a client holds (I6). The daemon of these tests measures its turns, and
aborts after some that are too long.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import unittest

from bypass import punch
from client import PAGE, WAIT, Refused
from world import SIZE, Case, end_child, fork_as, open_file

PB = 'org.pinbroker.'
RANGES = 1024  # in one call
MANY = 20 * RANGES if os.environ.get('PINBROKER_SANITIZED') else 128 * RANGES
FILES = 1000
STREAMS = 250
STARTED = r'Revocation \d+ of \d+ pins? of \S+ started'
LIMITS = '\n'.join(f'{limit}=2000000000' for limit in (
    'MaxClientsPerUser', 'MaxFilesPerUser', 'MaxContextsPerUser', 'MaxPinsPerUser', 'MaxQueuedBytesPerUser'))


class Holder:
    """A client with many pins on one file, through one context."""

    def __init__(self, path, connection, n_pins=0, context=None, on_demand=False):
        self.connection = connection
        self.on_demand = on_demand
        hello = self.call('Hello', {'name': 'many'})
        self.client = {'client': hello['client'], 'token': hello['token']}
        self.file = open_file(connection, path)['file']
        os.close(connection.fds[0])
        self.context = self.add_context(context)
        self.pins = []
        while len(self.pins) < n_pins:
            self.pins += self.pin(min(RANGES, n_pins - len(self.pins)))

    def call(self, method, parameters=None, fds=()):
        return self.connection.call(PB + method, parameters, fds)

    def add_context(self, fd=None):
        event = fd or os.eventfd(0, os.EFD_CLOEXEC)
        context = self.call('AddContext', {'fileDescriptor': 0}, [event])['context']
        if not fd:
            os.close(event)
        return context

    def revocations(self):
        return self.connection.list(PB + 'ListRevocations')

    def pin(self, n):
        return self.call('Pin', {'file': self.file, 'context': self.context, 'access': 'write',
                                 'onDemand': self.on_demand,
                                 'ranges': [{'offset': 0, 'length': SIZE}] * n})['pins']


class Turns(Case):
    def setUp(self):
        super().setUp()
        self.write(self.config, f'[Limits]\n{LIMITS}\n[Revocation]\nRevokeGraceSec=60\n')
        self.daemon = self.start()

    def tearDown(self):
        self.expect_alive()

    def expect_alive(self):
        self.assertIsNone(self.daemon.process.poll(), self.daemon.text())
        self.expect_served()

    def many(self, n_pins=MANY, file=None, **kwargs):
        return Holder(file or self.file, self.connect(), n_pins, **kwargs)

    def break_lease(self, file=None):
        """Returns when all holders have been told of it."""
        before = len(re.findall(STARTED, self.daemon.text()))
        with self.assertRaises(BlockingIOError):
            os.open(file or self.file, os.O_RDWR | os.O_NONBLOCK)
        self.daemon.wait_for_log(f'(?s)({STARTED}.*){{{before + 1}}}')

    def test_pin_while_revoked(self):
        """Whether a range overlaps a revocation is known without a look at every pin."""
        other = self.make_file('other')
        self.many(1, other)
        holder = self.many()
        self.break_lease(other)
        self.assertEqual(len(holder.pin(RANGES)), RANGES)
        self.expect_alive()

    def test_unpin_of_a_socket(self):
        """Its pins end with the last close of all: until then each is leaving, wanted and looked for."""
        with socket.socket(44, socket.SOCK_RAW) as xdp:  # AF_XDP
            holder = self.many(context=xdp.fileno())
            self.break_lease()
            holder.call('Unpin', {'pins': holder.pins})
        self.expect_alive()

    def test_streams(self):
        """Nobody reads them; what they have to be told is written down once."""
        holder = self.many(on_demand=True)
        streams = [self.watch(holder) for _ in range(STREAMS)]
        before = self.rss()
        for _ in range(3):
            self.break_lease()
            self.settle(holder)
        self.assertLess(self.rss() - before, 150 << 20)
        pins = set()
        while len(pins) < len(holder.pins):
            pins.update(streams[0].reply(PB + 'Watch')[0]['notice']['pins'])
        self.assertEqual(pins, set(holder.pins))

    def rss(self):
        with open(f'/proc/{self.daemon.pid}/statm', encoding='ascii') as f:
            return int(f.read().split()[1]) * PAGE

    def watch(self, holder):
        """Returns when the daemon has read the call."""
        connection = self.connect()
        connection.call('org.varlink.service.GetInfo')
        connection.send(PB + 'Watch', holder.client, more=True)
        return connection

    def settle(self, holder):
        """No revocation is running any more, and the lease is there again."""
        while any(r.get('endUSec') is None for r in holder.revocations()):
            pass
        while any(f['lease'] == 'none' for f in holder.connection.list(PB + 'ListFiles')):
            pass

    def test_missed(self):
        """Whoever was away is told of every pin, by Watch, and of some by Resume."""
        holder = self.many()
        self.break_lease()
        holder.connection.close()
        connection = self.connect()
        notices = connection.call(PB + 'Resume', holder.client)['notices']
        self.assertTrue(notices)
        stream, pins = self.watch(holder), set()
        while len(pins) < len(holder.pins):
            pins.update(stream.reply(PB + 'Watch')[0]['notice']['pins'])
        self.assertEqual(pins, set(holder.pins))
        holder.connection = connection
        self.assertEqual(holder.call('Unpin', {'pins': holder.pins})['ended'], [])
        self.settle(holder)

    def hold_in_child(self, then):
        """A process that has many pins, and then does something; returns when it has them."""
        read, write = os.pipe()

        def hold():
            holder = self.many(context=os.eventfd(0))
            os.write(write, b'x')
            os.close(write)
            then()
            holder.connection.close()

        pid, result = fork_as(None, hold)
        self.addCleanup(end_child, pid)
        self.addCleanup(result.close)
        os.close(write)
        with os.fdopen(read, 'rb') as f:
            self.assertEqual(f.read(), b'x')
        return pid

    def test_ladder(self):
        """To its end: the holder does nothing, and is killed."""
        self.expect_end(self.daemon)
        self.write(self.config, f'[Limits]\n{LIMITS}\n[Revocation]\nRevokeGraceSec=1\n'
                                'SignalOnTimeout=SIGKILL\n')
        self.daemon = self.start()
        pid = self.hold_in_child(signal.pause)
        self.break_lease()
        self.assertEqual(os.waitpid(pid, 0)[1], signal.SIGKILL)
        self.daemon.wait_for_log(f'released after .* {MANY} pins gone')

    def test_death(self):
        os.waitpid(self.hold_in_child(lambda: None), 0)
        self.wait_for_none('Clients')

    def wait_for_none(self, what):
        connection = self.connect()
        deadline = time.monotonic() + WAIT
        while connection.list(PB + 'List' + what):
            self.assertLess(time.monotonic(), deadline)

    def test_end(self):
        """Files, contexts and pins that are over, of a client whose connection ends."""
        holder = self.many(1)
        os.makedirs(self.dir + '/files')
        for i in range(FILES):
            open_file(holder.connection, self.make_file(f'files/{i}'))
            os.close(holder.connection.fds[0])
            holder.add_context()
        holder.call('Unpin', {'pins': holder.pins})
        holder.connection.close()
        self.wait_for_none('Clients')

    def test_objects(self):
        """All of them in one answer."""
        self.start_bus()
        self.expect_end(self.daemon)
        self.daemon = self.start()
        self.daemon.wait_for_log('On the bus as')
        holder = self.many(1)
        os.makedirs(self.dir + '/files')
        for i in range(FILES):
            open_file(holder.connection, self.make_file(f'files/{i}'))
            os.close(holder.connection.fds[0])
        answer = subprocess.run(
            ['busctl', '--address=' + self.address, 'call', 'org.pinbroker1', '/org/pinbroker1',
             'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects'],
            check=True, stdout=subprocess.PIPE).stdout
        self.assertEqual(answer.count(b'/org/pinbroker1/file/'), FILES + 1)

    def test_messages(self):
        """As long as they may be."""
        holder = self.many(1)
        holder.connection.send_bytes(json.dumps(
            {'method': PB + 'Unpin', 'parameters': {'pins': [1] * 340000}},
            separators=(',', ':')).encode() + b'\0')
        with self.assertRaises(Refused):
            holder.connection.reply(PB + 'Unpin')
        holder.connection.send_bytes(json.dumps(
            {'method': PB + 'Nothing', 'parameters': {str(i): 1 for i in range(80000)}},
            separators=(',', ':')).encode() + b'\0')
        with self.assertRaises(Refused):
            holder.connection.reply(PB + 'Unpin')
        self.assertEqual(holder.call('Unpin', {'pins': holder.pins})['ended'], [])

    def shared(self, holder):
        """The description that the holder shares with the daemon."""
        before = signal.signal(signal.SIGBUS, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGBUS, before)
        open_file(holder.connection, self.file)
        fd = holder.connection.fds[0]
        self.addCleanup(os.close, fd)
        return fd

    def expect_all_gone(self, holder):
        self.daemon.wait_for_log(STARTED)
        holder.call('Unpin', {'pins': holder.pins})
        self.daemon.wait_for_log(f'released after .* {MANY} pins gone')

    def test_shrunk(self):
        """Through the shared description, which no lease sees: the pins beyond the end are revoked by force."""
        holder = self.many()
        os.ftruncate(self.shared(holder), PAGE)
        self.daemon.wait_for_log(f'was truncated to {PAGE} bytes past its lease, under {MANY} pins: ')
        self.expect_all_gone(holder)

    def test_shrunk_again(self):
        """Before all have been found that were beyond the first end."""
        holder = self.many()
        fd = self.shared(holder)
        os.ftruncate(fd, 2 * PAGE)
        os.ftruncate(fd, SIZE)
        os.ftruncate(fd, PAGE)
        self.daemon.wait_for_log(f'was truncated to {PAGE} bytes past its lease')
        self.expect_all_gone(holder)

    def test_punched(self):
        holder = self.many()
        punch(self.shared(holder), 0, PAGE)
        self.daemon.wait_for_log(f'Pages were taken from .* past its lease, under {MANY} pins: ')
        self.expect_all_gone(holder)

    def test_changed_while_exposed(self):
        self.expect_end(self.daemon)
        self.write(self.config, f'[Limits]\n{LIMITS}\n[Files]\nReaders=admit\n')
        self.daemon = self.start()
        holder = self.many()
        with open(self.file, 'rb'):
            self.daemon.wait_for_log('is exposed')
            with open(self.file, 'r+b') as f:
                f.write(b'b')
            self.daemon.wait_for_log(f'changed while it was exposed, under {MANY} pins')
        self.expect_all_gone(holder)

    def test_stop(self):
        """All pins are revoked, and their holder lets go."""
        holder = self.many()
        self.daemon.kill(signal.SIGTERM)
        self.daemon.wait_for_log('to be let go')
        holder.call('Unpin', {'pins': holder.pins})
        self.assertEqual(self.daemon.wait(), 0, self.daemon.text())
        self.daemon = self.start()


if __name__ == '__main__':
    unittest.main()
