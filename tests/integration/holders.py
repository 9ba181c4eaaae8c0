#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who of the holders is told, who is given time, and who is signalled (I8)."""

import ctypes
import json
import mmap
import os
import signal
import struct
import time
import traceback
import unittest
import warnings

from client import PAGE, WAIT, Connection, Ring, is_readable, truncate_in_child
from limits import HangingFiles
from world import DAEMON, NOBODY, READY, SIZE, Case, DeafManager, Holder, end_child, open_file

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 4, 8
CAP_SETUID = 7
REVOCATIONS = 'org.pinbroker.ListRevocations'


class Process:
    """A forked process that runs function(say, hear), with a pipe each way."""

    def __init__(self, case, function):
        self.events, said = os.pipe()
        commands, self.commands = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            warnings.simplefilter('ignore')  # nothing is closed before the process ends
            try:
                os.close(self.events)
                os.close(self.commands)
                function(lambda text: os.write(said, text.encode() + b'\n'),
                         lambda: os.read(commands, 1))
            except BaseException:  # pylint: disable=broad-except
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(said)
        os.close(commands)
        case.addCleanup(os.close, self.events)
        case.addCleanup(os.close, self.commands)
        case.addCleanup(end_child, self.pid)

    def hear(self):
        """Its next line; None: it has ended."""
        line = b''
        while not line.endswith(b'\n'):
            if not is_readable(self.events, WAIT):
                raise AssertionError('nothing is said')
            byte = os.read(self.events, 1)
            if not byte:
                return None
            line += byte
        return line.decode().rstrip()

    def tell(self):
        os.write(self.commands, b'.')


def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as after an exec


def become_nobody_for_now():
    """All its uids are another's, and it can take them back."""
    LIBC.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    become(NOBODY)
    header = struct.pack('Ii', 0x20080522, 0)
    LIBC.capset(header, struct.pack('6I', 1 << CAP_SETUID, 1 << CAP_SETUID, 0, 0, 0, 0))


