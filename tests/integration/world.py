# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests in Python stand on: the daemon ($PINBROKERD), a bus, a service manager, holders of
pins, and processes of nobody.
"""

import array
import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest

import client
from client import PAGE, WAIT, Connection, is_readable, truncate_in_child

DAEMON = os.environ['PINBROKERD']
LIBC = ctypes.CDLL(None)
NOBODY = 65534
SIZE = 16 * PAGE
USAGE, UNAVAILABLE, OSERR, IOERR, TEMPFAIL, CONFIG = 64, 69, 71, 74, 75, 78  # sysexits.h
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


class DeafManager:
    """The service manager's end of NOTIFY_SOCKET, read only when a test does."""

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


def is_among(fd, others):
    """Whether one of them is the same description."""
    kcmp, pid = {'x86_64': 312, 'aarch64': 272}[platform.machine()], os.getpid()
    return any(LIBC.syscall(kcmp, pid, pid, 0, fd, other) == 0 for other in others)


class Manager(DeafManager):
    """A service manager with a file descriptor store, like systemd's: descriptors by name, of two that are alike
    the first; it is told to keep and to remove, and lets go of barriers.
    """

    def __init__(self, address):
        super().__init__(address)
        self.kept, self.messages = {}, []
        self.n_taken = self.n_heard = 0
        self.changed = threading.Condition()
        self.socket.settimeout(None)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while True:
            data, control, _, _ = self.socket.recvmsg(4096, 256, socket.MSG_CMSG_CLOEXEC)
            self.n_taken += 1
            fds = array.array('i')
            for level, kind, value in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(value)
            fields = dict(line.split('=', 1) for line in data.decode().splitlines())
            with self.changed:
                self.n_heard += 1
                if 'END' in fields:
                    return
                self.apply(fields, fds)
                self.messages.append(data)
                self.changed.notify_all()

    def apply(self, fields, fds):
        name = fields.get('FDNAME')
        if 'FDSTORE' in fields:
            assert fields['FDPOLL'] == '0' and name not in self.kept and len(fds) == 1, fields
            if not is_among(fds[0], self.kept.values()):
                self.kept[name] = fds.pop()
        elif 'FDSTOREREMOVE' in fields and name in self.kept:
            os.close(self.kept.pop(name))
        for fd in fds:
            os.close(fd)

    @contextlib.contextmanager
    def hanging(self):
        """It reads nothing, and its queue is full."""
        with self.changed:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
                s.sendto(b'FILLER=1', self.address)
            while self.n_taken == self.n_heard:  # until it has taken a message, and waits for us
                time.sleep(0.001)
            self.fill()
            yield

    def catch_up(self):
        """What was said by now has been heard, as systemd sees to before it looks who has ended."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            mark = b'MARK=%d' % time.monotonic_ns()
            s.sendto(mark, self.address)
        self.wait_until(lambda: mark in self.messages)

    def wait_until(self, condition):
        with self.changed:
            if not self.changed.wait_for(condition, WAIT):
                raise AssertionError(f'{self.kept}')

    def receive(self):
        self.wait_until(lambda: self.messages)
        return self.messages.pop(0)

    def close(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.sendto(b'END=1', self.address)
        self.thread.join()
        for fd in self.kept.values():
            os.close(fd)
        super().close()


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
        self.context = self.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                            [self.event])['context']
        self.pins = self.pin()
        self.watch.send('org.pinbroker.Watch', {'client': self.client, 'token': hello['token']},
                        more=True)

    def pin(self):
        pins = self.connection.call('org.pinbroker.Pin', {
            'file': self.file, 'context': self.context, 'access': 'write',
            'ranges': [{'offset': 0, 'length': SIZE}]})['pins']
        self.connection.call('org.pinbroker.Bind', {'pin': pins[0], 'handle': 0})
        return pins

    def notice(self):
        return self.watch.reply('org.pinbroker.Watch')[0]['notice']

    def release(self):
        self.connection.call('org.pinbroker.Unpin', {'pins': self.pins})

    def close(self):
        self.connection.close()
        self.watch.close()
        os.close(self.fd)
        os.close(self.event)


def end_child(pid):
    """If it has not been waited for."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def fork_as(uid, function):
    """A process that runs it, of that uid if it is not None: its pid, and where what it returns comes from, as
    JSON."""
    result, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                # as after an exec: others of the same uid may look into it
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
            answer = {'result': function()}
        except BaseException:  # pylint: disable=broad-except
            answer = {'failure': traceback.format_exc()}
        with os.fdopen(end, 'w', encoding='utf-8') as f:
            json.dump(answer, f)
        os._exit(0)
    os.close(end)
    return pid, os.fdopen(result, encoding='utf-8')


def fork_nobody(function):
    return fork_as(NOBODY, function)


def in_child(function, uid=None):
    """Runs it in a process, of that uid if it is not None; what it returns."""
    pid, result = fork_as(uid, function)
    with result:
        answer = json.loads(result.read())
    os.waitpid(pid, 0)
    if 'failure' in answer:
        raise AssertionError(answer['failure'])
    return answer['result']


def as_nobody(function):
    return in_child(function, NOBODY)


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

    def make_manager(self, address=None, deaf=False):
        kind = DeafManager if deaf else Manager
        manager = kind(address or os.path.join(self.dir, f'notify-{time.monotonic_ns()}'))
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
        self.addCleanup(os.close, result)
        self.addCleanup(end_child, pid)
        return pid, result

    def truncated(self, result):
        self.assertTrue(is_readable(result, WAIT), 'the truncate does not return')
        self.assertEqual(struct.unpack('idq', os.read(result, 64))[0], 0)

    def set_lease_break_time(self, seconds):
        """As before again after the case."""
        client.set_lease_break_time(seconds)
        self.addCleanup(client.write_lease_break_time, client.original_lease_break_time)

    def start_bus(self, *arguments):
        bus = self.spawn(['dbus-daemon', '--nofork', '--nopidfile', '--print-address=1',
                          '--address', self.address, *(arguments or ['--session'])])
        self.assertTrue(bus.process.stdout.readline(), 'the bus does not start')
        return bus
