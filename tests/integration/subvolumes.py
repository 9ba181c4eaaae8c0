#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""btrfs: /proc/PID/maps and /proc/locks have another device number than stat(), and inode numbers recur in each
subvolume. The right culprit is named all the same.
"""

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import unittest

from client import PAGE
from world import SIZE, Case, end_child

CTL = os.path.join(os.environ['BUILD_ROOT'], 'client', 'pinbrokerctl')
MEBIBYTE = 1 << 20


class Subvolumes(Case):
    def setUp(self):
        super().setUp()
        image, self.mount = os.path.join(self.dir, 'image'), tempfile.mkdtemp(dir='/var/tmp')
        self.addCleanup(os.rmdir, self.mount)
        with open(image, 'wb') as f:
            f.truncate(200 * MEBIBYTE)
        subprocess.run(['mkfs.btrfs', '-q', image], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(['mount', '-o', 'loop', image, self.mount], check=True)
        self.addCleanup(subprocess.run, ['umount', '-l', self.mount], check=True)
        self.files = []
        for name in ('one', 'two'):
            subvolume = os.path.join(self.mount, name)
            subprocess.run(['btrfs', '-q', 'subvolume', 'create', subvolume], check=True)
            path = os.path.join(subvolume, 'data')
            self.write(path, 'a' * SIZE)
            self.files.append(path)
        one, two = map(os.stat, self.files)
        self.assertEqual(one.st_ino, two.st_ino)
        self.assertNotEqual(one.st_dev, two.st_dev)
        self.start()

    def test_breakers(self):
        """Both wait at a time, and are told apart."""
        holders = [self.hold(file=file) for file in self.files]
        for holder in reversed(holders):
            pid, _ = self.truncate(self.files[holders.index(holder)])
            self.assertEqual(holder.notice()['conflict']['cause'], 'modify')
            self.assertEqual(holder.notice()['conflict']['pid'], pid)
        for holder in holders:
            holder.release()

    def map_file(self, path):
        """A process that has it mapped, and no descriptor of it."""
        ready, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                fd = os.open(path, os.O_RDWR)
                memory = mmap.mmap(fd, PAGE)
                # with the one that mmap.mmap() keeps; they may have any numbers that were free
                os.closerange(3, end)
                os.closerange(end + 1, 1024)
                os.write(end, memory[:1])
                signal.pause()
            except BaseException:  # pylint: disable=broad-except
                traceback.print_exc()
            finally:
                os._exit(0)
        self.addCleanup(end_child, pid)
        self.addCleanup(os.close, ready)
        os.close(end)
        self.assertEqual(os.read(ready, 1), b'a')
        return pid

    def openers(self, path):
        p = subprocess.run([CTL, '--json=short', 'preflight', path], stdout=subprocess.PIPE,
                           check=True, env=dict(os.environ, PINBROKER_SOCKET=self.path))
        return {o['pid']: o['uses'] for o in json.loads(p.stdout)['openers']}

    def test_preflight(self):
        """Who has the file mapped is listed, and not who has the other."""
        pids = [self.map_file(file) for file in self.files]
        for pid, file in zip(pids, self.files):
            self.assertEqual(self.openers(file), {pid: ['maps writable']})


if __name__ == '__main__':
    if not shutil.which('mkfs.btrfs') or 'btrfs' not in open('/proc/filesystems',
                                                            encoding='ascii').read().split():
        print('no btrfs here')
        sys.exit(77)
    unittest.main()
