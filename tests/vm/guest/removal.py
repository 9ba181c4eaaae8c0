#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that go away, and file systems that are unmounted: the pins are let go of first, and then the broker
is not what the administrator has to wait for.
"""
import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest

import case
from installed import ADDRESS, KERNEL, SERVICE, TESTER, TIMEOUT, Program, daemon_pid, output, run
from client import Connection

HOLDER, SERVER = '/build/tests/rdma-holder', '/build/client/example-rdma-server'
DEVICE, NETDEV = 'rxe1', 'veth1'
SIZE = 65536
SLOWNESS = 10  # of an emulated machine
SOON = 2 * SLOWNESS  # seconds
GRACE = 3
DROP_IN = '/etc/pinbroker/pinbroker.conf.d/test.conf'
TEMPFAIL = 75
NETLINK_KOBJECT_UEVENT = 15
# Of soft-RoCE: its removal waits for those who have it open; later it takes from them what they have.
REMOVAL_WAITS = KERNEL < (7, 3)


def setUpModule():
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Revocation]\nRevokeGraceSec={GRACE}s\nSignalGraceSec={GRACE}s\n')
    output('systemctl', 'restart', SERVICE)


def tearDownModule():
    os.unlink(DROP_IN)
    output('systemctl', 'restart', SERVICE)


def open_in(pid, name):
    """How often a process has it open."""
    directory, n = f'/proc/{pid}/fd', 0
    for fd in os.listdir(directory):
        try:
            n += os.readlink(os.path.join(directory, fd)).split(' ')[0] == name
        except FileNotFoundError:  # closed just now
            pass
    return n


class Case(unittest.TestCase):
    def hold(self, path, device=DEVICE, register=True):
        holder = Program(self, HOLDER, device, path)
        holder.expect('ready')
        if register:
            holder.tell('register')
        return holder

    def list(self, what):
        connection = Connection(ADDRESS)
        try:
            return connection.list('org.pinbroker.List' + what)
        finally:
            connection.close()

    def expect_closed(self, name):
        """By the daemon, on its pool, for which there is no event."""
        end = time.monotonic() + TIMEOUT
        while open_in(daemon_pid(), name):
            self.assertLess(time.monotonic(), end, name)


class Devices(Case):
    def setUp(self):
        output('rdma', 'link', 'add', DEVICE, 'type', 'rxe', 'netdev', NETDEV)
        self.addCleanup(run, 'rdma', 'link', 'delete', DEVICE)
        self.removal = None
        self.addCleanup(self.end_removal)
        output('udevadm', 'settle')
        self.node = os.path.realpath(f'/dev/infiniband/by-ibdev/uverbs-{DEVICE}')
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, directory)
        self.path = os.path.join(directory, 'data')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)

    def remove(self):
        """See REMOVAL_WAITS."""
        self.removal = subprocess.Popen(['rdma', 'link', 'delete', DEVICE])
        return self.removal

    def end_removal(self):
        """It cannot be killed while it waits; the holders have ended, so that it can be for the daemon only."""
        if self.removal is None:
            return
        try:
            self.removal.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            output('systemctl', 'restart', SERVICE)
            self.removal.wait()
            raise

    def expect_waiting(self, command):
        if REMOVAL_WAITS:
            self.assertIsNone(command.poll(), output('rdma', 'link'))
        else:
            self.assertEqual(command.wait(TIMEOUT), 0)

    def expect_removed(self, command, begin):
        self.assertEqual(command.wait(TIMEOUT), 0)
        took = time.monotonic() - begin
        print(f'{self.id()}: removed {took:.3f} s after the last holder had closed it')
        self.assertLess(took, SOON)
        self.assertNotIn(DEVICE, output('rdma', 'link'))

    def last(self):
        revocation = self.list('Revocations')[-1]
        return tuple(revocation[name] for name in ('state', 'pins', 'proof')) + (
            revocation['conflict']['cause'],)

    def test_by_word(self):
        """`revoke --device`, and then there is nothing in the way."""
        holder = self.hold(self.path)
        self.assertEqual(open_in(daemon_pid(), self.node), 1)
        command = subprocess.Popen(['pinbrokerctl', 'revoke', '--device', DEVICE],
                                   stdout=subprocess.PIPE, encoding='utf-8')
        self.addCleanup(command.stdout.close)
        holder.expect('notice device')
        holder.tell('register', errno.ESTALE)  # nothing more, from now on
        holder.tell('deregister')
        self.assertIn('released', command.communicate(timeout=TIMEOUT)[0])
        self.assertEqual(command.returncode, 0)
        self.assertEqual(self.last(), ('released', 1, 'provable', 'device'))
        holder.tell('register', errno.ESTALE)
        self.expect_closed(self.node)
        holder.tell('drop')
        self.expect_removed(self.remove(), time.monotonic())

    def test_cooperative(self):
        """The removal itself is noticed; the broker lets go before the holder has called it back."""
        holder = self.hold(self.path)
        command = self.remove()
        holder.expect('notice device')
        self.expect_waiting(command)
        holder.tell('deregister')
        self.expect_closed(self.node)
        self.assertEqual(self.last(), ('released', 1, 'provable', 'device'))
        begin = time.monotonic()
        holder.tell('close')
        self.expect_removed(command, begin)

    def test_example(self):
        """It ends when its device goes."""
        server = Program(self, SERVER, DEVICE, '7472', self.path)
        server.expect('holding')
        command = self.remove()
        begin = time.monotonic()
        self.assertEqual(server.process.wait(TIMEOUT), 0)
        self.expect_removed(command, begin)

    def test_idle(self):
        """With nothing pinned the broker's copy is closed without a word."""
        holder = self.hold(self.path)
        holder.tell('deregister')
        self.assertEqual(open_in(daemon_pid(), self.node), 1)
        command = self.remove()
        self.expect_closed(self.node)
        begin = time.monotonic()
        holder.tell('drop')
        self.expect_removed(command, begin)

    def test_ignoring(self):
        """The region is taken from it by force; its own descriptor may be waited for then."""
        holder = self.hold(self.path)
        command = self.remove()
        holder.expect('notice device')
        self.expect_closed(self.node)
        self.assertEqual(self.last(), ('released', 1, 'provable', 'device'))
        self.assertEqual(open_in(holder.pid, self.node), 1)
        self.expect_waiting(command)
        # what it still may call works: the region is gone, the context is the broker's no more
        holder.tell('deregister')
        begin = time.monotonic()
        holder.tell('close')
        self.expect_removed(command, begin)

    def test_killed(self):
        holder = self.hold(self.path)
        command = self.remove()
        holder.expect('notice device')
        begin = time.monotonic()
        holder.end()
        self.expect_removed(command, begin)
        self.assertEqual(self.list('Pins'), [])

    def test_stopped(self):
        """As with one that ignores it."""
        holder = self.hold(self.path)
        os.kill(holder.pid, signal.SIGSTOP)
        command = self.remove()
        self.expect_closed(self.node)
        self.assertEqual(self.last(), ('released', 1, 'provable', 'device'))
        os.kill(holder.pid, signal.SIGCONT)
        holder.tell('deregister')
        begin = time.monotonic()
        holder.tell('close')
        self.expect_removed(command, begin)

    def test_too_late(self):
        """Nobody can hand over a device that is being removed."""
        holder, late = self.hold(self.path), self.hold(self.path, register=False)
        command = self.remove()
        holder.expect('notice device')
        late.tell('register', errno.EOPNOTSUPP)
        holder.tell('deregister')
        self.expect_closed(self.node)
        late.end()
        begin = time.monotonic()
        holder.tell('close')
        self.expect_removed(command, begin)

    def test_forged(self):
        """Only root can send what udev sends."""
        holder = self.hold(self.path)
        pid = os.fork()
        if pid == 0:
            os.setresuid(TESTER, TESTER, TESTER)
            s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
            denied = 0
            for address in ((daemon_pid(), 0), (0, 1), (0, 2)):
                try:
                    s.sendto(b'libudev\0', address)
                except PermissionError:
                    denied += 1
            os._exit(0 if denied == 3 else 1)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        holder.tell('deregister')
        holder.tell('close')

    def test_other_device(self):
        """What is on another one stays."""
        other = self.hold(self.path, 'rxe0')
        self.expect_removed(self.remove(), time.monotonic())
        self.assertEqual(len(self.list('Pins')), 1)
        other.tell('deregister')
        other.tell('close')


