#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files on mounts that their clients do not see: out of a chroot, from another mount namespace, unmounted while
they are open. And mounts by the thousand, with long names.
"""

import ctypes
import os
import re
import unittest

from client import Refused
from world import Case, in_child, open_file

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x1000, 0x4000, 0x40000, 2
MOUNTS = 2000


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, target, kind=None, flags=0):
    check(LIBC.mount(source, target.encode(), kind, flags, None))


def unshare():
    """Mounts made from here on are this process's alone."""
    check(LIBC.unshare(CLONE_NEWNS))
    mount(b'none', '/', flags=MS_REC | MS_PRIVATE)


def make_tmpfs(directory):
    os.mkdir(directory)
    mount(b'none', directory, b'tmpfs')
    path = directory + '/file'
    with open(path, 'wb') as f:
        f.write(b'a' * 4096)
    return path


class Mounts(Case):
    def setUp(self):
        super().setUp()
        self.daemon = self.start()

    def client(self):
        connection = self.connect()
        connection.call('org.pinbroker.Hello', {'name': 'client'})
        return connection

    def opened(self, path, fd=None):
        """Opens it for pinning, by its name or an O_PATH descriptor."""
        return open_file(self.client(), path if fd is None else f'/proc/self/fd/{fd}')['info']

    def test_chroot(self):
        """Mountinfo has only mounts below the root."""
        def run():
            unshare()
            make_tmpfs(self.dir + '/fs')
            os.mkdir(self.dir + '/fs/jail')
            os.rename(self.dir + '/fs/file', self.dir + '/fs/jail/file')
            connection = self.client()
            os.chroot(self.dir + '/fs/jail')
            os.chdir('/')
            return open_file(connection, '/file')['info']['fileSystem']

        self.assertEqual(in_child(run), 'tmpfs')

    def test_unmounted(self):
        """It is on no mount of any namespace any more."""
        def run():
            unshare()
            fd = os.open(make_tmpfs(self.dir + '/fs'), os.O_PATH)
            check(LIBC.umount2((self.dir + '/fs').encode(), MNT_DETACH))
            return self.opened(None, fd)['fileSystem']

        self.assertEqual(in_child(run), 'tmpfs')

    def test_other_namespace(self):
        """The descriptor was made in a namespace that its holder then left, as one that was handed over."""
        def run():
            home = os.open('/proc/self/ns/mnt', os.O_RDONLY)
            unshare()
            fd = os.open(make_tmpfs(self.dir + '/fs'), os.O_PATH)
            check(LIBC.setns(home, CLONE_NEWNS))
            return self.opened(None, fd)['fileSystem']

        self.assertEqual(in_child(run), 'tmpfs')

    def test_not_local(self):
        """What is not accepted when it is seen is not when it is hidden."""
        def run():
            os.mkdir(self.dir + '/jail')
            fd = os.open('/proc/self/status', os.O_PATH)
            connection = self.client()
            os.chroot(self.dir + '/jail')
            try:
                connection.call('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'read'}, [fd])
            except Refused as refused:
                return refused.parameters['cause']
            return None

        self.assertEqual(in_child(run), 'mount')

    def test_memfd(self):
        with self.assertRaises(Refused) as refused:
            self.client().call('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'write'},
                               [os.memfd_create('x')])
        self.assertEqual(refused.exception.parameters['cause'], 'memfd')

    def peak(self):
        with open(f'/proc/{self.daemon.pid}/status', encoding='utf-8') as f:
            return int(re.search(r'^VmHWM:\s*(\d+)', f.read(), re.M).group(1)) * 1024

    def test_many(self):
        """Megabytes of mountinfo are not kept in memory."""
        def run():
            unshare()
            path = make_tmpfs(self.dir + '/fs')
            directory = self.dir + '/fs'
            while len(directory) < 3600:
                directory += '/' + 'x' * 250
                os.mkdir(directory)
            for _ in range(MOUNTS):
                mount(directory.encode(), directory, flags=MS_BIND)
            with open('/proc/self/mountinfo', 'rb') as f:
                size = sum(map(len, f))
            self.opened(path)
            return size

        before = self.peak()
        size = in_child(run)
        self.assertGreater(size, MOUNTS * 3600)
        self.assertLess(self.peak() - before, size / 2)


if __name__ == '__main__':
    unittest.main()
