#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""libpinbroker-verbs' examples over soft-RoCE: a client writes with RDMA into a file that somebody else
truncates.
"""
import os
import re
import select
import signal
import subprocess
import threading
import time
import unittest

import case
from installed import TIMEOUT, output

SERVER, CLIENT = '/build/client/example-rdma-server', '/build/client/example-rdma-client'
UNPROTECTED, HANDLE = '/build/tests/rdma-unprotected', '/build/tests/rdma-handle'
DEVICE, PORT = 'rxe0', '7471'
SIZE, LEFT = 1 << 20, 1 << 16
GRACE = 10  # seconds, as pinbroker.conf has it


class Program:
    """An example, and what it says."""

    def __init__(self, test, *argv):
        self.said = b''
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, bufsize=0)
        test.addCleanup(self.process.stdout.close)
        test.addCleanup(self.end)

    def end(self, sig=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(TIMEOUT)

    def expect(self, pattern, seconds=TIMEOUT):
        """Waits for it, and forgets what it said up to there."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern.encode(), self.said)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 4096) if ready else b''
            if not data:
                raise AssertionError(f'{self.process.args}: {self.said.decode()!r}, not {pattern!r}')
            self.said += data
        self.said = self.said[match.end():]
        return match


class Truncate(threading.Thread):
    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.seconds, self.error = path, None, None
        self.start()

    def run(self):
        begin = time.monotonic()
        try:
            os.truncate(self.path, LEFT)
        except OSError as e:
            self.error = e
        self.seconds = time.monotonic() - begin


class Rdma(unittest.TestCase):
    def setUp(self):
        self.path = '/dev/shm/rdma'
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)
        self.addCleanup(os.unlink, self.path)
        output('systemctl', 'restart', 'pinbrokerd.service')

    def pair(self, *argv, program=SERVER):
        server = Program(self, program, DEVICE, PORT, self.path)
        server.expect(f'holding {SIZE} bytes\n')
        client = Program(self, CLIENT, DEVICE, '127.0.0.1', PORT, *argv)
        client.expect(f'writing to {SIZE} bytes\n')
        self.see_writes(server)
        return server, client

    def number(self, server):
        """What the client has written, as the server sees it: to open the file would break the lease."""
        with open(f'/proc/{server.process.pid}/maps', encoding='ascii') as f:
            address = int(next(line for line in f if self.path in line).split('-')[0], 16)
        with open(f'/proc/{server.process.pid}/mem', 'rb', buffering=0) as f:
            f.seek(address)
            return int.from_bytes(f.read(8), 'little')

    def see_writes(self, server):
        """No event tells of them."""
        first, end = self.number(server), time.monotonic() + TIMEOUT
        while self.number(server) <= first:
            self.assertLess(time.monotonic(), end, 'no writes arrive')
            time.sleep(0.01)

    def end(self, server, client, truncate):
        truncate.join(TIMEOUT)
        self.assertFalse(truncate.is_alive())
        self.assertIsNone(truncate.error)
        server.expect(f'holding {LEFT} bytes\n')
        client.expect(f'writing to {LEFT} bytes\n')
        self.assertEqual(os.stat(self.path).st_size, LEFT)
        self.see_writes(server)
        self.assertEqual(server.end(signal.SIGTERM), 0)
        with open(self.path, 'rb') as f:
            self.assertGreater(int.from_bytes(f.read(8), 'little'), 0)

    def test_handle(self):
        """A region is told from what has its handle after it."""
        print(output(HANDLE, DEVICE))

    def test_unprotected(self):
        """Without the broker: the truncate goes through, and so does what is written after it, to pages
        that are nobody's.
        """
        server, client = self.pair(program=UNPROTECTED)
        os.truncate(self.path, 0)
        os.truncate(self.path, LEFT)
        with self.assertRaises(AssertionError):
            client.expect('write', seconds=2)
        self.assertIsNone(client.process.poll())
        with open(self.path, 'rb') as f:
            self.assertEqual(f.read(8), bytes(8))
        server.end()

    def test_truncate(self):
        """The server has its client stop, and deregisters."""
        server, client = self.pair()
        truncate = Truncate(self.path)
        server.expect('(modify|truncate) of /dev/shm/rdma')
        client.expect(r'told to stop at \d+\n')
        server.expect('client has stopped\nlet go\n')
        self.end(server, client, truncate)
        self.assertLess(truncate.seconds, GRACE)

    def test_stubborn_client(self):
        """The client writes on, and is stopped by the device."""
        server, client = self.pair('stubborn')
        truncate = Truncate(self.path)
        client.expect(r'told to stop')
        server.expect('client has not stopped\nlet go\n')
        client.expect(r'write \d+: remote access error\n')
        self.end(server, client, truncate)
        self.assertLess(truncate.seconds, GRACE)

    def test_hung_server(self):
        """The broker destroys the region, which the server then leaves alone."""
        server, client = self.pair()
        server.process.send_signal(signal.SIGSTOP)
        truncate = Truncate(self.path)
        client.expect(r'write \d+: remote access error\n')
        truncate.join(TIMEOUT)
        self.assertFalse(truncate.is_alive())
        self.assertGreater(truncate.seconds, GRACE / 2)
        server.process.send_signal(signal.SIGCONT)
        server.expect('let go\n')
        self.end(server, client, truncate)


if __name__ == '__main__':
    case.main()
