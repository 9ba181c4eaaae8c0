#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who can pin what: memory of each kind, mapped by one who has it open for reading or for writing, by each
mechanism. What is expected is written out; what the kernel does and what `pinbrokerctl preflight` says of it
must both be that.
"""
import ctypes
import glob
import json
import mmap
import os
import shutil
import struct
import tempfile
import unittest

import pyverbs.enums as e
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD

import case
from installed import ADDRESS, KERNEL, TESTER, TIMEOUT, daemon_pid, leases, output, run
from client import PAGE, Connection, is_readable, truncate_in_child

# Linux 6.1's RDMA pins for writing whatever is asked, its io_uring takes no other files than of tmpfs and
# hugetlbfs, and writing into the page cache is not refused yet.
TABLES = {
    (6, 1): '''
        -               rdma            io_uring            af_xdp          vfio            rdma-odp
        -               read    write   read    write       read    write   read    write   read    write
        ext4            EFAULT  ok      EFAULT  EOPNOTSUPP  EFAULT  ok      ok      ok      EINVAL  EINVAL
        xfs             EFAULT  ok      EFAULT  EOPNOTSUPP  EFAULT  ok      ok      ok      EINVAL  EINVAL
        tmpfs           EFAULT  ok      EFAULT  ok          EFAULT  ok      ok      ok      EINVAL  EINVAL
        hugetlbfs       EFAULT  ok      EFAULT  ok          EFAULT  ok      ok      ok      EINVAL  EINVAL
        device_dax      EFAULT  ok      EFAULT  EOPNOTSUPP  EFAULT  ok      ok      ok      EINVAL  EINVAL
        ext4_dax        NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  EINVAL  EINVAL
        xfs_dax         NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  EINVAL  EINVAL
    ''',
    (6, 12): '''
        -               rdma            io_uring            af_xdp          vfio            rdma-odp
        -               read    write   read    write       read    write   read    write   read    write
        ext4            ok      EFAULT  EFAULT  EFAULT      EFAULT  EFAULT  ok      EFAULT  NOTSUP  NOTSUP
        xfs             ok      EFAULT  EFAULT  EFAULT      EFAULT  EFAULT  ok      EFAULT  NOTSUP  NOTSUP
        tmpfs           ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      NOTSUP  NOTSUP
        hugetlbfs       ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      NOTSUP  NOTSUP
        device_dax      ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      NOTSUP  NOTSUP
        ext4_dax        NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  NOTSUP  NOTSUP
        xfs_dax         NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  NOTSUP  NOTSUP
    ''',
    (7, 2): '''
        -               rdma            io_uring            af_xdp          vfio            rdma-odp
        -               read    write   read    write       read    write   read    write   read    write
        ext4            ok      EFAULT  EFAULT  EFAULT      EFAULT  EFAULT  ok      EFAULT  ok      ok
        xfs             ok      EFAULT  EFAULT  EFAULT      EFAULT  EFAULT  ok      EFAULT  ok      ok
        tmpfs           ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      ok      ok
        hugetlbfs       ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      ok      ok
        device_dax      ok      ok      EFAULT  ok          EFAULT  ok      ok      ok      ok      ok
        ext4_dax        NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  ok      ok
        xfs_dax         NOTSUP  NOTSUP  NOTSUP  NOTSUP      NOTSUP  NOTSUP  NOTSUP  NOTSUP  ok      ok
    ''',
}
DIRECTORIES = {'ext4': '/var/tmp', 'xfs': '/mnt/xfs', 'tmpfs': '/dev/shm', 'hugetlbfs': '/dev/hugepages',
               'ext4_dax': '/mnt/dax-ext4', 'xfs_dax': '/mnt/dax'}
BACKINGS = {'ext4': 'page cache', 'xfs': 'page cache', 'tmpfs': 'tmpfs', 'hugetlbfs': 'hugetlbfs',
            'device_dax': 'device-dax', 'ext4_dax': 'fsdax', 'xfs_dax': 'fsdax'}
PIN_FILE = '/build/tests/pin-file'
SIZE = 2 << 20
PB = 'org.pinbroker.'


def expected(kind):
    """By mechanism and access; from the newest table that is not newer than this kernel."""
    lines = TABLES[max(release for release in TABLES if release <= KERNEL)].split('\n')[1:-1]
    mechanisms, accesses, *rows = (line.split()[1:] for line in lines if line.strip())
    row = next(line.split()[1:] for line in lines if line.split()[0] == kind)
    assert all(len(r) == len(accesses) for r in rows)
    return {(mechanisms[i // 2], accesses[i]): result.replace('NOTSUP', 'EOPNOTSUPP')
            if result == 'NOTSUP' else result for i, result in enumerate(row)}


def preflight(path, **options):
    """What it says of each, and which of them it has tried."""
    told = json.loads(run('pinbrokerctl', '--json=short', 'preflight', path, **options).stdout)
    words = {True: 'ok', None: 'unknown'}
    pins = {(p['mechanism'], p['access']): words.get(p['possible'], p['error']) for p in told['pins']}
    tried = {p['mechanism'] for p in told['pins'] if p['tried']}
    assert all(p['here'] for p in told['pins']), told['pins']
    return told['backing'], pins, tried


class Files(unittest.TestCase):
    def make_file(self, kind):
        if kind == 'device_dax':
            return glob.glob('/dev/dax*')[0]
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir=DIRECTORIES[kind])
        self.addCleanup(shutil.rmtree, directory)
        os.chmod(directory, 0o755)
        path = os.path.join(directory, 'data')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
        return path


class Matrix(Files):
    def expect_row(self, kind):
        path, cells = self.make_file(kind), expected(kind)
        found = {cell: output(PIN_FILE, *cell, path).strip() for cell in cells}
        self.assertEqual(found, cells)
        backing, told, tried = preflight(path)
        self.assertEqual(told, cells)
        self.assertEqual(backing, BACKINGS[kind])
        self.assertEqual(tried, {'rdma', 'rdma-odp', 'io_uring', 'af_xdp'})
        # An ordinary user can try less. What follows from what he can may be unknown, but not wrong.
        _, told, tried = preflight(path, user=TESTER, group=TESTER, extra_groups=[])
        self.assertNotIn('af_xdp', tried)
        unknown = {cell for cell in told if told[cell] == 'unknown'}
        self.assertEqual(told, cells | {cell: 'unknown' for cell in unknown})
        self.assertLessEqual(unknown, {('io_uring', 'write')} if kind == 'device_dax' else set())

    def test_ext4(self):
        self.expect_row('ext4')

    def test_xfs(self):
        self.expect_row('xfs')

    def test_tmpfs(self):
        self.expect_row('tmpfs')

    def test_hugetlbfs(self):
        self.expect_row('hugetlbfs')

    def test_device_dax(self):
        self.expect_row('device_dax')

    def test_ext4_dax(self):
        self.expect_row('ext4_dax')

    def test_xfs_dax(self):
        self.expect_row('xfs_dax')


class Readers(Files):
    """A region that is only read from, over a file of ext4 that is open for reading."""

    def pin(self, path):
        self.connection, self.watch = Connection(ADDRESS), Connection(ADDRESS)
        self.addCleanup(self.connection.close)
        self.addCleanup(self.watch.close)
        self.watch.socket.settimeout(TIMEOUT)
        hello = self.connection.call(PB + 'Hello', {'name': 'reader'})
        self.watch.send(PB + 'Watch', {'client': hello['client'], 'token': hello['token']}, more=True)
        fd = os.open(path, os.O_PATH)
        file = self.connection.call(PB + 'OpenFile', {'fileDescriptor': 0, 'access': 'read'}, [fd])['file']
        os.close(fd)
        fd = self.connection.fds[0]
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        start = libc.mmap(None, ctypes.c_size_t(SIZE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        os.close(fd)
        self.addCleanup(libc.munmap, ctypes.c_void_p(start), ctypes.c_size_t(SIZE))
        device = Context(name='rxe0')
        context = self.connection.call(PB + 'AddContext', {'fileDescriptor': 0}, [device.cmd_fd])['context']
        pins = self.connection.call(PB + 'Pin', {'file': file, 'context': context, 'access': 'read',
                                                 'ranges': [{'offset': 0, 'length': SIZE}]})['pins']
        region = MR(PD(device), SIZE, e.IBV_ACCESS_REMOTE_READ, address=start)
        self.connection.call(PB + 'Bind', {'pin': pins[0], 'handle': region.handle})
        return pins, region

    @unittest.skipIf(expected('ext4')['rdma', 'read'] != 'ok',
                     'this kernel pins for writing, which a read-only mapping refuses')
    def test_readers(self):
        """... come and go, and are not noticed; a writer waits."""
        path = self.make_file('ext4')
        pins, region = self.pin(path)
        held = [('ACTIVE', 'READ', daemon_pid())]
        for _ in range(20):
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 'rb') as f:
                self.assertEqual(f.read(PAGE), bytes(PAGE))
                self.assertEqual(leases(path), held)
        output('cat', path)
        self.assertEqual(leases(path), held)
        pid, result = truncate_in_child(path, PAGE)
        self.addCleanup(os.close, result)
        self.addCleanup(os.waitpid, pid, 0)
        # the first notice that there is
        notice = self.watch.reply(PB + 'Watch')[0]['notice']
        self.assertEqual((notice['conflict']['cause'], notice['pins']), ('modify', pins))
        self.assertEqual([r['path'] for r in self.connection.list(PB + 'ListRevocations')].count(path), 1)
        self.assertFalse(is_readable(result, 0))
        self.connection.call(PB + 'Unpin', {'pins': pins})
        region.close()
        self.assertTrue(is_readable(result, TIMEOUT), 'the truncate does not return')
        self.assertEqual(struct.unpack('idq', os.read(result, 64))[0], 0)
        self.assertEqual(os.stat(path).st_size, PAGE)


if __name__ == '__main__':
    case.main()
