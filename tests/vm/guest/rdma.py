#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory regions over a file, written to by a peer over soft-RoCE: without the broker what is written after a
truncate is nowhere; with it the truncate waits until the server has let go, or has been made to.
"""
import os
import shutil
import signal
import tempfile

import pyverbs.enums as e

import case
from installed import TESTER
from rdma_server import DEVICE, SIZE, WRITTEN, Case, can_page, configure, regions, unconfigure
from client import PAGE, is_readable


setUpModule, tearDownModule = configure, unconfigure


class Rdma(Case):
    def expect_lost(self, server):
        """What the peer writes after the truncate, without an error, is nowhere."""
        self.assertEqual(self.write(server.exported, b'lost'), e.IBV_WC_SUCCESS)
        with open(self.path, 'rb') as f:
            self.assertEqual(f.read(), bytes(SIZE))

    def test_without(self):
        server = self.serve(broker=False)
        os.truncate(self.path, 0)
        os.truncate(self.path, SIZE)
        self.expect_lost(server)
        # pages that are nobody's are pinned
        self.expect_regions(server, 1)

    def test_cooperative(self):
        server = self.serve()
        context = server.exported['context']
        self.assertEqual((context['kind'], context['device'], context['forcible'], context['proof']),
                         ('rdma', DEVICE, True, 'provable'))
        self.assertEqual(regions(), [(server.pid, SIZE)])
        result = self.truncate()
        self.assertEqual(server.tell('notice')['conflict']['cause'], 'modify')
        self.assertFalse(is_readable(result, 0))
        self.assertEqual(server.tell('release'), [])
        self.truncated(result)
        self.expect_released('provable')
        self.expect_regions(server, 0)
        self.assertEqual(self.write(server.exported, b'late'), e.IBV_WC_REM_ACCESS_ERR)
        # … and goes on
        server.tell('reopen', SIZE)
        self.expect_regions(server, 1)
        self.assertEqual(server.tell('read', len(WRITTEN)), WRITTEN.decode())

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
        server = self.serve(uid=TESTER)
        self.expect_forced(server)
        self.assertEqual(self.write(server.exported, b'late'), e.IBV_WC_REM_ACCESS_ERR)

    def test_many(self):
        """More regions in its context than fit into a first guess: which are there is known all the same."""
        server = self.serve()
        self.others = 10000
        server.tell('register_others', self.others)
        self.expect_regions(server, 1)
        self.expect_forced(server)

    def test_registered_anew(self):
        """In the place of the first, and bound: that is the one that is destroyed."""
        server = self.serve()
        server.tell('register_anew')
        self.expect_regions(server, 1)
        self.expect_forced(server)

    def test_registered_again(self):
        """Over the same memory, and bound in the place of the first: what nobody tells of is there still."""
        server = self.serve()
        server.tell('register')
        self.expect_regions(server, 2)
        self.expect_signalled(server)

    def test_registered_secretly(self):
        """Anew, without a word."""
        server = self.serve()
        server.tell('slip')
        self.expect_regions(server, 1)
        self.expect_signalled(server)

    def test_never_bound(self):
        self.expect_signalled(self.serve(bind=False))

    def test_window(self):
        server = self.serve()
        self.assertEqual(server.tell('window'), e.IBV_WC_SUCCESS)
        self.expect_regions(server, 1)
        self.expect_signalled(server)

    def test_device_closed(self):
        """The broker's own descriptor keeps the region alive, and is all that it takes to end it."""
        server = self.serve()
        server.tell('close_device')
        self.expect_regions(server, 1)
        result = self.truncate()
        self.truncated(result)
        self.expect_regions(server, 0)
        self.assertEqual(server.tell('ping'), 'pong')

    def test_killed(self):
        server = self.serve()
        child = server.tell('fork')
        self.addCleanup(os.kill, child, signal.SIGKILL)
        os.kill(server.pid, signal.SIGKILL)
        os.waitpid(server.pid, 0)
        self.expect_regions(None, 1)
        result = self.truncate()
        self.truncated(result)
        self.expect_released('provable')
        self.expect_regions(None, 0)


class OnDemand(Case):
    """On-demand paging pins nothing: whoever wants the pages does not wait, and there is no harm."""

    def serve(self, **options):
        try:
            return super().serve(on_demand=True, **options)
        except AssertionError:
            if not can_page(self.peer):
                self.skipTest('this kernel has no on-demand paging over soft-RoCE')
            raise

    def pages(self, n):
        return 0

    def test_on_demand(self):
        self.expect_on_demand(self.serve())

    def test_on_demand_fsdax(self):
        """Where other pins are refused."""
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/mnt/dax')
        self.addCleanup(shutil.rmtree, directory)
        os.chmod(directory, 0o755)
        self.path = os.path.join(directory, 'data')
        with open(self.path, 'wb') as f:
            f.write(bytes(SIZE))
        server = self.serve()
        self.assertEqual(server.tell('pin_pages'), ['org.pinbroker.NotSupported', 'fsdax'])
        self.expect_on_demand(server)

    def expect_on_demand(self, server):
        result = self.truncate()
        self.truncated(result)
        self.expect_released(None)
        self.assertEqual(server.tell('notice')['conflict']['cause'], 'modify')
        conflict = server.tell('notice')['conflict']
        self.assertEqual((conflict['cause'], conflict['size']), ('shrink', PAGE))
        # The region goes on, as far as there is a file.
        self.expect_regions(server, 1)
        self.assertEqual(self.write(server.exported, b'after'), e.IBV_WC_SUCCESS)
        with open(self.path, 'rb') as f:
            self.assertTrue(f.read().startswith(b'after'))
        self.assertEqual(self.write(server.exported, b'beyond', 2 * PAGE), e.IBV_WC_REM_ACCESS_ERR)
        self.assertEqual(server.tell('release'), [])
        self.expect_regions(server, 0)


if __name__ == '__main__':
    case.main()
