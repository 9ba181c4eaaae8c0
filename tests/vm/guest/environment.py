#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the other tests find in this machine."""
import ctypes
import fcntl
import glob
import json
import os
import platform
import struct
import subprocess
import unittest

import case


def output(*argv):
    return subprocess.run(argv, check=True, capture_output=True, encoding='utf-8', timeout=60).stdout


def attributes(path):
    """statx's stx_attributes, and which of them the file system knows."""
    buffer = ctypes.create_string_buffer(256)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        empty_path = 0x1000
        if ctypes.CDLL(None, use_errno=True).statx(fd, b'', empty_path, 0, buffer) < 0:
            raise OSError(ctypes.get_errno(), path)
    finally:
        os.close(fd)
    value, = struct.unpack_from('Q', buffer, 8)
    mask, = struct.unpack_from('Q', buffer, 56)
    return value, mask


class Environment(unittest.TestCase):
    def test_versions(self):
        print(f'Linux {platform.release()}, {output("systemctl", "--version").splitlines()[0]}')
        with open('/proc/1/comm', encoding='ascii') as f:
            self.assertEqual(f.read().strip(), 'systemd')

    def test_running(self):
        """No unit has failed, and the bus is up."""
        state = subprocess.run(['systemctl', 'is-system-running', '--wait'], capture_output=True,
                               encoding='utf-8', timeout=120, check=False).stdout.strip()
        self.assertEqual(state, 'running', output('systemctl', '--failed'))
        output('busctl', 'status', 'org.freedesktop.DBus')
        output('busctl', 'call', 'org.freedesktop.PolicyKit1', '/org/freedesktop/PolicyKit1/Authority',
               'org.freedesktop.DBus.Peer', 'Ping')

    def test_users(self):
        self.assertIn('tester', output('getent', 'passwd', 'tester'))
        self.assertIn('pinbroker', output('getent', 'group', 'pinbroker'))

    def test_rdma(self):
        self.assertIn('PORT_ACTIVE', output('ibv_devinfo', '-d', 'rxe0'))

    def test_fsdax(self):
        path = '/mnt/dax/environment'
        with open(path, 'wb') as f:
            f.write(b'a' * 4096)
        self.addCleanup(os.unlink, path)
        self.assertTrue(os.path.ismount('/mnt/dax'))
        dax = 1 << 21
        value, mask = attributes(path)
        self.assertTrue(mask & dax and value & dax, f'{value:#x} {mask:#x}')

    def test_devdax(self):
        devices = json.loads(output('daxctl', 'list'))
        self.assertEqual([d['mode'] for d in devices], ['devdax'])
        self.assertTrue(os.path.exists('/dev/' + devices[0]['chardev']))

    def test_vfio(self):
        """A container, and the card's group in it."""
        set_container, set_iommu, type1v2 = 0x3b68, 0x3b66, 3
        groups = glob.glob('/dev/vfio/[0-9]*')
        self.assertEqual(len(groups), 1)
        container, group = (os.open(path, os.O_RDWR | os.O_CLOEXEC)
                            for path in ('/dev/vfio/vfio', groups[0]))
        self.addCleanup(os.close, container)
        self.addCleanup(os.close, group)
        fcntl.ioctl(group, set_container, struct.pack('i', container))
        fcntl.ioctl(container, set_iommu, type1v2)

    def test_hugepages(self):
        with open('/proc/sys/vm/nr_hugepages', encoding='ascii') as f:
            self.assertGreaterEqual(int(f.read()), 32)
        self.assertTrue(os.path.ismount('/dev/hugepages'))

    def test_xfs(self):
        self.assertTrue(os.path.ismount('/mnt/xfs'))


if __name__ == '__main__':
    case.main()
