#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the pages of files live on, as told everywhere, held to what ndctl and daxctl say; device-DAX as a data
file, whose namespace can be disabled once an administrator has had its pins revoked; files on fsdax.
"""
import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import unittest

from pyverbs.device import Context
from pyverbs.enums import IBV_ACCESS_LOCAL_WRITE
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsRDMAError

import case
from installed import (ADDRESS, NAME, ROOT, SERVICE, TIMEOUT, Holder, call, daemon_pid, output,
                       properties)
from client import PAGE, Connection, Refused, expect_pinned, pinned_pages
from world import as_nobody

PB = 'org.pinbroker.'
DROP_IN = '/etc/pinbroker/pinbroker.conf.d/test.conf'
GRACE = 3  # seconds
LENGTH = 2 << 20  # what a mapping of device-DAX is cut by


def setUpModule():
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Revocation]\nRevokeGraceSec={GRACE}s\n')
    output('systemctl', 'restart', SERVICE)


def tearDownModule():
    os.unlink(DROP_IN)
    output('systemctl', 'restart', SERVICE)


def nvdimm(device):
    """What the broker is to tell of a device, as ndctl tells it."""
    listed = json.loads(output('ndctl', 'list', '--regions', '--namespaces', '--device-dax', '-v'))
    for region in listed['regions']:
        for namespace in region['namespaces']:
            devices = [d['chardev'] for d in namespace.get('daxregion', {}).get('devices', [])]
            if device not in [namespace.get('blockdev'), *devices]:
                continue
            told = {'kind': 'deviceDax' if devices else 'fsdax', 'deviceName': device,
                    'namespace': namespace['dev'], 'region': region['dev']}
            if 'numa_node' in namespace:
                told['numaNode'] = namespace['numa_node']
            return told
    raise AssertionError(f'ndctl does not know {device}')


def mapped(fd, length):
    memory = mmap.mmap(fd, length)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def open_by(pid):
    """The paths of its descriptors."""
    for fd in os.listdir(f'/proc/{pid}/fd'):
        with contextlib.suppress(OSError):
            yield os.readlink(f'/proc/{pid}/fd/{fd}')


class Client:
    """One that pins what it is told to as a memory region."""

    def __init__(self):
        self.connection = Connection(ADDRESS)
        self.connection.socket.settimeout(TIMEOUT)
        hello = self.call('Hello', {'name': 'test'})
        self.token = {'client': hello['client'], 'token': hello['token']}
        self.watch = Connection(ADDRESS)
        self.watch.socket.settimeout(TIMEOUT)
        self.watch.send(PB + 'Watch', self.token, more=True)
        self.device = Context(name='rxe0')
        self.domain = PD(self.device)
        self.context = self.call('AddContext', {'fileDescriptor': 0}, [self.device.cmd_fd])['context']
        self.fd = self.memory = self.region = None
        self.file = 0
        self.pins = []

    def call(self, method, parameters=None, fds=()):
        return self.connection.call(PB + method, parameters, fds)

    def open(self, path, access='write'):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            opened = self.call('OpenFile', {'fileDescriptor': 0, 'access': access}, [fd])
        finally:
            os.close(fd)
        self.fd, self.file = self.connection.fds[0], opened['file']
        return opened['info']

    def preflight(self, path, access='write'):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return self.call('Preflight', {'fileDescriptor': 0, 'access': access}, [fd])
        finally:
            os.close(fd)

    def pin(self, file, length=LENGTH, offset=0, access='write'):
        self.pins = self.call('Pin', {'file': file, 'context': self.context, 'access': access,
                                      'ranges': [{'offset': offset, 'length': length}]})['pins']
        return self.pins

    def register(self, length=LENGTH):
        self.memory, address = mapped(self.fd, length)
        self.region = MR(self.domain, length, IBV_ACCESS_LOCAL_WRITE, address=address)
        self.call('Bind', {'pin': self.pins[0], 'handle': self.region.handle})

    def release(self):
        ended = self.call('Unpin', {'pins': self.pins})['ended']
        if self.region and not ended:
            self.region.close()
        self.pins, self.region, self.memory = [], None, None

    def resume(self):
        """On a new connection."""
        self.connection.close()
        self.connection = Connection(ADDRESS)
        self.connection.socket.settimeout(TIMEOUT)
        self.call('Resume', self.token)

    def notice(self):
        return self.watch.reply(PB + 'Watch')[0]['notice']

    def info(self, file):
        return next((f for f in self.connection.list(PB + 'ListFiles') if f['file'] == file), None)

    def close(self):
        """With nothing left of it by the time that it returns."""
        self.release()
        with contextlib.suppress(Refused):
            self.call('CloseFile', {'file': self.file})
        for socket in (self.connection, self.watch):
            socket.close()
        if self.fd is not None:
            os.close(self.fd)


class Case(unittest.TestCase):
    def client(self):
        client = Client()
        self.addCleanup(client.close)
        return client

    def make_file(self, directory, size=16 * PAGE):
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir=directory)
        self.addCleanup(shutil.rmtree, directory)
        path = os.path.join(directory, 'data')
        with open(path, 'wb') as f:
            f.truncate(size)
        return path

    def refused(self, error, cause, function, *args, **kwargs):
        with self.assertRaises(Refused) as e:
            function(*args, **kwargs)
        self.assertEqual((e.exception.error, e.exception.parameters.get('cause')), (PB + error, cause))
        return e.exception.parameters

    def expect_told(self, info, backing):
        """On every face the same."""
        self.assertEqual(info['backing'], backing)
        fields = ('kind', 'deviceName', 'namespace', 'region', 'numaNode')
        told = [backing.get(field) for field in fields]
        for verb in (['list', 'files'], ['show', info['file']]):
            listed = json.loads(output('pinbrokerctl', '--json=short', *verb))
            row = next(f for f in listed if f['file'] == info['file'])
            self.assertEqual([row[field] for field in fields], told)
        named = properties(f'{ROOT}/file/{info["file"]}', NAME + '.File')
        self.assertEqual([named['Kind'], named['DeviceName'], named['Namespace'], named['Region'],
                          named['NumaNode']],
                         [told[0], *(name or '' for name in told[1:4]),
                          2 ** 64 - 1 if told[4] is None else told[4]])
        listed = call('ListFiles', 'a{sv}tu', '1', 'file', 't', str(info['file']), '0', '0')[0][0]
        self.assertEqual({field: listed[field]['data'] for field in fields if field in listed}, backing)

    def expect_flight(self, client, path, backing, pinnable):
        """read and write"""
        for access, answer in zip(('read', 'write'), pinnable):
            flight = client.preflight(path, access)
            self.assertEqual((flight['backing'], flight['pinnable'], 'pinReason' in flight,
                              flight['leasable'], flight['dax']),
                             (backing, answer, answer != 'yes', True, backing['kind'] == 'fsdax'))
        told = json.loads(output('pinbrokerctl', '--json=short', 'preflight', path))
        for field in ('deviceName', 'namespace', 'region', 'numaNode'):
            self.assertEqual(told[field], backing.get(field))


class Files(Case):
    def expect_fsdax(self, directory):
        with open('/proc/mounts', encoding='ascii') as f:
            device, = [line.split()[0] for line in f if line.split()[1] == directory]
        backing = nvdimm(os.path.basename(device))
        path = self.make_file(directory)
        client = self.client()
        self.expect_flight(client, path, backing, ('no', 'no'))
        info = client.open(path)
        self.expect_told(info, backing)
        said = self.refused('NotSupported', 'fsdax', client.pin, info['file'], PAGE)
        self.assertIn('on-demand paging', said['message'])
        # the kernel says so, too
        memory, address = mapped(client.fd, PAGE)
        with self.assertRaises(PyverbsRDMAError) as e:
            MR(client.domain, PAGE, IBV_ACCESS_LOCAL_WRITE, address=address)
        self.assertEqual(e.exception.error_code, errno.EOPNOTSUPP)
        memory.close()
        self.assertEqual(client.info(info['file'])['pins'], 0)

    def test_fsdax_on_xfs(self):
        self.expect_fsdax('/mnt/dax')

    def test_fsdax_on_ext4(self):
        self.expect_fsdax('/mnt/dax-ext4')

    def test_page_cache_on_a_loop_device(self):
        path = self.make_file('/mnt/xfs')
        self.assertEqual(os.major(os.stat(path).st_dev), 7)
        client = self.client()
        backing = {'kind': 'pageCache', 'deviceName': f'loop{os.minor(os.stat(path).st_dev)}'}
        self.expect_flight(client, path, backing, ('yes', 'unknown'))
        self.expect_told(client.open(path), backing)

    def test_partition(self):
        """... of a loop device."""
        path = self.make_file('/var/tmp', 64 << 20)
        with open(path, 'r+b') as f:  # all of it but the first megabyte
            f.seek(446)
            f.write(bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, 'little') +
                    ((63 << 20) // 512).to_bytes(4, 'little'))
            f.seek(510)
            f.write(b'\x55\xaa')
        loop = output('losetup', '--find', '--show', '--partscan', path).strip()
        self.addCleanup(output, 'losetup', '--detach', loop)
        output('udevadm', 'wait', f'--timeout={TIMEOUT}', loop + 'p1')
        output('mkfs.ext4', '-q', loop + 'p1')
        directory = tempfile.mkdtemp(dir='/run')
        self.addCleanup(os.rmdir, directory)
        output('mount', loop + 'p1', directory)
        self.addCleanup(output, 'umount', '--lazy', directory)
        info = self.client().open(self.make_file(directory))
        self.expect_told(info, {'kind': 'pageCache', 'deviceName': os.path.basename(loop) + 'p1'})

    def test_memory(self):
        for directory, kind in (('/dev/shm', 'tmpfs'), ('/dev/hugepages', 'hugetlbfs')):
            client = self.client()
            path = self.make_file(directory, LENGTH)
            self.assertEqual(client.preflight(path)['backing'], {'kind': kind})
            self.assertEqual(client.preflight(path)['pinnable'], 'yes')
        self.expect_told(self.client().open(self.make_file('/dev/shm')), {'kind': 'tmpfs'})

    def test_revoked_by_device(self):
        """A file that nobody has pinned is closed; others are left alone."""
        backing = nvdimm('pmem0')
        for name in (backing['deviceName'], backing['namespace'], backing['region']):
            client, other = self.client(), self.client()
            file = client.open(self.make_file('/mnt/dax'))['file']
            kept = other.open(self.make_file('/dev/shm'))['file']
            output('pinbrokerctl', 'revoke', '--device', name)
            self.assertIsNone(client.info(file))
            self.assertIsNotNone(other.info(kept))
            self.assertEqual([fd for fd in open_by(daemon_pid()) if fd.startswith('/mnt/dax/')], [])


class Device(Case):
    def setUp(self):
        device, = json.loads(output('daxctl', 'list'))
        self.size = device['size']
        self.path = '/dev/' + device['chardev']
        self.backing = nvdimm(device['chardev'])

    def disable(self):
        """As an administrator would, and back."""
        self.assertEqual([fd for fd in open_by(daemon_pid()) if fd.startswith('/dev/dax')], [])
        output('ndctl', 'disable-namespace', self.backing['namespace'])
        self.assertFalse(os.path.exists(self.path))
        output('ndctl', 'enable-namespace', self.backing['namespace'])
        output('udevadm', 'wait', f'--timeout={TIMEOUT}', self.path)

    def test_told(self):
        client = self.client()
        self.expect_flight(client, self.path, self.backing, ('yes', 'yes'))
        info = client.open(self.path)
        self.expect_told(info, self.backing)
        self.assertEqual((info['size'], info['lease'], info['exposed'], info['path'], info['inode']),
                         (self.size, 'none', False, self.path, os.stat(self.path).st_ino))

    def test_pinned(self):
        """It needs no lease, and is not exposed without one."""
        base = pinned_pages()
        client = self.client()
        file = client.open(self.path)['file']
        client.pin(file)
        client.register()
        expect_pinned(pinned_pages(), base, LENGTH // PAGE)
        second = self.client()
        second.open(self.path)
        second.pin(file)  # looks at the file, which has a pin now
        info = client.info(file)
        self.assertEqual((info['pins'], info['lease'], info['exposed']), (2, 'none', False))
        self.assertEqual(json.loads(output('pinbrokerctl', '--json=short', 'status'))['exposed'], [])
        self.assertIn(f'file {file}, ', output('pinbrokerctl', 'map', self.path))
        said = self.refused('BeyondEndOfFile', None, client.pin, file, LENGTH, self.size)
        self.assertEqual(said['size'], self.size)
        client.release()
        client.call('CloseFile', {'file': file})

    def test_restart(self):
        """What was told of it, it is told after the daemon has been killed."""
        client = self.client()
        file = client.open(self.path)['file']
        client.pin(file)
        client.register()
        told = client.info(file)
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        client.resume()
        self.assertEqual(client.info(file), told)
        client.pin(file, PAGE, LENGTH)
        self.assertEqual(client.info(file)['exposed'], False)
        client.call('Unpin', {'pins': [p['pin'] for p in client.connection.list(PB + 'ListPins')]})
        client.region.close()
        client.pins, client.region = [], None

    def test_several(self):
        """Readers and writers, in any order: there is no lease that they would share."""
        first, second, third = self.client(), self.client(), self.client()
        file = first.open(self.path, 'read')['file']
        self.assertEqual(second.open(self.path, 'write')['file'], file)
        self.assertEqual(third.open(self.path, 'read')['file'], file)
        second.pin(file)
        second.register()
        third.pin(file, access='read')
        self.refused('NotAllowed', 'readOnly', first.pin, file)
        self.assertEqual(first.info(file)['clients'], 3)
        self.assertEqual(os.get_blocking(second.fd), True)

    def test_rights(self):
        """Whoever may not open it is not let in by the broker."""
        path = self.path

        def attempt(access):
            connection = Connection(ADDRESS)
            connection.call(PB + 'Hello', {})
            fd = os.open(path, os.O_PATH)
            try:
                connection.call(PB + 'OpenFile', {'fileDescriptor': 0, 'access': access}, [fd])
            except Refused as e:
                return [e.error, e.parameters['cause']]
            return 'opened'
        self.addCleanup(os.chmod, path, stat.S_IMODE(os.stat(path).st_mode))
        os.chmod(path, 0o600)
        self.assertEqual(as_nobody(lambda: attempt('read')), [PB + 'NotAllowed', 'access'])
        os.chmod(path, 0o604)
        self.assertEqual(as_nobody(lambda: attempt('write')), [PB + 'NotAllowed', 'access'])
        self.assertEqual(as_nobody(lambda: attempt('read')), 'opened')

    def test_other_nodes(self):
        """A node on tmpfs is as good; one that the mount does not let be opened is not; other devices are none."""
        directory = tempfile.mkdtemp(dir='/run')
        self.addCleanup(os.rmdir, directory)
        output('mount', '-t', 'tmpfs', 'tmpfs', directory)
        self.addCleanup(output, 'umount', '--lazy', directory)
        node = os.path.join(directory, 'memory')
        os.mknod(node, stat.S_IFCHR | 0o600, os.stat(self.path).st_rdev)
        client = self.client()
        info = client.open(node)
        self.assertEqual((info['backing'], info['path']), (self.backing, node))
        output('mount', '-o', 'remount,nodev', directory)
        self.refused('NotAllowed', 'access', self.client().open, node)
        for path in ('/dev/null', '/dev/ttyS0', '/dev/pmem0'):
            said = self.refused('NotLeasable', 'blockDevice' if 'pmem' in path else 'characterDevice',
                                client.open, path)
            self.assertNotIn('backing', client.preflight(path), said)

    def test_disabled(self):
        """The holder lets go, keeps its descriptor, and is told when it comes again."""
        client = self.client()
        file = client.open(self.path)['file']
        pins = client.pin(file)
        client.register()
        revoke = subprocess.Popen(['pinbrokerctl', 'revoke', '--device', self.backing['namespace'],
                                   '--reason', 'maintenance'])
        self.addCleanup(revoke.kill)
        notice = client.notice()
        self.assertEqual((notice['pins'], notice['conflict']['cause'], notice['conflict']['reason']),
                         (pins, 'device', 'maintenance'))
        client.release()
        self.assertEqual(revoke.wait(TIMEOUT), 0)
        self.assertIsNone(client.info(file))
        self.disable()
        with self.assertRaises(Refused) as e:
            client.pin(file)
        self.assertEqual(e.exception.error, PB + 'Revoked')
        client.call('CloseFile', {'file': file})
        client = self.client()
        info = client.open(self.path)
        self.assertEqual(info['backing'], self.backing)
        client.pin(info['file'])
        client.register()

    def test_disabled_by_force(self):
        """A holder that does not let go has its region taken away, and keeps a mapping of nothing."""
        base = pinned_pages()
        client = self.client()
        client.pin(client.open(self.path)['file'])
        client.register()
        output('pinbrokerctl', 'revoke', '--device', self.backing['deviceName'], '--timeout', '1')
        revocation = client.connection.list(PB + 'ListRevocations')[-1]
        self.assertEqual((revocation['state'], revocation['proof']), ('released', 'provable'))
        expect_pinned(pinned_pages(), base, 0)
        self.disable()

    def test_disabled_after_a_death(self):
        """... of a holder, a child of whom keeps the region."""
        base = pinned_pages()
        said, end = os.pipe()
        holder = os.fork()
        if holder == 0:
            client = Client()
            client.pin(client.open(self.path)['file'])
            client.register()
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(end, b'%d\n' % child)
            signal.pause()
        os.close(end)
        with os.fdopen(said, encoding='ascii') as said:
            child = int(said.readline())
        self.addCleanup(os.kill, child, signal.SIGKILL)
        expect_pinned(pinned_pages(), base, LENGTH // PAGE)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        output('pinbrokerctl', 'revoke', '--device', self.backing['region'])
        expect_pinned(pinned_pages(), base, 0)
        self.disable()

    def test_hold(self):
        """As an administrator tries it out, by an io_uring."""
        holder = Holder(self.path, '--on-revoke', 'ignore', '--range', f'0:{LENGTH}')
        self.addCleanup(holder.close)
        output('pinbrokerctl', 'revoke', '--device', self.backing['namespace'])
        self.disable()

    def test_revoked_by_path_or_file(self):
        """An administrator's word is enough: the lease is for what cannot be known otherwise."""
        for method in ('RevokePath', 'RevokeFile'):
            client = self.client()
            file = client.open(self.path)['file']
            pins = client.pin(file)
            client.register()
            call(method, *(('sst', self.path) if method == 'RevokePath' else ('tst', str(file))), '', '0')
            self.assertEqual(client.notice()['pins'], pins)
            client.release()
            client.call('CloseFile', {'file': file})


if __name__ == '__main__':
    case.main()