class Holders(Case):
    def launch(self, config, env=None):
        os.chmod(self.dir, 0o755)
        self.write(self.config, config)
        manager = DeafManager(os.path.join(self.dir, f'ready-{time.monotonic_ns()}'))
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, **(env or {})})
        manager.wait_for(READY)
        manager.close()  # it keeps nothing: what is forked from here would have it, too
        return daemon

    def revocations(self):
        connection = Connection(self.path)
        try:
            return connection.list(REVOCATIONS)
        finally:
            connection.close()

    def wait_until(self, condition):
        end = time.monotonic() + WAIT
        while not condition():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.005)

    def test_breaker_that_holds_the_file(self):
        """It is forced at once; whoever else holds the file has its whole time."""
        os.chmod(self.file, 0o666)
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')

        def honest(say, hear):
            holder = Holder(self.path, self.file)
            say('holds')
            say(holder.notice()['conflict']['cause'])
            told = holder.notice()
            say(json.dumps(told))
            hear()
            holder.release()
            say('released')
            hear()

        def breaker(say, _):
            become(NOBODY)
            holder = Holder(self.path, self.file)
            say('holds')
            os.truncate(self.file, PAGE)
            say('truncated')
            del holder

        processes = [Process(self, function) for function in (honest, breaker)]
        self.assertEqual([p.hear() for p in processes], ['holds', 'holds'])
        self.assertEqual(processes[0].hear(), 'modify')
        told = json.loads(processes[0].hear())
        self.assertEqual(told['conflict']['pid'], processes[1].pid)
        # the breaker alone is made to let go
        self.assertIsNone(processes[1].hear())
        self.assertEqual(os.waitpid(processes[1].pid, 0)[1], signal.SIGBUS)
        daemon.wait_for_log(r'Sent SIGBUS to \S+ \(pid %d\)' % processes[1].pid)
        first = [r for r in self.revocations() if r['revocation'] == told['revocation']][0]
        self.assertEqual((first['state'], first['deadlineUSec']),
                         ('notified', told['deadlineUSec']))
        processes[0].tell()
        self.assertEqual(processes[0].hear(), 'released')
        self.wait_until(lambda: {r['state'] for r in self.revocations()} == {'released'})

    def test_second_breaker(self):
        """One that holds the file is forced also where another came before it."""
        os.chmod(self.file, 0o666)
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')

        def breaker(say, hear):
            become(NOBODY)
            holder = Holder(self.path, self.file)
            say('holds')
            hear()
            os.truncate(self.file, PAGE)
            del holder

        honest = self.hold()
        process = Process(self, breaker)
        self.assertEqual(process.hear(), 'holds')
        daemon.kill(signal.SIGSTOP)  # it sees both at once
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        first, result = self.truncate()
        self.wait_until(lambda: self.breakers() == [first])
        process.tell()
        self.wait_until(lambda: self.breakers() == [first, process.pid])
        daemon.kill(signal.SIGCONT)
        self.assertIsNone(process.hear())
        self.assertEqual(os.waitpid(process.pid, 0)[1], signal.SIGBUS)
        self.assertIn('notified', {r['state'] for r in self.revocations()})
        honest.release()
        self.truncated(result)

    @staticmethod
    def breakers():
        with open('/proc/locks', encoding='ascii') as f:
            return [int(line.split()[5]) for line in f if '-> LEASE  BREAKER' in line]

    def test_no_time_left_to_die(self):
        """A holder that SIGKILL does not end in time: the last step, too, ends before the kernel's patience."""
        self.set_lease_break_time(2)
        hanging = HangingFiles(os.path.join(self.dir, 'hanging'))
        self.addCleanup(hanging.close)
        self.launch('[Revocation]\nRevokeGraceSec=0\nSignalOnTimeout=none\n')

        def holder(say, _):
            pins = Holder(self.path, self.file)
            fd = os.open(hanging.path, os.O_RDWR)
            say('holds')
            os.close(fd)
            del pins

        process = Process(self, holder)
        self.addCleanup(hanging.close)  # before it is waited for
        self.assertEqual(process.hear(), 'holds')
        hanging.wait_for_flushes(1)
        _, result = self.truncate()
        self.wait_until(lambda: self.revocations() and 'endUSec' in self.revocations()[0])
        revocation = self.revocations()[0]  # another one is about what the truncate took
        self.assertEqual(revocation['state'], 'lost')
        self.assertLess(revocation['endUSec'] - revocation['startUSec'], 1.95e6)
        self.truncated(result)

    def test_one_signal_ends_several(self):
        """What another revocation's signal has ended is looked for, and not called lost."""
        files = [self.make_file(f'data-{i}') for i in range(8)]
        daemon = self.launch('[Revocation]\nRevokeGraceSec=200ms\nSignalGraceSec=5s\n')

        def holder(say, hear):
            holders = [Holder(self.path, file) for file in files]
            memory = bytearray(200 << 20)  # its end takes a while, after that of its descriptors
            say('holds')
            hear()
            del holders, memory

        process = Process(self, holder)
        self.assertEqual(process.hear(), 'holds')
        results = [self.truncate(file)[1] for file in files]
        for result in results:
            self.truncated(result)
        self.assertEqual(os.waitpid(process.pid, 0)[1], signal.SIGBUS)
        self.wait_until(lambda: all('endUSec' in r for r in self.revocations()))
        self.assertEqual([r['state'] for r in self.revocations()], ['released'] * 8, daemon.text())
        self.assertNotIn('still pinned', daemon.text())

    def test_manager(self):
        """The service manager is not process 1 everywhere. It is never signalled."""
        def manager(say, hear):
            daemon = self.launch('[Revocation]\nRevokeGraceSec=100ms\nSignalGraceSec=100ms\n',
                                 env={'MANAGERPID': str(os.getpid())})
            holder = Holder(self.path, self.file)
            pid, result = truncate_in_child(self.file, PAGE)
            self.wait_until(lambda: self.revocations() and 'endUSec' in self.revocations()[0])
            is_readable(result, WAIT)
            end_child(pid)
            say(self.revocations()[0]['state'])
            say(str('Sent SIG' in daemon.text()))
            daemon.close()
            hear()
            del holder

        # the pin stays, which is told when the kernel waits no longer: there is nobody whom a signal may end
        self.set_lease_break_time(2)
        process = Process(self, manager)
        self.assertEqual([process.hear(), process.hear()], ['lost', 'False'])
        self.assertEqual(os.waitpid(process.pid, os.WNOHANG), (0, 0))

    def test_another_user_by_then(self):
        """A holder that becomes root while it is looked for its context is not signalled any more."""
        os.chmod(self.file, 0o666)
        daemon = self.launch('[Revocation]\nRevokeGraceSec=100ms\nSignalGraceSec=2s\n', env={
            'LD_PRELOAD': os.environ['PAUSE_AT'], 'PAUSE_DIR': self.dir,
            'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':verify_asan_link_order=0'})

        def holder(say, hear):
            become_nobody_for_now()
            signal.signal(signal.SIGBUS, lambda *args: say('signal'))
            pins = Holder(self.path, self.file)
            say('holds')
            hear()
            os.setresuid(0, 0, 0)
            say('root')
            hear()
            del pins

        process = Process(self, holder)
        self.assertEqual(process.hear(), 'holds')
        self.truncate()
        self.assertEqual(process.hear(), 'signal')
        self.write(os.path.join(self.dir, 'armed'), '')
        self.wait_until(lambda: os.path.exists(os.path.join(self.dir, 'paused')))
        process.tell()
        self.assertEqual(process.hear(), 'root')
        self.write(os.path.join(self.dir, 'go'), '')
        daemon.wait_for_log('was sent no signal')
        self.assertEqual(os.waitpid(process.pid, os.WNOHANG), (0, 0))
        self.assertNotIn('Sent SIGKILL', daemon.text())

    def background(self, function, n=1):
        """Processes that go on with what their parent, which has ended, has connected for."""
        def parent(say, hear):
            holder = Holder(self.path, self.file)
            say('holds')
            hear()
            for _ in range(n):
                if os.fork() == 0:
                    function(holder, say, hear)
                    os._exit(0)

        process = Process(self, parent)
        self.assertEqual(process.hear(), 'holds')
        process.tell()
        self.assertEqual(os.waitpid(process.pid, 0)[1], 0)
        return process

    @staticmethod
    def let_go(holder, say, hear):
        say('there')
        say(holder.notice()['conflict']['cause'])
        hear()
        holder.release()
        say('let go')
        hear()

    @staticmethod
    def ignore(_, say, hear):
        say(str(os.getpid()))
        hear()

    def test_background(self):
        """It is told, and has the time that it needs."""
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')
        process = self.background(self.let_go)
        self.assertEqual(process.hear(), 'there')
        _, result = self.truncate()
        self.assertEqual(process.hear(), 'modify')
        daemon.wait_for_log('goes on in its place')
        self.assertEqual(self.revocations()[0]['state'], 'notified')
        process.tell()
        self.assertEqual(process.hear(), 'let go')
        self.truncated(result)
        self.assertEqual(self.revocations()[0]['state'], 'released')
        process.tell()

    def test_background_of_another_user(self):
        """Daemons give up what they may, once they have what they need."""
        def let_go(holder, say, hear):
            become(NOBODY)
            self.let_go(holder, say, hear)

        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')
        process = self.background(let_go)
        self.assertEqual(process.hear(), 'there')
        daemon.wait_for_log('still held by process')
        _, result = self.truncate()
        self.assertEqual(process.hear(), 'modify')
        self.assertEqual(self.revocations()[0]['state'], 'notified')
        process.tell()
        self.assertEqual(process.hear(), 'let go')
        self.truncated(result)
        process.tell()

    def test_background_without_connection(self):
        """Nobody can be told: no time is lost."""
        def ignore(holder, say, hear):
            holder.connection.close()
            holder.watch.close()
            self.ignore(holder, say, hear)

        self.launch('[Revocation]\nRevokeGraceSec=60s\n')
        process = self.background(ignore)
        self.assertTrue(process.hear())
        _, result = self.truncate()
        self.truncated(result)
        self.assertEqual(self.revocations()[0]['state'], 'released')

    def hold_ring(self, say, hear):
        """With an io_uring, which is closed on a word."""
        ring = Ring()
        connection = Connection(self.path)
        connection.call('org.pinbroker.Hello', {'name': 'holder'})
        file = open_file(connection, self.file)['file']
        memory = mmap.mmap(connection.fds[0], SIZE)
        context = connection.call('org.pinbroker.AddContext', {'remoteDescriptor': ring.fd})['context']
        pins = connection.call('org.pinbroker.Pin', {
            'file': file, 'context': context, 'access': 'write',
            'ranges': [{'offset': 0, 'length': SIZE}]})['pins']
        ring.register(ctypes.addressof(ctypes.c_char.from_buffer(memory)), SIZE)
        connection.call('org.pinbroker.Bind', {'pin': pins[0], 'handle': 0})
        say('holds')
        hear()
        os.close(ring.fd)
        say('closed')
        hear()
        say(json.dumps(connection.call('org.pinbroker.Unpin', {'pins': pins})['ended'] == pins))

    def test_closed_context(self):
        """A holder that is connected, but has closed its context, is not waited for, whenever it did that."""
        daemon = self.launch('[Revocation]\nRevokeGraceSec=60s\n')
        for early in (True, False):
            self.write(self.file, 'a' * SIZE)
            process = Process(self, self.hold_ring)
            self.assertEqual(process.hear(), 'holds')
            if early:
                process.tell()
                self.assertEqual(process.hear(), 'closed')
            _, result = self.truncate()
            if not early:
                self.assertFalse(is_readable(result, 0.5))
                process.tell()
                self.assertEqual(process.hear(), 'closed')
            self.truncated(result)
            revocation = self.revocations()[-1]
            self.assertEqual((revocation['state'], revocation['proof']), ('released', 'presumed'))
            process.tell()
            self.assertEqual(process.hear(), 'true')
        self.assertNotIn('Sent SIG', daemon.text())

    def test_background_ignores(self):
        """Whoever has the context is signalled, one after the other."""
        daemon = self.launch('[Revocation]\nRevokeGraceSec=200ms\nSignalGraceSec=10s\n')
        process = self.background(self.ignore, 2)
        pids = {int(process.hear()) for _ in range(2)}
        _, result = self.truncate()
        self.truncated(result)
        self.assertIsNone(process.hear())
        self.assertEqual(self.revocations()[0]['state'], 'released')
        for pid in pids:
            daemon.wait_for_log(rf'Sent SIGBUS to \S+ \(pid {pid}\)')


if __name__ == '__main__':
    unittest.main()
