#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples ($EXAMPLES is where they are built), each beside a real daemon: a truncate is held until
they have let go, and then goes through (I2).
"""

import os
import re
import signal
import threading
import unittest

from client import PAGE, WAIT, truncate_in_child
from world import SIZE, Case, Daemon, end_child


class Example(Daemon):
    def __init__(self, case, name, stdin=None):
        program = os.path.join(os.environ['EXAMPLES'], 'example-' + name)
        redirect = f'exec "$@" <&{stdin}' if stdin else 'exec "$@"'
        super().__init__(['sh', '-c', redirect, 'sh', program, case.file],
                         env={'PINBROKER_SOCKET': case.path, 'PINBROKER_BUS': case.address},
                         pass_fds=[stdin] if stdin else [])
        case.addCleanup(self.close)
        self.case = case

    def expect(self, pattern, before='$'):
        """The next line is this one; only such as match the other pattern may come before it."""
        timer = threading.Timer(WAIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        while re.match(before, line.rstrip('\n')) and line:
            line = self.process.stdout.readline()
        timer.cancel()
        self.case.assertRegex(line, f'^{pattern}\n$', self.text())

    def expect_end(self):
        self.case.assertEqual((self.wait(), self.process.stdout.read(), self.text()), (0, '', ''))


class Examples(Case):
    def setUp(self):
        super().setUp()
        self.start_bus()
        self.daemon = self.start()
        self.notice = f'(modify|truncate) of {self.file}'

    def truncate_against(self, example, size):
        """The example is stopped for a while, so that the truncate can be seen to wait."""
        before = os.stat(self.file).st_size
        example.kill(signal.SIGSTOP)
        pid, result = truncate_in_child(self.file, size)
        self.addCleanup(os.close, result)
        self.addCleanup(end_child, pid)
        self.daemon.wait_for_log(rf'on behalf of \S+ \(pid {pid}\)')
        self.assertEqual(os.stat(self.file).st_size, before)
        example.kill(signal.SIGCONT)
        self.truncated(result)
        self.assertEqual(os.stat(self.file).st_size, size)

    def expect_nothing_lost(self):
        """Everybody let go when asked."""
        self.assertNotRegex(self.daemon.text(), r'(?i)forc|signal|kill|lost')
        self.expect_end(self.daemon)

    def test_holder(self):
        holder = Example(self, 'holder')
        holder.expect(rf'holding {SIZE} bytes with pin \d+')
        self.truncate_against(holder, PAGE)
        holder.expect(self.notice + ', by .*')
        holder.expect(r'let go of pin \d+', before=self.notice)
        holder.process.stdout.readline()  # who it was, if that was told by a second notice
        holder.expect_end()
        self.expect_nothing_lost()

    def test_holder_of_nothing(self):
        os.truncate(self.file, 0)
        holder = Example(self, 'holder')
        self.assertEqual(holder.wait(), 1)
        self.assertRegex(holder.text(), 'The file is empty')
        os.unlink(self.file)
        holder = Example(self, 'holder')
        self.assertEqual(holder.wait(), 1)
        self.assertRegex(holder.text(), f'Cannot open {self.file}: No such file')

    def test_names(self):
        """The library's messages name the file, and hold nothing that a terminal obeys."""
        for path, said in ((self.dir + '/\x1b[2J\udc9b\n', r'Cannot open \S*/\\x1b\[2J\\x9b\\x0a: No such file'),
                           ('/dev/null', 'Cannot open /dev/null: Only regular files'), ('', "Cannot open '': No such file")):
            self.file = path
            holder = Example(self, 'holder')
            self.assertEqual(holder.wait(), 1)
            self.assertRegex(holder.text(), f'^example-holder: {said}[^\x00-\x09\x0b-\x1f\x7f-\x9f]*\\.\n$')

    def test_repin(self):
        example = Example(self, 'repin')
        example.expect(rf'holding {SIZE} bytes with pin \d+')
        # It may be too early for a moment, and get hold of what is about to be cut off.
        early = r'waiting|holding \d{5,} bytes|let go'
        self.truncate_against(example, PAGE)
        example.expect(r'let go of pin \d+')
        example.expect(rf'holding {PAGE} bytes with pin \d+', before=early)
        self.truncate_against(example, 0)
        example.expect(r'let go of pin \d+')
        example.expect('waiting', before=rf'holding {PAGE} bytes|let go')
        # Nothing is held of an empty file.
        os.truncate(self.file, 3 * PAGE)
        example.expect(rf'holding {3 * PAGE} bytes with pin \d+')
        example.kill(signal.SIGTERM)
        example.expect(r'let go of pin \d+')
        example.expect_end()
        self.expect_nothing_lost()

    def test_repin_waits_for_a_file(self):
        os.unlink(self.file)
        example = Example(self, 'repin')
        example.expect('waiting')
        self.make_file('data')
        example.expect(rf'holding {SIZE} bytes with pin \d+')
        example.kill(signal.SIGINT)
        example.expect(r'let go of pin \d+')
        example.expect_end()

    def capture(self):
        stdin, end = os.pipe()
        self.addCleanup(os.close, end)
        example = Example(self, 'epoll', stdin)
        os.close(stdin)
        example.expect(rf'holding {SIZE} bytes with pin \d+')
        return example, end

    def test_epoll(self):
        example, end = self.capture()
        os.write(end, b'hello')
        example.expect('stored 5 bytes at 0')
        os.write(end, b', world')
        example.expect('stored 7 bytes at 5')
        # The next read is under way, and uses the pages until it has been cancelled.
        self.truncate_against(example, PAGE)
        example.expect(self.notice)
        example.expect(r'let go of pin \d+')
        example.expect_end()
        with open(self.file, 'rb') as f:
            self.assertEqual(f.read(16), b'hello, worldaaaa')
        self.expect_nothing_lost()

    def test_epoll_ends(self):
        example, _ = self.capture()
        example.kill(signal.SIGTERM)
        example.expect(r'let go of pin \d+')
        example.expect_end()

        example, end = self.capture()
        with os.fdopen(os.dup(end), 'wb') as f:
            f.write(b'b' * SIZE)
        example.expect(r'let go of pin \d+', before='stored')
        example.expect_end()


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