class Mounts(Case):
    def setUp(self):
        self.point = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/mnt')
        self.addCleanup(os.rmdir, self.point)
        output('mount', '-t', 'tmpfs', 'tmpfs', self.point)
        self.addCleanup(run, 'umount', '-l', self.point)
        self.path = os.path.join(self.point, 'data')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)

    def revoke(self):
        command = subprocess.Popen(['pinbrokerctl', 'revoke', '--mount', self.point],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
        self.addCleanup(command.stderr.close)
        self.addCleanup(command.stdout.close)
        return command

    def test_mount(self):
        """The holder closes its own, and tells the broker afterwards."""
        holder = self.hold(self.path, 'rxe0')
        command = self.revoke()
        holder.expect('notice admin')
        holder.tell('deregister')
        holder.tell('close-file')
        said, errors = command.communicate(timeout=TIMEOUT)
        self.assertEqual((command.returncode, errors), (0, ''))
        self.assertIn('released', said)
        output('umount', self.point)
        self.assertEqual(self.list('Files'), [])

    def test_mount_kept(self):
        """It lets go, and keeps a descriptor: it is named, and the broker is not."""
        holder = self.hold(self.path, 'rxe0')
        command = self.revoke()
        holder.expect('notice admin')
        holder.tell('deregister')
        said, errors = command.communicate(timeout=TIMEOUT)
        self.assertEqual(command.returncode, TEMPFAIL)
        self.assertIn('released', said)
        self.assertRegex(errors, rf'rdma-holder \(pid {holder.pid}, uid 0\)')
        self.assertNotIn('pinbrokerd', errors)
        self.assertNotEqual(run('umount', self.point).returncode, 0)
        holder.tell('register', errno.ESTALE)
        holder.end()
        output('umount', self.point)

    def test_mount_ignoring(self):
        holder = self.hold(self.path, 'rxe0')
        command = self.revoke()
        _, errors = command.communicate(timeout=TIMEOUT)
        self.assertEqual(command.returncode, TEMPFAIL)
        self.assertIn(f'pid {holder.pid}', errors)
        self.assertEqual(self.list('Files'), [])
        holder.end()
        output('umount', self.point)


if __name__ == '__main__':
    case.main()
