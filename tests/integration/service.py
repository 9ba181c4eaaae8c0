#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon ($PINBROKERD) as a service: what it tells the service manager, sockets that it is passed,
options and configuration, how it ends, without root, and what is installed ($BUILD_ROOT).
"""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest

from client import PAGE, WAIT, Connection, Refused, is_readable, truncate_in_child

DAEMON = os.environ['PINBROKERD']
NOBODY = 65534
SIZE = 16 * PAGE
USAGE, UNAVAILABLE, TEMPFAIL, CONFIG = 64, 69, 75, 78  # sysexits.h
READY = re.compile(rb'^READY=1$', re.M)
WATCHDOG = re.compile(rb'^WATCHDOG=1$', re.M)
STOPPING = re.compile(rb'^STOPPING=1$', re.M)

# Becomes the daemon, with these descriptors as 3, 4, … and LISTEN_PID its own.
PASS_SOCKETS = '''
import fcntl, os, sys
count = int(sys.argv[1])
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100) for fd in sys.argv[2:2 + count]]
for i, fd in enumerate(fds):
    os.dup2(fd, 3 + i)
os.closerange(3 + count, 100)
os.environ.setdefault('LISTEN_PID', str(os.getpid()))
os.environ['LISTEN_FDS'] = str(count)
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
'''


class Daemon:
    """A process of the daemon, or what starts it; its stderr is collected."""

    def __init__(self, argv, env=None, **kwargs):
        env = {key: value for key, value in dict(os.environ, **(env or {})).items()
               if value is not None}
        self.log, self.logged = [], threading.Condition()
        self.ended = False
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, encoding='utf-8',
                                        errors='replace', env=env, **kwargs)
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def read_log(self):
        for line in self.process.stderr:
            with self.logged:
                self.log.append(line)
                self.logged.notify_all()
        with self.logged:
            self.ended = True
            self.logged.notify_all()

    def text(self):
        with self.logged:
            return ''.join(self.log)

    def wait_for_log(self, pattern):
        with self.logged:
            self.logged.wait_for(lambda: self.ended or re.search(pattern, ''.join(self.log)), WAIT)
            if not re.search(pattern, ''.join(self.log)):
                raise AssertionError(f'{pattern!r} was not logged: {"".join(self.log)}')

    def kill(self, sig):
        self.process.send_signal(sig)

    def wait(self):
        """Its exit status, with all that it wrote in the log."""
        status = self.process.wait(WAIT)
        self.reader.join(WAIT)
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.settimeout(WAIT)
        self.socket.bind(address)
        self.address = address
        self.pid = None

    def fill(self):
        """Until no more fits; the number of messages."""
        n = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    s.sendto(b'FILLER=1', self.address)
                    n += 1
        return n

    def receive(self):
        data, control, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
        for level, kind, value in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                self.pid = struct.unpack('iII', value)[0]
        return data

    def wait_for(self, pattern):
        """The first message that has it."""
        while True:
            data = self.receive()
            if pattern.search(data):
                return data

    def close(self):
        self.socket.close()


def open_file(connection, file):
    fd = os.open(file, os.O_PATH | os.O_CLOEXEC)
    try:
        return connection.call('org.pinbroker.OpenFile',
                               {'fileDescriptor': 0, 'access': 'write'}, [fd])
    finally:
        os.close(fd)


class Holder:
    """A client with a pin that it lets go of when told by release() alone."""

    def __init__(self, path, file):
        self.connection, self.watch = Connection(path), Connection(path)
        hello = self.connection.call('org.pinbroker.Hello', {'name': 'holder'})
        self.client = hello['client']
        opened = open_file(self.connection, file)
        self.file, self.fd = opened['file'], self.connection.fds[0]
        self.event = os.eventfd(0, os.EFD_CLOEXEC)
        context = self.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                       [self.event])['context']
        self.pins = self.connection.call('org.pinbroker.Pin', {
            'file': self.file, 'context': context, 'access': 'write',
            'ranges': [{'offset': 0, 'length': SIZE}]})['pins']
        self.connection.call('org.pinbroker.Bind', {'pin': self.pins[0], 'handle': 0})
        self.watch.send('org.pinbroker.Watch', {'client': self.client, 'token': hello['token']},
                        more=True)

    def notice(self):
        return self.watch.reply('org.pinbroker.Watch')[0]['notice']

    def release(self):
        self.connection.call('org.pinbroker.Unpin', {'pins': self.pins})

    def close(self):
        self.connection.close()
        self.watch.close()
        os.close(self.fd)
        os.close(self.event)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, self.dir)
        self.path = os.path.join(self.dir, 'socket')
        self.config = os.path.join(self.dir, 'conf')
        self.address = 'unix:path=' + os.path.join(self.dir, 'bus')
        self.write(self.config, '')
        self.file = self.make_file('data')
        self.manager = None

    def write(self, path, text):
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)

    def make_file(self, name):
        path = os.path.join(self.dir, name)
        self.write(path, 'a' * SIZE)
        return path

    def arguments(self, path=None, config=None):
        return ['--bus', self.address, '--config', config or self.config,
                *(['--socket', path] if path else [])]

    def make_manager(self, address=None):
        manager = Manager(address or os.path.join(self.dir, f'notify-{time.monotonic_ns()}'))
        self.addCleanup(manager.close)
        return manager

    def spawn(self, argv, env=None, **kwargs):
        daemon = Daemon(argv, env=env, **kwargs)
        self.addCleanup(daemon.close)
        return daemon

    def spawn_with(self, fds, arguments, env=None):
        """The daemon with descriptors passed as systemd does."""
        argv = [sys.executable, '-ISc', PASS_SOCKETS, str(len(fds)), *map(str, fds), DAEMON]
        return self.spawn(argv + arguments, env=env, pass_fds=fds)

    def start(self, arguments=None, **kwargs):
        """The daemon at self.path; returns when it says that it is ready."""
        self.manager = self.make_manager()
        daemon = self.spawn([DAEMON] + (arguments or self.arguments(self.path)),
                            env={'NOTIFY_SOCKET': self.manager.address}, **kwargs)
        self.manager.wait_for(READY)
        return daemon

    def listen(self, path=None, blocking=False, kind=socket.SOCK_STREAM):
        s = socket.socket(socket.AF_UNIX, kind)
        self.addCleanup(s.close)
        s.setblocking(blocking)
        s.bind(path or self.path)
        if kind == socket.SOCK_STREAM:
            s.listen()
        return s

    def connect(self, path=None):
        connection = Connection(path or self.path)
        self.addCleanup(connection.close)
        return connection

    def hold(self, path=None, file=None):
        holder = Holder(path or self.path, file or self.file)
        self.addCleanup(holder.close)
        return holder

    def expect_served(self, path=None):
        info = self.connect(path).call('org.varlink.service.GetInfo')
        self.assertEqual(info['product'], 'pinbrokerd')

    def expect_end(self, daemon, status=0, sig=signal.SIGTERM):
        daemon.kill(sig)
        self.assertEqual(daemon.wait(), status, daemon.text())

    def expect_refusal(self, daemon, status, pattern):
        """It does not start, and says why."""
        self.assertEqual(daemon.wait(), status, daemon.text())
        self.assertRegex(daemon.text(), pattern)

    def truncate(self, path=None):
        pid, result = truncate_in_child(path or self.file, PAGE)

        def finish():
            os.close(result)
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        self.addCleanup(finish)
        return pid, result

    def truncated(self, result):
        self.assertTrue(is_readable(result, WAIT), 'the truncate does not return')
        self.assertEqual(struct.unpack('idq', os.read(result, 64))[0], 0)

    def start_bus(self, *arguments):
        bus = self.spawn(['dbus-daemon', '--nofork', '--nopidfile', '--print-address=1',
                          '--address', self.address, *(arguments or ['--session'])])
        self.assertTrue(bus.process.stdout.readline(), 'the bus does not start')
        return bus


class Notification(Case):
    """What the service manager is told."""

    def test_ready(self):
        manager = self.make_manager()
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': None})
        message = manager.wait_for(READY)
        connection = self.connect()  # it is there at once
        self.assertEqual(manager.pid, daemon.pid)
        self.assertRegex(message, rb'(?m)^STATUS=0 pins of 0 files by 0 clients, 0 revocations')
        self.assertNotRegex(message, WATCHDOG)
        self.assertEqual(connection.call('org.varlink.service.GetInfo')['product'], 'pinbrokerd')

        # the end begins, and is told, before the pins are gone
        holder = self.hold()
        daemon.kill(signal.SIGTERM)
        message = manager.wait_for(STOPPING)
        self.assertRegex(message, rb'(?m)^STATUS=Ending: 1 pins of 1 files by 1 clients, 1 rev')
        self.assertEqual(holder.notice()['conflict']['cause'], 'shutdown')
        self.assertIsNone(daemon.process.poll())
        holder.release()
        self.assertEqual(daemon.wait(), 0, daemon.text())

    def test_watchdog(self):
        manager = self.make_manager()
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '400000'})
        begin = time.monotonic()
        for n in range(5):
            message = manager.wait_for(WATCHDOG)
            self.assertEqual(bool(READY.search(message)), n == 0)
        self.assertLess(time.monotonic() - begin, 5 * 0.4 + 1)
        daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)
        manager.socket.settimeout(0)
        with self.assertRaises(BlockingIOError):
            while True:
                manager.receive()
        daemon.kill(signal.SIGCONT)
        manager.socket.settimeout(WAIT)
        manager.wait_for(WATCHDOG)
        self.expect_end(daemon)

        # somebody else's watchdog
        manager = self.make_manager()
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '20000',
                                 'WATCHDOG_PID': '1'})
        self.assertNotRegex(manager.wait_for(READY), WATCHDOG)
        self.expect_end(daemon)
        self.assertNotRegex(manager.wait_for(STOPPING), WATCHDOG)

    def test_reader_that_never_reads(self):
        """I6: nobody waits for the manager, neither the loop nor a thread that others need."""
        manager = self.make_manager()
        n = manager.fill()
        passed = self.listen()
        connection = self.connect()
        daemon = self.spawn_with([passed.fileno()], self.arguments(),
                                 env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '20000'})
        until = time.monotonic() + 0.5  # 50 messages
        while time.monotonic() < until:
            connection.call('org.varlink.service.GetInfo')
        # who wants the pages is looked up by a thread
        holder = self.hold()
        pid, result = self.truncate()
        self.assertEqual(holder.notice()['conflict']['cause'], 'modify')
        self.assertEqual(holder.notice()['conflict']['pid'], pid)
        holder.release()
        self.truncated(result)

        # nothing is lost for good
        for _ in range(n):
            self.assertEqual(manager.receive(), b'FILLER=1')
        self.assertRegex(manager.receive(), READY)
        manager.wait_for(WATCHDOG)

        manager.fill()
        begin = time.monotonic()
        self.expect_end(daemon)
        self.assertLess(time.monotonic() - begin, 5)

    def test_addresses(self):
        manager = self.make_manager('\0pinbroker-test-%d' % os.getpid())
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': '@' + manager.address[1:]})
        manager.wait_for(READY)
        self.expect_end(daemon)

        for address in (os.path.join(self.dir, 'nowhere'), 'relative', '/' + 'x' * 200, ''):
            passed = self.listen(os.path.join(self.dir, 'passed'))
            daemon = self.spawn_with([passed.fileno()], self.arguments(),
                                     env={'NOTIFY_SOCKET': address})
            self.expect_served(passed.getsockname())
            if address:
                daemon.wait_for_log('manager')
            self.expect_end(daemon)
            os.unlink(passed.getsockname())

    def test_new_manager(self):
        """A manager that makes its socket anew is found again."""
        manager = self.make_manager()
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '20000'})
        manager.wait_for(READY)
        manager.close()
        os.unlink(manager.address)
        daemon.wait_for_log('Cannot reach the service manager')
        manager = self.make_manager(manager.address)
        self.assertNotRegex(manager.wait_for(WATCHDOG), READY)
        self.expect_end(daemon)
        manager.wait_for(STOPPING)
        self.assertEqual(daemon.text().count('Cannot reach the service manager'), 1)


class Activation(Case):
    """Sockets that are passed."""

    def test_first_contact(self):
        for blocking in (False, True):
            passed = self.listen(blocking=blocking)
            # before there is a daemon
            first = self.connect()
            first.send('org.pinbroker.Hello', {'name': 'first'})
            daemon = self.spawn_with([passed.fileno()], self.arguments())
            client = first.reply('org.pinbroker.Hello')[0]['client']
            # the loop does not wait for the next one to come
            first.call('org.varlink.service.GetInfo')
            self.expect_served()
            self.expect_end(daemon)

            # it is the manager's: it stays, and the next contact is the next daemon's
            self.assertTrue(stat.S_ISSOCK(os.stat(self.path).st_mode))
            second = self.connect()
            second.send('org.pinbroker.Hello', {})
            daemon = self.spawn_with([passed.fileno()], self.arguments())
            # I7: what the first daemon named is not named again
            self.assertGreater(second.reply('org.pinbroker.Hello')[0]['client'], client)
            self.expect_end(daemon)
            os.unlink(self.path)

    def test_nowhere_else(self):
        """What it remembers stands beside the socket that it was passed."""
        passed = self.listen()
        before = set(glob.glob('/run/pinbroker/*'))
        daemon = self.spawn_with([passed.fileno()], self.arguments())
        self.expect_served()
        self.assertIn('socket.ids', os.listdir(self.dir))
        self.assertEqual(set(glob.glob('/run/pinbroker/*')), before)
        self.expect_end(daemon)
        self.assertNotIn('Cannot', daemon.text().replace('Cannot take the bus', ''))

    def test_with_a_socket_of_its_own(self):
        passed = self.listen(os.path.join(self.dir, 'passed'))
        daemon = self.spawn_with([passed.fileno()], self.arguments(self.path))
        self.expect_served(passed.getsockname())
        self.expect_served()
        self.expect_end(daemon)
        self.assertTrue(os.path.exists(passed.getsockname()))
        self.assertFalse(os.path.exists(self.path))

    def test_for_somebody_else(self):
        """LISTEN_PID= names another process: descriptor 3 is none of ours."""
        passed = self.listen(os.path.join(self.dir, 'passed'), blocking=True)
        passed.settimeout(WAIT)
        manager = self.make_manager()
        daemon = self.spawn_with([passed.fileno()], self.arguments(self.path),
                                 env={'LISTEN_PID': '1', 'NOTIFY_SOCKET': manager.address})
        manager.wait_for(READY)
        self.connect(passed.getsockname())
        self.expect_served()
        passed.accept()[0].close()  # nobody else took it
        self.expect_end(daemon)

    def test_wrong_descriptors(self):
        pipe = os.pipe()
        self.addCleanup(os.close, pipe[0])
        self.addCleanup(os.close, pipe[1])
        datagram = self.listen(os.path.join(self.dir, 'datagram'), kind=socket.SOCK_DGRAM)
        tcp = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(tcp.close)
        deaf = socket.socket(socket.AF_UNIX)
        self.addCleanup(deaf.close)
        deaf.bind(os.path.join(self.dir, 'deaf'))
        one, two = (self.listen(os.path.join(self.dir, name)) for name in ('one', 'two'))
        for what, fds, message in (
                ('a pipe', [pipe[0]], 'Descriptor 3, .* no listening AF_UNIX stream socket'),
                ('datagrams', [datagram.fileno()], 'Descriptor 3, .* no listening AF_UNIX'),
                ('TCP', [tcp.fileno()], 'Descriptor 3, .* no listening AF_UNIX'),
                ('not listening', [deaf.fileno()], 'Descriptor 3, .* no listening AF_UNIX'),
                ('two', [one.fileno(), two.fileno()], '2 descriptors were passed')):
            with self.subTest(what):
                self.expect_refusal(self.spawn_with(fds, self.arguments()), UNAVAILABLE, message)

    @unittest.skipUnless(shutil.which('systemd-socket-activate'), 'not installed')
    def test_socket_activate(self):
        daemon = self.spawn(['systemd-socket-activate', '-E', 'ASAN_OPTIONS', '-l', self.path,
                             DAEMON] + self.arguments())
        daemon.wait_for_log('Listening on')
        first = self.connect()
        first.call('org.varlink.service.GetInfo')
        first.call('org.pinbroker.Hello')
        self.expect_served()
        self.expect_end(daemon)

        daemon = self.spawn(['systemd-socket-activate', '--datagram', '-l', self.path + '-d',
                             DAEMON] + self.arguments())
        daemon.wait_for_log('Listening on')
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.sendto(b'x', self.path + '-d')
        self.expect_refusal(daemon, UNAVAILABLE, 'no listening AF_UNIX stream socket')


class Options(Case):
    def command(self, *arguments):
        return subprocess.run([DAEMON, *arguments], stdin=subprocess.DEVNULL, encoding='utf-8',
                              capture_output=True, timeout=WAIT, check=False)

    def test_help_and_version(self):
        for option in ('-h', '--help'):
            result = self.command(option)
            self.assertEqual((result.returncode, result.stderr), (0, ''))
            for word in ('--bus', '--socket', '--config', '--help', '--version'):
                self.assertIn(word, result.stdout)
        result = self.command('--version')
        self.assertEqual((result.returncode, result.stderr), (0, ''))
        self.assertRegex(result.stdout, r'^pinbrokerd \d+(\.\d+)+\n$')

    def test_wrong_usage(self):
        for arguments, named in ((['--nonsense'], 'nonsense'), (['-x'], "'x'"),
                                 (['--socket'], 'socket'), (['--bus'], 'bus'),
                                 (['--config'], 'config'), (['--help=x'], 'help'),
                                 (['stray'], 'unexpected argument: stray'),
                                 (['--version=1'], 'version')):
            with self.subTest(arguments):
                result = self.command(*arguments)
                self.assertEqual((result.returncode, result.stdout), (USAGE, ''))
                self.assertIn(named, result.stderr.splitlines()[0])
                self.assertIn('--socket=PATH', result.stderr)

    def grace(self):
        """What a holder is given, in seconds."""
        holder = self.hold()
        pid, result = self.truncate()
        begin = time.monotonic()
        seconds = holder.notice()['deadlineUSec'] / 1e6 - begin
        holder.release()
        self.truncated(result)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        return seconds

    def test_wrong_settings(self):
        """They are named, and the default stands; those beside them count."""
        self.write(self.config, '[Revocation]\nNonsense=1\nRevokeGraceSec=soon\n'
                                'SignalGraceSec=3\n\n[Nowhere]\nLeases=owner\n[Limits]\n'
                                'MaxClientsPerUser=3\nMaxPinsPerUser=-1\nnonsense\n')
        daemon = self.start()
        for message in (r':2: .*"Revocation".* no Nonsense=', r':3: "soon" .*RevokeGraceSec=',
                        r':7: .*"Nowhere".* no Leases=', r':10: "-1" .*MaxPinsPerUser=',
                        r':11: .*neither \\?x?5?b?\[?Section'):
            daemon.wait_for_log(re.escape(self.config) + message)
        self.assertEqual(daemon.text().count(self.config), 5)
        seconds = self.grace()
        self.assertTrue(9 < seconds < 10.5, seconds)
        # a holder is a client with two connections
        message = self.connect().receive()
        self.assertEqual(message['error'], 'org.pinbroker.LimitExceeded')
        self.assertEqual(message['parameters']['maximum'], 3)
        self.expect_end(daemon)

    def test_settings(self):
        os.mkdir(self.config + '.d')
        self.write(self.config, '[Revocation]\nRevokeGraceSec=3s\n')
        self.write(self.config + '.d/10-more.conf', '[Revocation]\nRevokeGraceSec=7s\n')
        daemon = self.start()
        seconds = self.grace()
        self.assertTrue(6 < seconds < 7.5, seconds)
        self.assertNotIn('ignored', daemon.text())
        self.expect_end(daemon)

    def test_no_configuration(self):
        missing = os.path.join(self.dir, 'missing.conf')
        for path, reason in ((missing, 'No such file'), (self.dir, 'Is a directory')):
            daemon = self.spawn([DAEMON] + self.arguments(self.path, path))
            self.expect_refusal(daemon, CONFIG,
                                f'Cannot read {re.escape(path)}: {reason}')
            self.assertFalse(os.path.exists(self.path))

    def test_bad_socket_paths(self):
        regular = os.path.join(self.dir, 'regular')
        self.write(regular, 'precious')
        link = os.path.join(self.dir, 'link')
        os.symlink(regular, link)
        for path, reason in ((os.path.join(self.dir, 'missing', 'socket'), 'No such file'),
                             (regular, 'File exists'), (link, 'File exists'),
                             (self.dir, 'File exists'), (regular + '/socket', 'Not a directory'),
                             (self.dir + '/' + 'x' * 100, 'too long')):
            with self.subTest(path):
                daemon = self.spawn([DAEMON] + self.arguments(path))
                self.expect_refusal(daemon, UNAVAILABLE,
                                    f'Cannot listen on {re.escape(path)}: .*{reason}')
        # whatever is there stays there
        with open(link, encoding='utf-8') as f:
            self.assertEqual(f.read(), 'precious')
        self.assertTrue(os.path.islink(link))

    def test_live_socket(self):
        daemon = self.start()
        inode = os.stat(self.path).st_ino
        second = self.spawn([DAEMON] + self.arguments(self.path))
        self.expect_refusal(second, UNAVAILABLE, 'Cannot listen on .*Address already in use')
        self.assertEqual(os.stat(self.path).st_ino, inode)
        self.expect_served()
        self.expect_end(daemon)

        # alive, but busy: what cannot be connected to at once is not taken for dead, nor waited for
        busy = self.listen()
        busy.listen(0)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BlockingIOError):
                while True:
                    s = stack.enter_context(socket.socket(socket.AF_UNIX))
                    s.setblocking(False)
                    s.connect(self.path)
            self.expect_refusal(self.spawn([DAEMON] + self.arguments(self.path)), UNAVAILABLE,
                                'Address already in use')

    def test_stale_socket(self):
        daemon = self.start()
        client = self.hold().client
        inode = os.stat(self.path).st_ino
        self.expect_end(daemon, -signal.SIGKILL, signal.SIGKILL)
        self.assertEqual(os.stat(self.path).st_ino, inode)
        daemon = self.start()
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o666)
        self.assertGreater(self.connect().call('org.pinbroker.Hello')['client'], client)  # I7
        self.expect_end(daemon)

    def test_no_bus(self):
        daemon = self.start()
        daemon.wait_for_log('bus is not there, going on without')
        holder = self.hold()
        _, result = self.truncate()
        holder.notice()
        holder.release()
        self.truncated(result)

        bus = self.start_bus()
        daemon.wait_for_log('On the bus as org.pinbroker1')
        busctl = ['busctl', '--address', self.address, '--timeout', str(WAIT)]
        answer = subprocess.run(busctl + ['get-property', 'org.pinbroker1', '/org/pinbroker1',
                                          'org.pinbroker1.Manager', 'Version'],
                                capture_output=True, encoding='utf-8', check=True)
        self.assertRegex(answer.stdout, r'^s "\d+\.\d+')
        self.expect_end(daemon)
        self.expect_end(bus)


class End(Case):
    def test_signals(self):
        for sig in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start()
            self.expect_served()
            idle = self.connect()
            self.expect_end(daemon, sig=sig)
            self.manager.wait_for(STOPPING)
            self.assertIsNone(idle.receive())
            self.assertFalse(os.path.exists(self.path))
            self.assertRegex(daemon.text(), 'Ending: 0 pins')
            self.assertRegex(daemon.log[-1], 'Ended')

    def test_somebody_elses_socket(self):
        """What has taken the place of its own is not removed."""
        daemon = self.start()
        os.unlink(self.path)
        self.listen()
        self.expect_end(daemon)
        self.assertTrue(os.path.exists(self.path))

    def test_twice(self):
        """The second time it does not wait for the holders any more, and says so."""
        for sig in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start()
            file = self.make_file(f'data-{sig}')
            holder = self.hold(file=file)
            daemon.kill(signal.SIGTERM)
            self.assertEqual(holder.notice()['conflict']['cause'], 'shutdown')
            _, result = self.truncate(file)
            # it goes on serving
            revocations = self.connect().list('org.pinbroker.ListRevocations')
            self.assertEqual([r['conflict']['cause'] for r in revocations
                              if r['remaining']][:1], ['shutdown'])
            self.assertFalse(is_readable(result, 0))
            self.assertIsNone(daemon.process.poll())
            begin = time.monotonic()
            self.expect_end(daemon, TEMPFAIL, sig)
            self.assertLess(time.monotonic() - begin, 5)
            self.assertRegex(daemon.text(), 'Asked again to end: ending at once, with 1 pins')
            self.assertFalse(os.path.exists(self.path))
            self.truncated(result)  # the lease went with the daemon

    def test_with_clients(self):
        """A holder that has gone by then holds nothing up."""
        daemon = self.start()
        file = self.make_file('of-the-dead')
        pid = os.fork()
        if pid == 0:
            try:
                holder = Holder(self.path, file)
                os.kill(daemon.pid, signal.SIGTERM)
                holder.notice()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(daemon.wait(), 0, daemon.text())


def as_nobody(function):
    """Runs it in a process of uid 65534; what it returns."""
    result, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            # as after an exec: others of the same uid may look into it
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
            answer = {'result': function()}
        except BaseException:  # pylint: disable=broad-except
            answer = {'failure': traceback.format_exc()}
        with os.fdopen(end, 'w', encoding='utf-8') as f:
            json.dump(answer, f)
        os._exit(0)
    os.close(end)
    with os.fdopen(result, encoding='utf-8') as f:
        answer = f.read()
    os.waitpid(pid, 0)
    answer = json.loads(answer)
    if 'failure' in answer:
        raise AssertionError(answer['failure'])
    return answer['result']


class Unprivileged(Case):
    @unittest.skipUnless(os.getuid() == 0, 'needs root to become somebody else')
    def test_nobody(self):
        os.chmod(self.dir, 0o755)
        home = os.path.join(self.dir, 'home')
        os.mkdir(home)
        path, own = os.path.join(home, 'socket'), self.make_file('home/own')
        for name in (home, own):
            os.chown(name, NOBODY, NOBODY)
        foreign = self.make_file('foreign')
        os.chmod(foreign, 0o666)
        self.manager = self.make_manager()
        os.chmod(self.manager.address, 0o666)
        # the build tree may be where nobody can go
        fd = os.open(DAEMON, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        daemon = self.spawn(['pinbrokerd'] + self.arguments(path),
                            executable=f'/proc/self/fd/{fd}', pass_fds=[fd],
                            env={'NOTIFY_SOCKET': self.manager.address},
                            user=NOBODY, group=NOBODY, extra_groups=[])
        self.manager.wait_for(READY)
        daemon.wait_for_log(f'Running as uid {NOBODY}: serving this user.s own files only')

        ready, end = os.pipe()

        def refusal():
            with contextlib.closing(Connection(path)) as connection:
                connection.call('org.pinbroker.Hello')
                try:
                    open_file(connection, foreign)
                except Refused as e:
                    return e.error, e.parameters['message']
            return None

        def client():
            with contextlib.closing(Holder(path, own)) as holder:
                refused = refusal()
                os.write(end, b'x')
                notice = holder.notice()
                holder.release()
                return refused, notice['conflict']

        def truncate():
            os.read(ready, 1)
            os.truncate(own, PAGE)

        thread = threading.Thread(target=truncate)
        thread.start()
        refused, conflict = as_nobody(client)
        thread.join()
        os.close(ready)
        os.close(end)
        self.assertEqual(conflict['cause'], 'modify')
        self.assertEqual(os.stat(own).st_size, PAGE)
        # without CAP_LEASE the kernel gives nobody a lease on what is somebody else's
        for error, message in (refused, refusal()):
            self.assertIn(error, ('org.pinbroker.NotLeasable', 'org.pinbroker.NotAllowed'))
            self.assertTrue(message)
        self.expect_end(daemon)
        self.assertFalse(os.path.exists(path))


PROGRAM = r'''
#include <inttypes.h>
#include <pinbroker.h>
#include <stdio.h>
#include <sys/eventfd.h>

static int on_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	printf("%s %" PRIu64 "\n", info->path, info->length);
	return 0;
}

int main(int argc, char *argv[])
{
	struct pinbroker_range range = { 0, 4096 };
	pinbroker *pb = NULL;
	pinbroker_file *file = NULL;
	pinbroker_context *context = NULL;
	uint64_t pin;

	if (argc != 3 || pinbroker_new("program", argv[1], &pb) < 0)
		return 2;
	if (pinbroker_connect(pb) < 0 ||
	    pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file) < 0 ||
	    pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &context) < 0 ||
	    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, NULL, &pin) < 0 ||
	    pinbroker_bind(pb, pin, 0) < 0 || pinbroker_list_pins(pb, 0, 0, on_pin, NULL) < 0 ||
	    pinbroker_unpin(pb, &pin, 1, NULL, NULL) < 0 || pinbroker_remove_context(context) < 0 ||
	    pinbroker_close_file(file) < 0) {
		fprintf(stderr, "%s\n", pinbroker_last_error(pb)->message);
		return 1;
	}
	pinbroker_unref(pb);
	return 0;
}
'''


@unittest.skipUnless(os.environ.get('BUILD_ROOT') and shutil.which('meson'), 'no build tree, or no meson')
class Install(Case):
    @classmethod
    def setUpClass(cls):
        build = os.environ['BUILD_ROOT']
        # not /dev/shm, where programs may not be allowed
        cls.root = tempfile.mkdtemp(prefix='pinbroker-test-')
        cls.addClassCleanup(shutil.rmtree, cls.root)
        meson = subprocess.run(['meson', 'install', '--no-rebuild', '--destdir', cls.root, '-C', build],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
                               timeout=60, check=False)
        if meson.returncode != 0:
            raise AssertionError(meson.stdout)
        options = subprocess.run(['meson', 'introspect', '--buildoptions', build], check=True,
                                 capture_output=True, timeout=60)
        cls.options = {o['name']: o['value'] for o in json.loads(options.stdout)}

    def directory(self, option):
        return os.path.join(self.options['prefix'], self.options[option])

    def systemd(self, variable, default):
        """Where systemd wants it, if it is installed."""
        result = subprocess.run(['pkg-config', '--variable', variable, 'systemd'],
                                capture_output=True, encoding='utf-8', check=False)
        return result.stdout.strip() or os.path.join(self.options['prefix'], default)

    def unit_directory(self):
        return self.systemd('systemdsystemunitdir', 'lib/systemd/system')

    def installed(self, *path):
        return self.root + os.path.join(*path)

    def run_command(self, argv, env=None):
        """What it prints."""
        result = subprocess.run(argv, capture_output=True, encoding='utf-8', timeout=WAIT,
                                env=dict(os.environ, **(env or {})), check=False)
        self.assertEqual(result.returncode, 0, f'{argv}: {result.stdout}{result.stderr}')
        return result.stdout + result.stderr

    def test_layout(self):
        directory = self.directory
        library = os.path.join(directory('libdir'), 'libpinbroker.so')
        files = {
            os.path.join(directory('sbindir'), 'pinbrokerd'): 0o755,
            os.path.join(directory('bindir'), 'pinbrokerctl'): 0o755,
            library + '.1.0.0': 0o755,
            library + '.1': 'libpinbroker.so.1.0.0',
            library: 'libpinbroker.so.1',
            os.path.join(directory('libdir'), 'pkgconfig/libpinbroker.pc'): 0o644,
            os.path.join(directory('includedir'), 'pinbroker.h'): 0o644,
            os.path.join(self.unit_directory(), 'pinbrokerd.service'): 0o644,
            os.path.join(self.unit_directory(), 'pinbrokerd.socket'): 0o644,
            os.path.join(directory('datadir'), 'dbus-1/system.d/org.pinbroker1.conf'): 0o644,
            os.path.join(self.systemd('sysusersdir', 'lib/sysusers.d'), 'pinbroker.conf'): 0o644,
            os.path.join(directory('sysconfdir'), 'pinbroker/pinbroker.conf'): 0o644,
        }
        self.assertRegex(self.unit_directory(), r'lib/systemd/system$')
        self.assertRegex(self.systemd('sysusersdir', 'lib/sysusers.d'), r'lib/sysusers\.d$')
        found = {}
        for parent, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(parent, name)
                mode = os.lstat(path).st_mode
                found[path[len(self.root):]] = (os.readlink(path) if stat.S_ISLNK(mode)
                                                else stat.S_IMODE(mode))
        # manual pages and catalogs may come with them
        missing = {path: found.get(path) for path in files if found.get(path) != files[path]}
        self.assertEqual(missing, {}, found)
        # nothing of the tests, nothing static, nothing that looks like a file of the build tree
        for path in found:
            self.assertNotRegex(path, r'\.a$|example|test|demo|\.in$')

        dynamic = self.run_command(['readelf', '-d', self.installed(library)])
        self.assertRegex(dynamic, r'SONAME.*\[libpinbroker\.so\.1\]')
        for binary in (library, os.path.join(directory('sbindir'), 'pinbrokerd'),
                       os.path.join(directory('bindir'), 'pinbrokerctl')):
            self.assertNotRegex(self.run_command(['readelf', '-d', self.installed(binary)]),
                                'RPATH|RUNPATH')

    def test_configuration(self):
        """The daemon takes what is installed, without a complaint."""
        daemon = self.spawn([self.installed(self.directory('sbindir'), 'pinbrokerd')] +
                            self.arguments(self.path, self.installed(self.directory('sysconfdir'),
                                                                     'pinbroker/pinbroker.conf')))
        daemon.wait_for_log('bus is not there')
        self.expect_end(daemon)
        self.assertNotIn('pinbroker.conf', daemon.text())

    def test_units(self):
        with open(self.installed(self.unit_directory(), 'pinbrokerd.service'),
                  encoding='utf-8') as f:
            service = f.read()
        program = os.path.join(self.directory('sbindir'), 'pinbrokerd')
        self.assertRegex(service, f'(?m)^ExecStart={program}$')
        self.assertNotIn('@', service)
        if not shutil.which('systemd-analyze'):
            self.skipTest('no systemd-analyze')
        # The program is not at its place. What stands in the unit must be known and sensible.
        units = os.path.join(self.dir, 'units')
        os.mkdir(units)
        shutil.copy(self.installed(self.unit_directory(), 'pinbrokerd.socket'), units)
        self.write(units + '/pinbrokerd.service',
                   service.replace(f'ExecStart={program}', 'ExecStart=' + self.installed(program)))
        for name in ('pinbrokerd.socket', 'pinbrokerd.service'):
            said = self.run_command(['systemd-analyze', 'verify', '--man=no', '--recursive-errors=no',
                                     os.path.join(units, name)], {'SYSTEMD_UNIT_PATH': units + ':'})
            self.assertNotRegex(said, 'pinbrokerd')

    @unittest.skipUnless(shutil.which('systemd-sysusers'), 'not installed')
    def test_sysusers(self):
        root = os.path.join(self.dir, 'root')
        os.makedirs(root + '/etc')
        self.run_command(['systemd-sysusers', '--root', root, self.installed(
            self.systemd('sysusersdir', 'lib/sysusers.d'), 'pinbroker.conf')])
        with open(root + '/etc/group', encoding='utf-8') as f:
            self.assertRegex(f.read(), r'(?m)^pinbroker:')

    @unittest.skipUnless(os.getuid() == 0, 'needs root to become somebody else')
    def test_bus_policy(self):
        """root may own the name and call; nobody may neither."""
        os.chmod(self.dir, 0o755)
        policy = self.installed(self.directory('datadir'), 'dbus-1/system.d')
        config = os.path.join(self.dir, 'bus.conf')
        self.write(config, f'''<busconfig><type>system</type><listen>{self.address}</listen>
            <auth>EXTERNAL</auth><policy context="default"><allow user="*"/><deny own="*"/>
            <deny send_type="method_call"/><allow send_type="signal"/>
            <allow send_requested_reply="true" send_type="method_return"/>
            <allow send_requested_reply="true" send_type="error"/>
            <allow receive_type="method_call"/><allow receive_type="method_return"/>
            <allow receive_type="error"/><allow receive_type="signal"/>
            <allow send_destination="org.freedesktop.DBus"/></policy>
            <includedir>{policy}</includedir></busconfig>''')
        self.start_bus('--config-file', config)
        daemon = self.start()
        daemon.wait_for_log('On the bus as org.pinbroker1')
        call = ['busctl', '--address', self.address, 'get-property', 'org.pinbroker1',
                '/org/pinbroker1', 'org.pinbroker1.Manager', 'Version']
        self.run_command(call)
        request = ['busctl', '--address', self.address, 'call', 'org.freedesktop.DBus',
                   '/org/freedesktop/DBus', 'org.freedesktop.DBus', 'RequestName', 'su',
                   'org.pinbroker1', '0']
        for argv in (call, request):
            result = subprocess.run(argv, user=NOBODY, group=NOBODY, extra_groups=[], check=False,
                                    capture_output=True, encoding='utf-8', timeout=WAIT)
            self.assertNotEqual(result.returncode, 0)
            self.assertRegex(result.stderr, '(?i)access denied|not allowed')
        self.expect_end(daemon)

    def compiler(self):
        compiler = os.environ.get('CC', 'cc').split()
        return compiler if shutil.which(compiler[0]) else self.skipTest('no compiler')

    def test_header(self):
        header = self.installed(self.directory('includedir'), 'pinbroker.h')
        warnings = ['-Wall', '-Wextra', '-Wpedantic', '-Werror', '-fsyntax-only']
        for language, standards in (('c', ('c99', 'c11', 'gnu17')), ('c++', ('c++11', 'c++17'))):
            for standard in standards:
                self.run_command(self.compiler() + ['-x', language, '-std=' + standard, *warnings,
                                                    header])

    def pkg_config(self):
        return self.run_command(['pkg-config', '--cflags', '--libs', 'libpinbroker'], {
            'PKG_CONFIG_SYSROOT_DIR': self.root,
            'PKG_CONFIG_LIBDIR': self.installed(self.directory('libdir'), 'pkgconfig'),
            # /usr/include is none of the compiler's own when it is below the root
            'PKG_CONFIG_ALLOW_SYSTEM_CFLAGS': '1', 'PKG_CONFIG_ALLOW_SYSTEM_LIBS': '1'}).split()

    # A library with a sanitizer in it needs a program with it; what is to be seen is seen without.
    @unittest.skipIf(os.environ.get('PINBROKER_SANITIZED'), 'the library needs a sanitizer')
    def test_program(self):
        source, program = os.path.join(self.dir, 'program.c'), os.path.join(self.root, 'program')
        self.write(source, PROGRAM)
        flags = self.pkg_config()
        self.run_command(self.compiler() + ['-Wall', '-Werror', '-o', program, source, *flags])
        self.addCleanup(os.unlink, program)
        libraries = {'LD_LIBRARY_PATH': self.installed(self.directory('libdir'))}
        daemon = self.start()
        self.assertEqual(self.run_command([program, self.path, self.file], libraries),
                         f'{self.file} {PAGE}\n')
        said = self.run_command([self.installed(self.directory('bindir'), 'pinbrokerctl'),
                                 '--socket', self.path, 'list', 'files', '--json=short'], libraries)
        self.assertEqual(said.strip(), '[]')
        self.expect_end(daemon)


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
