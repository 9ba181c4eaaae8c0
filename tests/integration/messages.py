#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pinbrokerctl says where things are not as usual: names that hold anything, a daemon that does not answer,
one that is not there, and a holder that ignores what it is told.
"""

import json
import os
import re
import signal
import subprocess
import threading
import unittest

from client import PAGE, SIZE, WAIT
from world import Case, end_child

TOOL = os.path.join(os.environ['BUILD_ROOT'], 'client', 'pinbrokerctl')
OK, USAGE, NOINPUT, UNAVAILABLE = 0, 64, 66, 69  # sysexits.h
# a clear screen, a title, C1 as a byte and as UTF-8, a line, half a character
NASTY = b'a b\x1b[2J\x1b]0;t\x07\x9b\xc2\x9b\x7f\nx\xc3'
# what a terminal may obey
CONTROL = re.compile(rb'[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]')


class Messages(Case):
    def setUp(self):
        super().setUp()
        self.start_bus()
        self.daemon = self.start()
        self.daemon.wait_for_log('On the bus')
        self.env = dict(os.environ, PINBROKER_SOCKET=self.path, PINBROKER_BUS=self.address, LC_ALL='C.UTF-8',
                        PINBROKER_TIMEOUT='1')

    def tool(self, *args):
        """Its exit status, stdout and stderr."""
        r = subprocess.run([TOOL, *args], stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT,
                           env=self.env, check=False)
        return r.returncode, r.stdout, r.stderr

    def spawn_tool(self, *args):
        return self.spawn([TOOL, *args], env={k: self.env[k] for k in self.env if k.startswith('PINBROKER_')})

    def expect_harmless(self, *args):
        status, out, err = self.tool(*args)
        for text in (out, err):
            text.decode()  # is UTF-8
            self.assertIsNone(CONTROL.search(text), (args, text))
        return status, out, err

    def test_names(self):
        """Nothing of a name reaches the terminal as a command, and all output is UTF-8."""
        name = os.path.join(os.fsencode(self.dir), NASTY)
        os.rename(self.file, name)
        holder = self.spawn_tool('hold', '--on-revoke', 'ignore', name)
        self.assertRegex(holder.process.stdout.readline(), r'^holding \S+/a\\040b\\033\[2J\S* pin \d+ ')
        for args in ((b'list',), (b'list', b'files'), (b'map', name), (b'preflight', name), (b'status',),
                     (b'show', b'1', b'2', b'3', b'4', b'5')):
            self.expect_harmless(*args)
            for mode in (b'short', b'pretty'):
                _, out, _ = self.expect_harmless(*args, b'--json=' + mode)
                json.loads(out)
        status, out, _ = self.expect_harmless('map', name)
        self.assertEqual(status, OK)
        self.assertIn(rb'/a b\x1b[2J\x1b]0;t\x07\x9b\xc2\x9b\x7f\x0ax\xc3: file', out)
        for args in ((NASTY,), (b'map', NASTY), (b'preflight', NASTY), (b'hold', NASTY), (b'show', NASTY),
                     (b'revoke', NASTY), (b'revoke', b'--file', NASTY), (b'revoke', b'--mount', NASTY),
                     (b'revoke', b'--device', NASTY), (b'revoke', b'--client', NASTY),
                     (b'revoke', b'--timeout', NASTY, b'1'), (b'list', NASTY), (b'list', b'--file', NASTY),
                     (b'hold', b'--range', NASTY, b'x'), (b'hold', b'--access', NASTY, b'x'),
                     (b'hold', name, b'--', NASTY), (b'--json=' + NASTY, b'list'), (b'--' + NASTY, b'list'),
                     (b'list', b'--' + NASTY), (b'--socket', NASTY, b'list'), (b'--bus', NASTY, b'watch'),
                     (b'watch', NASTY), (b'status', NASTY)):
            with self.subTest(args):
                status, _, err = self.expect_harmless(*args)
                self.assertNotEqual(status, OK)
                self.assertTrue(err)
        self.expect_end(holder)

    def test_show(self):
        status, _, err = self.tool('show', '999', '1000')
        self.assertEqual(status, NOINPUT)
        for number in (b'999', b'1000'):
            self.assertRegex(err, b'There is no object %s, or .*pinbrokerctl list' % number)

    def test_ignoring(self):
        """Who ignores what it is told notices that its pins are gone."""
        holder = self.spawn_tool('hold', '--on-revoke', 'ignore', '--access', 'write', self.file)
        self.assertRegex(holder.process.stdout.readline(), '^holding ')
        pid = os.fork()
        if pid == 0:
            subprocess.run([TOOL, 'revoke', '--file', self.file, '--timeout', '0'], env=self.env, check=False)
            os._exit(0)
        self.addCleanup(end_child, pid)
        lines = [holder.process.stdout.readline() for _ in range(2)]
        self.assertRegex(lines[0], r'^revoked .* cause admin ')
        self.assertRegex(lines[1], r'^released .* by force ')
        self.assertEqual(holder.wait(), OK)

    def test_stopped(self):
        """Nobody waits for ever for a daemon that does not answer, and all say what it is."""
        self.daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WNOWAIT)
        failed = []

        def run(*args):
            try:
                status, _, err = self.tool(*args)
            except subprocess.TimeoutExpired:
                status, err = None, b''
            if status != UNAVAILABLE or not re.search(rb'(stopped, or hangs|does not answer).*systemctl status',
                                                      err):
                failed.append((args, status, err))

        threads = [threading.Thread(target=run, args=args) for args in (
            ('status',), ('list',), ('list', 'files'), ('list', 'clients'), ('list', 'contexts'),
            ('list', 'revocations'), ('show', '1'), ('map', self.file), ('hold', self.file),
            ('revoke', '1'), ('revoke', '--client', '1'))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.daemon.kill(signal.SIGCONT)
        self.assertEqual(failed, [])
        self.assertEqual(self.tool('list')[0], OK)

    def test_watch_without_broker(self):
        """Nothing would be seen, which is said, and when that changes."""
        self.expect_end(self.daemon)
        watch = self.spawn_tool('watch')
        watch.wait_for_log('The broker is not on the bus, and nothing is seen until it is. .*systemctl')
        self.daemon = self.start()
        watch.wait_for_log('The broker is on the bus')
        self.expect_end(self.daemon)
        watch.wait_for_log('(?s)(The broker is not on the bus.*){2}')


if __name__ == '__main__':
    signal.alarm(200)
    unittest.main(verbosity=2)
