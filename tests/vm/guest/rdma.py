#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory regions over a file, written to by a peer over soft-RoCE: without the broker what is written after a
truncate is nowhere; with it the truncate waits until the server has let go, or has been made to.
"""
import os
import signal

import pyverbs.enums as e

import case
from installed import TESTER
from rdma_server import DEVICE, SIZE, Case, configure, regions, unconfigure
from client import is_readable


setUpModule, tearDownModule = configure, unconfigure


class Rdma(Case):
    def test_without(self):
        server = self.serve(broker=False)
        self.assertEqual(self.write(server.exported, b'before'), e.IBV_WC_SUCCESS)
        self.assertEqual(self.read_file(6), b'before')
        os.truncate(self.path, 0)
        os.truncate(self.path, SIZE)
        self.assertEqual(self.write(server.exported, b'lost'), e.IBV_WC_SUCCESS)
        self.assertEqual(self.read_file(4), bytes(4))

    def test_cooperative(self):
        server = self.serve()
        context = server.exported['context']
        self.assertEqual((context['kind'], context['device'], context['forcible'], context['proof']),
                         ('rdma', DEVICE, True, 'provable'))
        self.assertEqual(self.write(server.exported, b'before'), e.IBV_WC_SUCCESS)
        self.assertEqual(self.read_file(6), b'before')
        self.assertEqual(regions(), [(server.pid, SIZE)])
        result = self.truncate()
        self.assertEqual(server.tell('notice')['conflict']['cause'], 'modify')
        self.assertFalse(is_readable(result, 0))
        self.assertEqual(server.tell('release'), [])
        self.truncated(result)
        self.expect_released('provable')
        self.assertEqual(regions(), [])
        self.assertEqual(self.write(server.exported, b'late'), e.IBV_WC_REM_ACCESS_ERR)
        # … and goes on
        server.tell('reopen', SIZE)
        self.assertEqual(regions(), [(server.pid, SIZE)])

    def test_ignored(self):
        server = self.serve()
        self.expect_forced(server)
        self.assertEqual(self.write(server.exported, b'late'), e.IBV_WC_REM_ACCESS_ERR)
        self.assertEqual(server.tell('ping'), 'pong')

    def test_stopped(self):
        server = self.serve()
        os.kill(server.pid, signal.SIGSTOP)
        self.expect_forced(server)
        with open(f'/proc/{server.pid}/stat', encoding='ascii') as f:
            self.assertEqual(f.read().rsplit(')', 1)[1].split()[0], 'T')
        os.kill(server.pid, signal.SIGCONT)
        self.assertEqual(server.tell('ping'), 'pong')

    def test_other_user(self):
        self.expect_forced(self.serve(uid=TESTER))

    def test_registered_again(self):
        """Over the same memory, and bound in the place of the first: what nobody tells of is there still."""
        server = self.serve()
        server.tell('register')
        self.expect_signalled(server)

    def test_registered_secretly(self):
        server = self.serve()
        server.tell('slip')
        self.assertEqual(len(regions()), 1)
        self.expect_signalled(server)

    def test_never_bound(self):
        self.expect_signalled(self.serve(bind=False))

    def test_window(self):
        server = self.serve()
        self.assertEqual(server.tell('window'), e.IBV_WC_SUCCESS)
        self.expect_signalled(server)

    def test_device_closed(self):
        """The broker's own descriptor keeps the region alive, and is all that it takes to end it."""
        server = self.serve()
        server.tell('close_device')
        result = self.truncate()
        self.truncated(result)
        self.assertEqual(regions(), [])
        self.assertEqual(server.tell('ping'), 'pong')

    def test_killed(self):
        server = self.serve()
        child = server.tell('fork')
        self.addCleanup(os.kill, child, signal.SIGKILL)
        os.kill(server.pid, signal.SIGKILL)
        os.waitpid(server.pid, 0)
        self.assertEqual(len(regions()), 1)
        result = self.truncate()
        self.truncated(result)
        self.assertEqual(regions(), [])


if __name__ == '__main__':
    case.main()
