#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands of tools/ as somebody meets them for the first time: what they say to --help, to arguments that
they do not have, and without root. They are run in a copy, which has nothing to build or to install.
"""

import fcntl
import glob
import os
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
USAGE, NOPERM = 64, 77  # sysexits.h
NOBODY = 65534
COMMANDS = {'check': ['--help', '--quick', '--vm'], 'deb': [], 'demo': []}


class Tools(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, self.dir)
        os.chmod(self.dir, 0o755)
        shutil.copytree(SOURCE + '/tools', self.dir + '/tools')

    def command(self, name, *arguments, **kwargs):
        result = subprocess.run([f'tools/{name}', *arguments], cwd=self.dir, stdin=subprocess.DEVNULL,
                                capture_output=True, encoding='utf-8', timeout=20, check=False, **kwargs)
        self.assertEqual(os.listdir(self.dir), ['tools'])
        return result

    def test_help(self):
        for name in COMMANDS:
            for option in ('-h', '--help'):
                result = self.command(name, option)
                self.assertEqual((result.returncode, result.stderr), (0, ''))
                self.assertRegex(result.stdout, f'(?s)^tools/{name}[^\n]*\n\nBuilds .*packages')

    def test_wrong_usage(self):
        for name, options in COMMANDS.items():
            for arguments in (['--nonsense'], ['stray'], [''], ['--help', '--help'], *([o, o] for o in options)):
                with self.subTest((name, arguments)):
                    result = self.command(name, *arguments)
                    self.assertEqual((result.returncode, result.stdout), (USAGE, ''))
                    self.assertRegex(result.stderr, f'^tools/{name}')

    def test_without_root(self):
        nobody = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []}
        for name, *arguments in (('check',), ('check', '--quick'), ('check', '--vm'), ('demo',)):
            with self.subTest((name, arguments)):
                result = self.command(name, *arguments, **nobody)
                self.assertEqual((result.returncode, result.stdout), (NOPERM, ''))
                self.assertRegex(result.stderr, f'^tools/{name}: has to run as root: ')
                self.assertEqual(result.stderr.count('\n'), 1)

    @unittest.skipUnless(os.getuid() == 0 and shutil.which('apt-get'), 'installs on Debian and as root')
    def test_locked(self):
        """Somebody else has apt's lists: it says so, and waits. (What it installs from then on is nothing: these
        lists are empty.)
        """
        for name in ('lists/partial', 'archives/partial', 'none'):
            os.makedirs(f'{self.dir}/apt/{name}')
        with open(self.dir + '/apt/conf', 'w', encoding='ascii') as f:
            f.write(f'Dir::State "{self.dir}/apt"; Dir::State::Lists "{self.dir}/apt/lists";\n'
                    f'Dir::State::Status "{self.dir}/apt/status"; Dir::Cache "{self.dir}/apt";\n'
                    f'Dir::Etc "{self.dir}/apt/none"; Dir::Bin::dpkg "/bin/false";\n')
        for name in ('status', 'wanted'):
            with open(f'{self.dir}/apt/{name}', 'w', encoding='ascii') as f:
                f.write('' if name == 'status' else 'pinbroker-no-such-package\n')
        command = 'set -euo pipefail; lists=apt/wanted . tools/install-packages'
        with open(self.dir + '/apt/lists/lock', 'wb') as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            waiting = subprocess.Popen(['bash', '-c', command], cwd=self.dir, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding='utf-8',
                                       env={**os.environ, 'APT_CONFIG': self.dir + '/apt/conf'})
            self.addCleanup(waiting.kill)
            said = ''
            while 'waiting' not in said:
                line = waiting.stderr.readline()
                self.assertTrue(line, said)
                said += line
            self.assertRegex(said, 'Could not get lock .*/lists/lock')
        said = waiting.communicate(timeout=20)[1]
        self.assertRegex(said, 'Unable to locate package pinbroker-no-such-package')
        self.assertNotIn('Could not get lock', said)
        self.assertNotEqual(waiting.returncode, 0)

    def test_lists(self):
        """A package whose name has a version is in one Debian alone."""
        lists = glob.glob(SOURCE + '/tools/packages*')
        self.assertGreater(len(lists), 1)
        for path in lists:
            with open(path, encoding='utf-8') as f:
                names = f.read().split()
            self.assertTrue(names, path)
            for name in names:
                self.assertFalse(re.search(r'-\d+(\.\d+)*(-|$)', name), f'{path}: {name}')


if __name__ == '__main__':
    signal.alarm(120)
    unittest.main(verbosity=2)
