#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What strangers have the broker keep and close: no close of theirs holds up anybody else (I6), neither on the
loop nor on the pool, and what a user has kept is bounded, with room left for Unpin.
"""

import array
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
import unittest

from client import PAGE, SLOWNESS, WAIT, Connection, Refused, equal, is_readable
from world import NOBODY, SIZE, Case, Holder, end_child, fork_as, in_child, open_file

LINGER = 30         # seconds, in the close of what lingers
ROUND_TRIP = 0.3    # seconds, at most: the machine may be loaded, but nothing may wait for a close
FIRST_UID = 3000
GROUPS_MAX = 4096
INFO = 'org.varlink.service.GetInfo'
MESSAGE = json.dumps({'method': INFO}).encode() + b'\0'

FUSE_GETATTR, FUSE_OPEN, FUSE_FLUSH, FUSE_INIT = 3, 14, 25, 26


def linger():
    """A TCP socket whose last close waits, and the other end."""
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen(1)
    s = socket.socket()
    s.connect(listener.getsockname())
    other, _ = listener.accept()
    listener.close()
    s.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            s.send(b'x' * 65536)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, LINGER))
    return s, other


def send_fds(s, data, fds, flags=0):
    numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
    return s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', numbers))],
                     flags)


class HangingFiles:
    """A FUSE file whose every close hangs, until the server goes."""

    def __init__(self, path):
        self.path, self.libc = path, ctypes.CDLL(None, use_errno=True)
        self.server = os.open('/dev/fuse', os.O_RDWR | os.O_CLOEXEC)
        with open(path, 'wb'):
            pass
        options = f'fd={self.server},rootmode=100666,user_id=0,group_id=0,allow_other'
        if self.libc.mount(b'test', path.encode(), b'fuse', 0, options.encode()) < 0:
            raise OSError(ctypes.get_errno(), 'mount')
        self.flushes = 0
        self.changed = threading.Condition()
        threading.Thread(target=self.serve, daemon=True).start()

    def reply(self, unique, data):
        os.write(self.server, struct.pack('IiQ', 16 + len(data), 0, unique) + data)

    def serve(self):
        attributes = struct.pack('QII6Q10I', 60, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o100666, 1, 0,
                                 0, 0, 4096, 0)
        with contextlib.suppress(OSError):
            while True:
                request = os.read(self.server, 1 << 18)
                _, opcode, unique = struct.unpack_from('IIQ', request)
                if opcode == FUSE_INIT:
                    self.reply(unique, struct.pack('IIIIHHII', 7, 31, 65536, 0, 16, 16, 65536, 1) +
                               bytes(36))
                elif opcode == FUSE_GETATTR:
                    self.reply(unique, attributes)
                elif opcode == FUSE_OPEN:
                    self.reply(unique, struct.pack('QII', 0, 0, 0))
                elif opcode == FUSE_FLUSH:
                    with self.changed:
                        self.flushes += 1
                        self.changed.notify_all()

    def wait_for_flushes(self, n):
        with self.changed:
            if not self.changed.wait_for(lambda: self.flushes >= n, WAIT):
                raise AssertionError(f'{self.flushes} closes hang, not {n}')

    def close(self):
        # aborts what waits: whoever has a descriptor goes on
        self.libc.umount2(self.path.encode(), 1)  # MNT_FORCE
        self.libc.umount2(self.path.encode(), 2)  # MNT_DETACH


class Attacker:
    """A process of that uid that runs a generator, each time up to what it yields, which has to be a number."""

    def __init__(self, function, uid):
        self.reader, writer = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

        def run():
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            for value in function():
                os.write(writer, struct.pack('q', value or 0))
                signal.sigwait([signal.SIGUSR1])

        self.pid, self.result = fork_as(uid, run)
        os.close(writer)

    def wait(self):
        said = is_readable(self.reader, WAIT) and os.read(self.reader, 8)
        if not said:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(self.result.read() or 'the attacker is late')
        return struct.unpack('q', said)[0]

    def go_on(self):
        os.kill(self.pid, signal.SIGUSR1)
        return self.wait()

    def close(self):
        end_child(self.pid)
        self.result.close()
        os.close(self.reader)


class LimitsCase(Case):
    def setUp(self):
        super().setUp()
        os.chmod(self.dir, 0o755)

    def attack(self, function, uid=NOBODY, fuse=None):
        attacker = Attacker(function, uid)
        self.addCleanup(attacker.close)
        if fuse:  # before that: whoever has its file hangs at its end
            self.addCleanup(fuse.close)
        attacker.wait()
        return attacker

    @contextlib.contextmanager
    def stopped(self, daemon):
        """The daemon does not run meanwhile: what is sent waits for it, and is its alone."""
        daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED | os.WNOWAIT)
        yield
        daemon.kill(signal.SIGCONT)

    def expect_quick(self, connection, n=200):
        slowest = 0
        for _ in range(n):
            begin = time.monotonic()
            connection.call(INFO)
            slowest = max(slowest, time.monotonic() - begin)
        self.assertLess(slowest, ROUND_TRIP * SLOWNESS)

    def expect_protected(self):
        """A newcomer is served; a holder that lets go at once lets a truncate through at once; and one that does
        not is sent its signals.
        """
        begin = time.monotonic()
        newcomer = self.connect()
        newcomer.call('org.pinbroker.Hello', {'name': 'newcomer'})
        opened = open_file(newcomer, self.make_file(f'new-{begin}'))
        newcomer.call('org.pinbroker.CloseFile', {'file': opened['file']})

        file = self.make_file(f'held-{begin}')
        holder = self.hold(file=file)
        _, result = self.truncate(file)
        holder.notice()
        holder.release()
        self.truncated(result)
        self.assertLess(time.monotonic() - begin, 2 * ROUND_TRIP * SLOWNESS)

        file = self.make_file(f'ignored-{begin}')
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                Holder(self.path, file)
                os.write(writer, b'x')
                signal.pause()
            os._exit(1)
        self.addCleanup(end_child, pid)
        os.close(writer)
        equal(os.read(reader, 1), b'x')
        os.close(reader)
        _, result = self.truncate(file)
        self.truncated(result)
        equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGBUS)


class Closes(LimitsCase):
    CONFIG = '[Revocation]\nRevokeGraceSec=2s\nSignalGraceSec=10s\n'

    def setUp(self):
        super().setUp()
        self.write(self.config, self.CONFIG)

    def test_what_the_loop_reads(self):
        """Bytes out of band, more descriptors than are allowed, what is left unread: each with the last copy of
        a socket that lingers.
        """
        daemon = self.start()
        other = self.connect()
        others = []

        def sent(send):
            s, far = linger()
            others.append(far)
            with self.stopped(daemon):
                c = self.connect()
                send(c.socket, s)
                s.close()
            self.expect_quick(other)
            c.close()
            self.expect_quick(other)

        def ended(data, n=1, flags=0):
            def send(c, s):
                send_fds(c, data, [s] * n, flags)
                c.shutdown(socket.SHUT_WR)
            return send

        def behind_another(c, s):
            c.send(b'no message\0')
            send_fds(c, b'{"method":"' + INFO.encode() + b'"}\0', [s])

        def two_out_of_band(c, s):
            send_fds(c, b'x', [s], socket.MSG_OOB)
            send_fds(c, b'y', [s], socket.MSG_OOB)

        def twice(c, s):
            send_fds(c, b'{', [s])
            send_fds(c, b'{', [s])

        for send in (ended(b'x', flags=socket.MSG_OOB), ended(b'x'), ended(b'{}\0', 17),
                     ended(b'{}\0', 253), behind_another, two_out_of_band, twice):
            sent(send)
        self.expect_end(daemon)

    def test_garbage(self):
        """Sockets that hold each other, and one that lingers: the kernel collects them when it likes."""
        daemon = self.start()
        other = self.connect()
        for _ in range(20):
            s, far = linger()
            a, b = socket.socketpair()
            send_fds(b, b'x', [a, s])
            c = self.connect()
            with self.stopped(daemon):
                send_fds(c.socket, b'{"method":"' + INFO.encode() + b'"}\0', [a])
                for sock in (s, a, b):
                    sock.close()
            c.reply(INFO)
            c.close()
            self.expect_quick(other, 20)
            far.close()
        self.expect_end(daemon)

    def test_connections_over_the_limit(self):
        self.write(self.config, self.CONFIG + '[Limits]\nMaxClientsPerUser=16\n')
        daemon = self.start()

        def attack():
            kept = [Connection(self.path) for _ in range(16)]
            for c in kept:
                c.call(INFO)
            lingering = [linger() for _ in range(12)]
            yield
            with contextlib.suppress(ConnectionError):
                for s, _ in lingering:
                    c = Connection(self.path)
                    kept.append(c)
                    send_fds(c.socket, b'{', [s])
                    s.close()
            yield

        attacker = self.attack(attack)
        with self.stopped(daemon):
            attacker.go_on()
        self.expect_protected()
        self.expect_end(daemon)

    def test_contexts_that_linger(self):
        """Removed, and of holders that are killed."""
        daemon = self.start()

        def add(c, s):
            return c.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                          [s.fileno()])['context']

        def hold(lingering):
            c = Connection(self.path)
            c.call('org.pinbroker.Hello')
            file = open_file(c, os.path.join(self.dir, f'own-{os.getuid()}'))['file']
            for s, _ in lingering:
                c.call('org.pinbroker.Pin', {
                    'file': file, 'context': add(c, s), 'access': 'write',
                    'ranges': [{'offset': 0, 'length': PAGE}]})

        def attack():
            lingering = [linger() for _ in range(8)]
            reader, writer = os.pipe()
            holder = os.fork()
            if holder == 0:
                hold(lingering[:4])
                os.write(writer, b'x')
                signal.pause()
            equal(os.read(reader, 1), b'x')
            c = Connection(self.path)
            c.call('org.pinbroker.Hello')
            contexts = [add(c, s) for s, _ in lingering[4:]]
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            for s, _ in lingering:
                s.close()
            for context in contexts:
                c.call('org.pinbroker.RemoveContext', {'context': context})
            yield

        for uid in range(FIRST_UID, FIRST_UID + 10):
            os.chown(self.make_file(f'own-{uid}'), uid, uid)
            self.attack(attack, uid)
        self.expect_protected()
        self.expect_end(daemon)

    def test_closes_that_hang(self):
        """Twenty users have closes that hang for ever."""
        daemon = self.start()
        fuse = HangingFiles(os.path.join(self.dir, 'fuse'))

        def attack():
            # not before: whoever has it hangs when it ends
            fd = os.open(fuse.path, os.O_RDWR | os.O_CLOEXEC)
            c = Connection(self.path)
            c.call('org.pinbroker.Hello')
            for _ in range(4):
                c.call(INFO, {}, [fd])
            # its own other work is done all the same
            event = os.eventfd(0)
            context = c.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                             [event])['context']
            c.call('org.pinbroker.RemoveContext', {'context': context})
            c.call('org.pinbroker.Unpin', {'pins': []})
            yield

        for uid in range(FIRST_UID, FIRST_UID + 20):
            self.attack(attack, uid, fuse)
        fuse.wait_for_flushes(20)
        self.expect_protected()
        # what others send is closed
        reader, writer = os.pipe()
        other = self.connect()
        other.call(INFO, {}, [writer])
        os.close(writer)
        self.assertTrue(is_readable(reader, WAIT))
        equal(os.read(reader, 1), b'')
        os.close(reader)
        fuse.close()
        self.expect_end(daemon)


class Kept(LimitsCase):
    """What a user has kept, against its limits."""

    def descriptors(self, daemon):
        return len(os.listdir(f'/proc/{daemon.pid}/fd'))

    def resident(self, daemon):
        """KiB."""
        with open(f'/proc/{daemon.pid}/status', encoding='ascii') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmRSS'))

    def send_until_full(self, connection, data, fds=(), most=1 << 30, patience=0.3):
        """As often as it is taken, with time for the broker to take it; returns how often."""
        n, last = 0, time.monotonic()
        connection.socket.setblocking(False)
        while n < most and time.monotonic() < last + patience:
            try:
                send_fds(connection.socket, data, fds) if fds else connection.socket.send(data)
                n, last = n + 1, time.monotonic()
            except BlockingIOError:
                time.sleep(0.005)
        connection.socket.settimeout(WAIT)
        return n

    def test_closes_that_hang(self):
        """Descriptors whose closes hang are taken up to a limit, and from that connection no more."""
        daemon = self.start()
        before = self.descriptors(daemon)
        other = self.connect()
        fuse = HangingFiles(os.path.join(self.dir, 'fuse'))
        info = json.dumps({'method': INFO}).encode() + b'\0'

        def attack():
            fd = os.open(fuse.path, os.O_RDWR | os.O_CLOEXEC)
            null = os.open('/dev/null', os.O_RDWR)
            first = Connection(self.path)
            kept = []
            first.call('org.pinbroker.Hello')
            for _ in range(4):
                first.call(INFO, {}, [fd])
            for _ in range(4):
                c = Connection(self.path)
                kept.append((c, self.send_until_full(c, info, [null] * 16, 200)))
            # others of the same user go on
            for _ in range(100):
                first.call('org.pinbroker.Unpin', {'pins': []})
            yield sum(n for _, n in kept)
            for c, n in kept:
                for _ in range(n):
                    c.reply(INFO)
            yield

        attacker = self.attack(attack, fuse=fuse)
        self.assertLess(self.descriptors(daemon), before + 300)
        self.expect_quick(other)
        self.expect_served()
        # once there is room, they are answered
        fuse.close()
        attacker.go_on()
        self.expect_end(daemon)

    def test_half_messages(self):
        """Bytes of messages sent in part; a client that is to let go gets a large Unpin through."""
        self.write(self.config, '[Limits]\nMaxQueuedBytesPerUser=4M\n')
        daemon = self.start()
        before = self.resident(daemon)
        file = self.make_file('own')
        os.chown(file, NOBODY, NOBODY)

        def attack():
            holder = Holder(self.path, file)
            kept = []
            for _ in range(60):
                c = Connection(self.path)
                self.send_until_full(c, b'{' + b' ' * 32767, most=30, patience=0.03)
                kept.append(c)
            other = Connection(self.path)
            other.call(INFO)
            yield
            equal(holder.notice()['pins'], holder.pins)
            message = json.dumps({'method': 'org.pinbroker.Unpin',
                                  'parameters': {'pins': holder.pins}})
            holder.connection.send_bytes(b' ' * 900000 + message.encode() + b'\0')
            holder.connection.reply('org.pinbroker.Unpin')
            yield

        attack = self.attack(attack)
        self.assertLess(self.resident(daemon) - before, (60 * 128 + 8192) * SLOWNESS)  # a sanitizer keeps more
        _, result = self.truncate(file)
        attack.go_on()
        self.truncated(result)
        self.expect_end(daemon)

    def test_groups(self):
        """The kernel lets a process have 65,536, which would be kept for each connection and client."""
        daemon = self.start()

        def connect(n_groups):
            os.setgroups(range(FIRST_UID, FIRST_UID + n_groups))
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with contextlib.closing(Connection(self.path)) as connection:
                if n_groups <= GROUPS_MAX:
                    return connection.call(INFO)['product']
                answer = connection.receive()
                equal(connection.receive(), None)
                return answer['error'], answer['parameters']['cause']

        self.assertEqual(in_child(lambda: connect(GROUPS_MAX)), 'pinbrokerd')
        self.assertEqual(in_child(lambda: connect(GROUPS_MAX + 1)), ['org.pinbroker.NotAllowed', 'groups'])
        self.expect_end(daemon)

    def test_stopped_messages(self):
        """A connection that has stopped in the middle of a message gives way to others of its user."""
        self.write(self.config, '[Limits]\nMaxQueuedBytesPerUser=4M\n')
        daemon = self.start()
        before = self.resident(daemon)

        def attack():
            stopped = [Connection(self.path) for _ in range(8)]
            for c in stopped:
                self.send_until_full(c, b'{' + b' ' * 32767, most=30, patience=0.1)
            for _ in range(8):
                with contextlib.closing(Connection(self.path)) as other:
                    other.send_bytes(b' ' * 900000 + MESSAGE)
                    other.reply(INFO)
            # the first have made room
            answer = stopped[0].receive()
            equal(answer['error'], 'org.pinbroker.LimitExceeded')
            equal(answer['parameters']['limit'], 'MaxQueuedBytesPerUser')
            equal(stopped[0].receive(), None)
            yield

        self.attack(attack)
        daemon.wait_for_log('of uid 65534 has stopped in the middle of a message')
        self.assertLess(self.resident(daemon) - before, 24 * 1024 * SLOWNESS)
        self.expect_served()
        self.expect_end(daemon)

    def test_messages_of_many(self):
        """Each has a part of its message there, and no room is left for the rest of any: one after the other."""
        self.write(self.config, '[Limits]\nMaxQueuedBytesPerUser=4M\n')
        daemon = self.start()

        def attack():
            left = {Connection(self.path): b' ' * 900000 + MESSAGE for _ in range(24)}
            connections = list(left)
            for c in connections:
                c.socket.setblocking(False)
            end = time.monotonic() + WAIT
            while left and time.monotonic() < end:
                for c in list(left):
                    with contextlib.suppress(BlockingIOError):
                        left[c] = left[c][c.socket.send(left[c][:16384]):]
                    if not left[c]:
                        del left[c]
            equal(len(left), 0)
            for c in connections:
                c.socket.settimeout(WAIT)
                c.reply(INFO)
            yield

        self.attack(attack)
        self.assertNotIn('has stopped in the middle', daemon.text())
        self.expect_end(daemon)

    def test_unread_answers(self):
        """They wait, bounded, and calls with them; none is lost."""
        daemon = self.start()
        before = self.resident(daemon)
        method = 'org.varlink.service.GetInterfaceDescription'
        message = json.dumps({'method': method,
                              'parameters': {'interface': 'org.pinbroker'}}).encode() + b'\0'
        c = self.connect()
        n = self.send_until_full(c, message * 10) * 10
        self.assertLess(self.resident(daemon) - before, 2048 * SLOWNESS)  # a sanitizer keeps more
        # the last may have been taken in part
        c.socket.shutdown(socket.SHUT_WR)
        for _ in range(n - 10):
            c.reply(method)
        self.expect_end(daemon)

    def test_unread_descriptors(self):
        """Answers with descriptors that are not read."""
        daemon = self.start()
        c = self.connect()
        c.call('org.pinbroker.Hello')
        before = self.descriptors(daemon)
        fd = os.open(self.file, os.O_PATH | os.O_CLOEXEC)
        message = json.dumps({'method': 'org.pinbroker.OpenFile', 'parameters': {
            'fileDescriptor': 0, 'access': 'write'}}).encode() + b'\0'
        n = self.send_until_full(c, message, [fd], 100)
        os.close(fd)
        equal(n, 100)
        self.expect_quick(self.connect(), 1000)  # whatever it answers it has answered
        self.assertLess(self.descriptors(daemon), before + 50)
        taken = 0
        with self.stopped(daemon):
            while is_readable(c.socket, 0):
                c.reply('org.pinbroker.OpenFile')
                os.close(c.fds[0])
                taken += 1
        self.assertIn(taken, range(10, 40))
        for _ in range(n - taken):
            c.reply('org.pinbroker.OpenFile')
            os.close(c.fds[0])
        self.expect_end(daemon)

    def test_all_descriptors(self):
        """With most numbers in use no connection is accepted, and who is there goes on."""
        daemon = self.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE,
                                                                  (1024, 1024)))
        holder = self.hold()

        def attack():
            kept = [Connection(self.path) for _ in range(120)]
            yield len(kept)

        for uid in range(FIRST_UID, FIRST_UID + 4):
            self.attack(attack, uid)
        daemon.wait_for_log('Out of descriptors')
        self.assertLess(self.descriptors(daemon), 1024 - 253)
        file = self.make_file('another')
        open_file(holder.connection, file)
        self.expect_quick(holder.connection)
        _, result = self.truncate()
        holder.notice()
        holder.release()
        self.truncated(result)


if __name__ == '__main__':
    unittest.main()
