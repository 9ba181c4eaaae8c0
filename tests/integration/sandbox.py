#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon in the sandbox of its unit, as far as that can be had without systemd: its capabilities, its
system calls, a file system that it can write nothing to and that lacks the clients' files.
"""

import contextlib
import ctypes
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest

from bypass import punch
from client import PAGE, Connection, Refused, Ring, is_readable
from sdbus import Bus
from world import (Case, DAEMON, NOBODY, READY, Holder, as_nobody, end_child, fork_nobody,
                   open_file)

ROOT, MANAGER = '/org/pinbroker1', 'org.pinbroker1.Manager'
UNIT = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                    '../../systemd/pinbrokerd.service.in')

# Starts what follows with a view of its own: nothing can be written but in the directory given first, and
# its home is hidden. Then the capabilities, then the system calls.
NAMESPACE = ['unshare', '--mount', 'sh', '-c', '''
mount --bind "$1" "$1" &&
for m in / /dev/shm; do mountpoint -q $m && { mount -o remount,bind,ro $m || exit; }; done
mount -t tmpfs -o ro none "$1/home" && shift && exec "$@"''', 'sh']
FILTER = '''
import ctypes, os, sys
names = sys.argv[1].split()
lib = ctypes.CDLL('libseccomp.so.2')
lib.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(0x80000000)))  # kills the process
for name in names:
    number = lib.seccomp_syscall_resolve_name(name.encode())
    if number >= 0 and lib.seccomp_rule_add(context, 0x7fff0000, number, 0) < 0:
        sys.exit('cannot allow ' + name)
if lib.seccomp_load(context) < 0:
    sys.exit('cannot load the filter')
os.execv(sys.argv[2], sys.argv[2:])
'''


def setting(name):
    with open(UNIT, encoding='utf-8') as f:
        return re.findall(rf'(?m)^{name}=(.*)$', f.read())


def expand(group):
    """The system calls of a group, as systemd has them."""
    names = set()
    out = subprocess.run(['systemd-analyze', '--no-pager', 'syscall-filter', group], check=True,
                         capture_output=True, encoding='utf-8').stdout
    for name in re.findall(r'(?m)^    ([@\w]+)$', out):
        names |= expand(name) if name.startswith('@') else {name}
    return names


def system_calls():
    """Those that the unit allows."""
    names = expand('@default')
    for line in setting('SystemCallFilter'):
        deny, listed = line.startswith('~'), set()
        for word in line.lstrip('~').split():
            listed |= expand(word) if word.startswith('@') else {word}
        names = names - listed if deny else names | listed
    return names


class Sandbox(Case):
    def setUp(self):
        super().setUp()
        os.chmod(self.dir, 0o755)
        os.mkdir(os.path.join(self.dir, 'home'))
        self.file = self.make_own('data')
        self.write(self.config, '[Revocation]\nRevokeGraceSec=500ms\n')

    def make_own(self, name):
        """A file of nobody's, where the daemon does not see it."""
        path = self.make_file('home/' + name)
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o600)
        return path

    def wrapper(self):
        """What starts the daemon as its unit would."""
        argv = []
        namespace = NAMESPACE + [self.dir]
        if subprocess.run(namespace + ['true'], stderr=subprocess.DEVNULL,
                          check=False).returncode == 0:
            argv += namespace
        else:
            print('not allowed to mount: the daemon sees all files')
        bounds = [c.replace('CAP_', '+').lower() for c in setting('CapabilityBoundingSet')[0].split()]
        argv += ['setpriv', '--no-new-privs', '--bounding-set=' + ','.join(['-all'] + bounds)]
        # the sanitizers have calls of their own
        if not os.environ.get('PINBROKER_SANITIZED'):
            argv += [sys.executable, '-ISc', FILTER, ' '.join(system_calls())]
        return argv

    def start_confined(self):
        self.start_bus()
        self.manager = self.make_manager()
        daemon = self.spawn(self.wrapper() + [DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': self.manager.address})
        self.manager.wait_for(READY)
        daemon.wait_for_log('On the bus as')
        return daemon

    def signal_holder(self):
        """One who does not let go: he is told who it is, and is sent a signal."""
        def client():
            holder = Holder(self.path, self.file)
            os.write(end, b'x')
            holder.notice()
            os.write(end, json.dumps(holder.notice()['conflict']).encode())
            signal.pause()

        ready, end = os.pipe()
        holder, answer = fork_nobody(client)
        self.addCleanup(end_child, holder)
        os.close(end)
        with answer, os.fdopen(ready, 'rb', buffering=0) as ready:
            self.assertEqual(ready.read(1), b'x', answer.read() if is_readable(answer, 0) else '')
            breaker, result = self.truncate()
            conflict = json.loads(ready.read(4096))
            self.assertEqual((conflict['cause'], conflict.get('pid'), conflict.get('uid')),
                             ('truncate', breaker, 0))
            self.truncated(result)
            # its end of the pipe is closed by its end
            self.assertTrue(is_readable(ready, 20), 'the holder was sent nothing')
            self.assertEqual(os.waitpid(holder, 0)[1] & 0x7f, signal.SIGBUS)

    def detach_holder(self):
        """Another has the buffers of his io_uring taken away."""
        path = self.make_own('ring')

        def client():
            with contextlib.closing(Holder(self.path, path)) as holder:
                return detached(holder)

        def detached(holder):
            ring, memory = Ring(), mmap.mmap(holder.fd, 16 * PAGE)
            view = ctypes.c_char.from_buffer(memory)
            context = holder.connection.call('org.pinbroker.AddContext',
                                             {'remoteDescriptor': ring.fd})
            pin = holder.connection.call('org.pinbroker.Pin', {
                'file': holder.file, 'context': context['context'], 'access': 'write',
                'ranges': [{'offset': 0, 'length': 16 * PAGE}]})['pins'][0]
            ring.register(ctypes.addressof(view), 16 * PAGE)
            holder.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
            holder.release()
            os.write(end, b'x')
            holder.notice()
            os.read(over, 1)
            return context['forcible'], holder.connection.call('org.pinbroker.Unpin',
                                                               {'pins': [pin]})['ended'] == [pin]

        ready, end = os.pipe()
        over, tell = os.pipe()
        holder, answer = fork_nobody(client)
        self.addCleanup(end_child, holder)
        for fd in (ready, end, over, tell):
            self.addCleanup(os.close, fd)
        with answer:
            self.assertTrue(is_readable(ready, 20), 'it does not hold')
            os.read(ready, 1)
            _, result = self.truncate(path)
            self.truncated(result)
            os.write(tell, b'x')
            self.assertEqual(json.loads(answer.read()), {'result': [True, True]})
        os.waitpid(holder, 0)

    def administer(self):
        """On the bus, whose polkit is not there."""
        holder = self.hold(file=self.make_file('home/administered'))
        bus = Bus(self.address)
        revocation = bus.call(ROOT, MANAGER, 'RevokeFile', 'tst', holder.file, 'umount', 10 ** 7)[0]
        notice = holder.notice()
        self.assertEqual((notice['revocation'], notice['conflict']['reason']),
                         (revocation, 'umount'))
        holder.release()
        last = bus.call(ROOT, MANAGER, 'ListRevocations', 'a{sv}tu', 0, 0, 0)[0][-1]
        self.assertEqual((last['revocation'], last['state']), (revocation, 'released'))
        bus.close()

    def punch_hole(self):
        """No lease sees it: the daemon looks whether the pinned pages are in the file still."""
        path = self.make_own('punched')

        def client():
            signal.signal(signal.SIGBUS, signal.SIG_IGN)  # it is revoked by force
            with contextlib.closing(Holder(self.path, path)) as holder:
                punch(holder.fd, 0, PAGE)
                seen = is_readable(holder.watch.socket, 10)
                return holder.notice()['conflict']['cause'] if seen else None

        self.assertEqual(as_nobody(client), 'shrink')

    @unittest.skipUnless(shutil.which('systemd-analyze') and shutil.which('nm') and
                         not os.environ.get('PINBROKER_SANITIZED'), 'needs systemd and binutils')
    def test_calls(self):
        """Whatever the program calls that is a system call, its unit allows."""
        imports = subprocess.run(['nm', '--dynamic', '--undefined-only', DAEMON], check=True,
                                 capture_output=True, encoding='utf-8').stdout
        called = {re.sub('64$', '', name) for name in re.findall(r'(?m) U (\w+)', imports)}
        # the C library makes other calls of these
        called -= {'readdir', 'setrlimit', 'syscall'}
        self.assertIn('fcntl', called)
        self.assertEqual(called & expand('@known') - system_calls(), set())

    @unittest.skipUnless(os.getuid() == 0 and shutil.which('setpriv') and shutil.which('unshare') and
                         shutil.which('systemd-analyze'), 'needs root, util-linux and systemd')
    def test_sandbox(self):
        daemon = self.start_confined()
        self.signal_holder()
        self.detach_holder()
        self.punch_hole()
        self.administer()
        # it opens with the client's credentials
        foreign = self.make_file('home/foreign')
        os.chmod(foreign, 0o600)

        def refused():
            with contextlib.closing(Connection(self.path)) as connection:
                connection.call('org.pinbroker.Hello')
                try:
                    open_file(connection, foreign)
                except Refused as e:
                    return e.error
            return None

        self.assertEqual(as_nobody(refused), 'org.pinbroker.NotAllowed')
        self.expect_end(daemon)
        self.assertFalse(os.path.exists(self.path))
        self.assertNotIn('Cannot', daemon.text())


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
