#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tools/demo claims it sees each time, and it tells what it has seen from what it could not look at.
$PINBROKER_DEMO_RUNS is how often it is run: 200 for a release, fewer otherwise.
"""

import os
import shutil
import signal
import subprocess
import unittest

from client import WAIT
from world import NOBODY, Case

DEMO = os.path.join(os.environ['BUILD_ROOT'], 'tools', 'demo')
LIBRARY = os.path.join(os.environ['BUILD_ROOT'], 'client', 'libpinbroker.so.1')
RUNS = int(os.environ.get('PINBROKER_DEMO_RUNS', '16'))
NOT_AS_CLAIMED, CANNOT_TELL = 1, 2


class Demo(Case):
    def setUp(self):
        super().setUp()
        self.start_bus()
        self.daemon = self.start()
        self.daemon.wait_for_log('On the bus')
        os.unlink(self.file)

    def demo(self, file=None, **kwargs):
        return subprocess.run([DEMO, self.path, self.address, file or self.file], capture_output=True,
                              encoding='utf-8', timeout=2 * WAIT, check=False, **kwargs)

    def test_again_and_again(self):
        """The lease may outlive the holder's process by a moment, and nobody who looks then fails."""
        for run in range(RUNS):
            result = self.demo()
            self.assertEqual((result.returncode, result.stderr), (0, ''), f'run {run}: {result.stdout}')
            self.assertIn('it is nowhere. The write is LOST', result.stdout)
            self.assertIn('"written by the hardware" is there', result.stdout)
            self.assertFalse(os.path.exists(self.file))

    def test_what_it_cannot_see(self):
        # the build tree may be where nobody can go
        os.chmod(self.dir, 0o755)
        for path in (DEMO, LIBRARY):
            shutil.copy(path, self.dir)
        for what, message, kwargs in (
                ('counters', 'bring the pin counters up to date', {
                    'user': NOBODY, 'group': NOBODY, 'extra_groups': [], 'executable': self.dir + '/demo',
                    'env': dict(os.environ, LD_LIBRARY_PATH=self.dir)}),
                ('file', 'make .*/missing/data: No such file', {'file': self.dir + '/missing/data'})):
            with self.subTest(what):
                result = self.demo(**kwargs)
                self.assertEqual(result.returncode, CANNOT_TELL, result.stderr)
                self.assertRegex(result.stderr, f'^demo: cannot tell: failed to {message}')
                self.assertNotIn('not as claimed', result.stderr)

    def test_no_broker(self):
        """That nobody answers shows nothing either, and the library's sentence says why."""
        self.expect_end(self.daemon)
        result = self.demo()
        self.assertEqual(result.returncode, CANNOT_TELL)
        self.assertRegex(result.stderr, f'cannot tell: failed to connect: .*{self.path}')


if __name__ == '__main__':
    signal.alarm(60 + 10 * RUNS)
    unittest.main(verbosity=2)
