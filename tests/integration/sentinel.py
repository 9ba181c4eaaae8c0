#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that share a leased description, and use it against the daemon, or against each other: whatever
signal they choose, and whoever they send it to, the daemon lives, and others hear of their breaks in time.
"""

import contextlib
import fcntl
import json
import os
import re
import resource
import select
import signal
import struct
import time
import unittest

from client import PAGE, SLOWNESS, WAIT, Connection, Refused, is_readable
from world import DAEMON, NOBODY, READY, Case, as_nobody, end_child, fork_nobody, in_child, open_file

F_SETSIG, F_SETOWN, F_SETOWN_EX, F_SETLEASE, F_NOTIFY = 10, 8, 15, 1024, 1026
F_OWNER_TID, F_OWNER_PID, F_OWNER_PGRP = range(3)
LEASE_SIGNAL = signal.SIGRTMIN
STRANGER = NOBODY - 1
# A description is looked at every 100 ms, without which it would be 5 s; the rest is for the machine.
LATE = 0.5 * SLOWNESS
ROUNDS = int(os.environ.get('PINBROKER_ROUNDS', '50'))


def processes(parent):
    """The children of a process: their names by pid."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f'/proc/{parent}/task/{parent}/children', encoding='ascii') as f:
            for pid in map(int, f.read().split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    with open(f'/proc/{pid}/comm', encoding='ascii') as comm:
                        found[pid] = comm.read().strip()
    return found


def state(pid):
    """As ps has it; None if there is no such process."""
    try:
        with open(f'/proc/{pid}/stat', encoding='ascii') as f:
            return f.read().rsplit(')', 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def wait_until(condition, what):
    """Of what no event tells."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what())
        time.sleep(0.001)


def provoke(path, sure=True):
    """A break by somebody who does not wait. Not sure: the file may be let go of already."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except BlockingIOError:
        return
    if sure:
        raise AssertionError('there is no lease')


class Many:
    """A client with a pin of each file."""

    def __init__(self, case, paths):
        self.connection, watch = case.connect(), case.connect()
        hello = self.connection.call('org.pinbroker.Hello')
        event = os.eventfd(0, os.EFD_CLOEXEC)
        context = self.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                       [event])['context']
        os.close(event)
        self.pins = []
        for path in paths:
            file = open_file(self.connection, path)['file']
            os.close(self.connection.fds[0])
            self.pins += self.connection.call('org.pinbroker.Pin', {
                'file': file, 'context': context, 'access': 'write',
                'ranges': [{'offset': 0, 'length': 1}]})['pins']
        watch.send('org.pinbroker.Watch', {'client': hello['client'], 'token': hello['token']},
                   more=True)
        self.watch = watch

    def noticed(self, n):
        """The files of the next notices."""
        return {self.watch.reply('org.pinbroker.Watch')[0]['notice']['path'] for _ in range(n)}

    def release(self):
        self.connection.call('org.pinbroker.Unpin', {'pins': self.pins})


class Tamperer:
    """A process that has the leased description, and does something to it. It is waited for until that is done; then
    it stays until it is disconnected.
    """

    def __init__(self, case, path, tamper, pinned=False):
        told, end = os.pipe()
        self.pid, self.answer = fork_nobody(lambda: self.run(case.path, path, tamper, pinned, end))
        os.close(end)
        case.addCleanup(self.answer.close)
        case.addCleanup(end_child, self.pid)
        with os.fdopen(told, 'rb', buffering=0) as f:
            if f.read(1) != b'x':
                raise AssertionError(self.answer.read())

    def run(self, address, path, tamper, pinned, end):
        with contextlib.closing(Connection(address)) as connection:
            connection.call('org.pinbroker.Hello')
            file = open_file(connection, path)['file']
            fd = connection.fds[0]
            if pinned:
                context = connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                          [os.eventfd(0, os.EFD_CLOEXEC)])['context']
                connection.call('org.pinbroker.Pin', {
                    'file': file, 'context': context, 'access': 'write',
                    'ranges': [{'offset': 0, 'length': PAGE}]})
            signal.signal(LEASE_SIGNAL, signal.SIG_IGN)
            tamper(fd)
            os.write(end, b'x')
            with contextlib.suppress(ConnectionResetError):
                while connection.receive() is not None:
                    pass
            if pinned:
                signal.pause()
            return 'disconnected'

    def expect_disconnected(self):
        answer = json.loads(self.answer.read())
        if answer != {'result': 'disconnected'}:
            raise AssertionError(answer)


def try_to_open(address, path):
    """What a newcomer is told."""
    with contextlib.closing(Connection(address)) as connection:
        connection.call('org.pinbroker.Hello')
        try:
            open_file(connection, path)
        except Refused as e:
            return [e.error, e.parameters.get('cause')]
    return []


CULPRIT = 'org.pinbroker.NotAllowed', 'tampered'
NEWCOMER = 'org.pinbroker.Busy', 'tampered'


class Shared(Case):
    def setUp(self):
        super().setUp()
        os.chmod(self.dir, 0o755)
        self.own = self.make_own('own')
        self.revocations = set()

    def make_own(self, name):
        """A file of nobody's."""
        path = self.make_file(name)
        os.chown(path, NOBODY, NOBODY)
        return path

    def helpers(self, daemon):
        """The keeper, the sentinel, the spare."""
        keepers = [pid for pid, name in processes(daemon.pid).items() if name == 'pb-keeper']
        self.assertEqual(len(keepers), 1, daemon.text())
        wait_until(lambda: len(processes(keepers[0])) == 2, lambda: processes(keepers[0]))
        pids = sorted(processes(keepers[0]), key=lambda pid: os.getpgid(pid) == os.getpgid(daemon.pid))
        self.assertNotEqual(os.getpgid(pids[0]), os.getpgid(daemon.pid))
        self.assertEqual(os.getpgid(pids[1]), os.getpgid(daemon.pid))
        return keepers[0], *pids

    def expect_heard(self, holder, path):
        """A break is, in time, and the holder holds again."""
        begin = time.monotonic()
        provoke(path)
        notice = holder.notice()
        while notice['revocation'] in self.revocations:  # more of one before
            notice = holder.notice()
        late = time.monotonic() - begin
        self.revocations.add(notice['revocation'])
        self.assertEqual(notice['path'], path)
        holder.release()
        wait_until(lambda: self.pinned(holder), lambda: 'it cannot be pinned again')
        return late

    def pinned(self, holder):
        try:
            holder.pins = holder.pin()
        except Refused as e:
            self.assertIn(e.error, ('org.pinbroker.RangeConflict', 'org.pinbroker.Busy'))
            return False
        return True

    def finish(self, daemon, holder):
        holder.release()
        self.expect_end(daemon)


class Sentinel(Shared):
    """The process that hears of breaks."""

    def test_no_privileges(self):
        """They can do nothing, and have nothing of the daemon's."""
        daemon = self.start()
        for pid in self.helpers(daemon):
            with open(f'/proc/{pid}/status', encoding='ascii') as f:
                status = dict(re.findall(r'(?m)^(\w+):\t(.*)$', f.read()))
            for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb'):
                self.assertEqual(int(status[name], 16), 0, name)
            self.assertEqual(status['Uid'].split(), ['0'] * 4)
            self.assertEqual(int(status['SigBlk'], 16), 2 ** 64 - 1 & ~(1 << 8 | 1 << 18))
            fds = sorted(os.readlink(f'/proc/{pid}/fd/{fd}').split(':')[0]
                         for fd in os.listdir(f'/proc/{pid}/fd'))
            self.assertEqual(fds, ['anon_inode', 'socket'])
        self.expect_end(daemon)

    def test_killed_and_stopped(self):
        """The spare takes its place, in the same group; what comes meanwhile is heard."""
        daemon = self.start()
        holder = self.hold()
        _, sentinel, spare = self.helpers(daemon)
        group = os.getpgid(sentinel)
        for sig in (signal.SIGKILL, signal.SIGSTOP) * 3:
            os.kill(sentinel, sig)
            self.assertLess(self.expect_heard(holder, self.file), LATE)
            wait_until(lambda: os.getpgid(spare) == group, daemon.text)
            _, sentinel, spare = self.helpers(daemon)
            self.assertEqual(os.getpgid(sentinel), group)
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: state(spare) is None, daemon.text)
        os.kill(self.helpers(daemon)[1], signal.SIGKILL)
        self.assertLess(self.expect_heard(holder, self.file), LATE)
        self.finish(daemon, holder)

    def test_overflow(self):
        """More breaks than there is room for: in the socket to the daemon, and in the queue of signals."""
        self.write(self.config, '[Revocation]\nRevokeGraceSec=30s\n')  # they are many
        daemon = self.start()
        keeper, sentinel, _ = self.helpers(daemon)
        for stopped, n, limit in (([daemon.pid], 500, None), ([keeper, sentinel], 20, 8)):
            with self.subTest(n):
                paths = [self.make_file(f'data-{n}-{i}') for i in range(n)]
                holders = Many(self, paths)
                if limit:
                    resource.prlimit(sentinel, resource.RLIMIT_SIGPENDING, (limit, limit))
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                    wait_until(lambda: state(pid) == 'T', lambda: state(pid))
                for path in paths:
                    provoke(path)
                for pid in reversed(stopped):
                    os.kill(pid, signal.SIGCONT)
                self.assertEqual(holders.noticed(n), set(paths))
                holders.release()
                daemon.wait_for_log('The signal queue overflowed')
        self.assertEqual(self.helpers(daemon)[1], sentinel)
        self.expect_end(daemon)

    def test_keeper_killed(self):
        """The daemon hears by itself then."""
        daemon = self.start()
        holder = self.hold()
        keeper, *others = self.helpers(daemon)
        os.kill(keeper, signal.SIGKILL)
        daemon.wait_for_log('have ended: until pinbrokerd is restarted')
        for pid in (keeper, *others):
            wait_until(lambda: state(pid) in (None, 'Z'), lambda: state(pid))
        for _ in range(3):
            self.assertLess(self.expect_heard(holder, self.file), LATE)
        self.finish(daemon, holder)

    def test_no_processes(self):
        """Without a sentinel it works, and says what is missing; without another one it is late at most."""
        preload = {'LD_PRELOAD': os.environ['REFUSE_FORK'],
                   'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':verify_asan_link_order=0'}
        for forks, log in (('0', 'Cannot start the process'), ('1', 'Cannot start the process'),
                           ('2', 'killed or stopped .* another one cannot be started')):
            with self.subTest(forks):
                self.manager = self.make_manager()
                daemon = self.spawn([DAEMON] + self.arguments(self.path), env={
                    'NOTIFY_SOCKET': self.manager.address, 'FORKS_ALLOWED': forks, **preload})
                self.manager.wait_for(READY)
                path = self.make_file(f'data-{forks}')
                holder = self.hold(file=path)
                if forks == '2':
                    keeper = next(iter(processes(daemon.pid)))
                    sentinel, = processes(keeper)
                    os.kill(sentinel, signal.SIGKILL)
                daemon.wait_for_log(log)
                for _ in range(3):
                    self.assertLess(self.expect_heard(holder, path), LATE)
                self.finish(daemon, holder)

    def test_killed(self):
        """It leaves nobody behind that a service manager would wait for, and the next run serves at once."""
        daemon = self.start()
        self.hold()
        pidfds = [os.pidfd_open(pid) for pid in self.helpers(daemon)]
        begin = time.monotonic()
        daemon.kill(signal.SIGKILL)
        poll = select.poll()
        for fd in pidfds:
            self.addCleanup(os.close, fd)
            poll.register(fd, select.POLLIN)
        while pidfds:
            ended = poll.poll(WAIT * 1000)
            self.assertTrue(ended, 'somebody is left behind')
            for fd, _ in ended:
                poll.unregister(fd)
                pidfds.remove(fd)
        self.assertNotEqual(daemon.wait(), 0)
        daemon = self.start()
        self.assertLess(time.monotonic() - begin, SLOWNESS)
        self.helpers(daemon)
        self.expect_end(daemon)


class Tampering(Shared):
    """What clients can do to a description that they share."""

    def setUp(self):
        super().setUp()
        self.daemon = self.start()
        self.honest = self.hold()  # of another file
        os.chmod(self.own, 0o666)

    def end(self, sharer=None):
        """It is as well as ever."""
        self.assertNotEqual(state(self.daemon.pid), 'T')
        if sharer:
            sharer.release()
        self.finish(self.daemon, self.honest)

    def test_every_signal(self):
        """Each is chosen for a break. Nobody else notices; whoever chose it is found out."""
        for number in range(65):
            with self.subTest(number):
                path = self.make_own(f'own-{number}')

                def choose(fd):
                    fcntl.fcntl(fd, F_SETSIG, number)
                    provoke(path, False)
                tamperer = Tamperer(self, path, choose)
                self.assertLess(self.expect_heard(self.honest, self.file), LATE)
                self.assertNotEqual(state(self.daemon.pid), 'T')
                if number != LEASE_SIGNAL:
                    tamperer.expect_disconnected()
        self.end()

    def owners(self):
        """Whom a client may name as the owner of the description."""
        _, sentinel, spare = self.helpers(self.daemon)

        def set_owner(who, pid):
            return lambda fd: fcntl.fcntl(fd, F_SETOWN_EX, struct.pack('ii', who, pid))
        for pid in (1, sentinel, spare, -os.getpgid(sentinel), self.daemon.pid):
            yield f'F_SETOWN {pid}', lambda fd, pid=pid: fcntl.fcntl(fd, F_SETOWN, pid)
        yield 'F_SETOWN to itself', lambda fd: fcntl.fcntl(fd, F_SETOWN, os.getpid())
        yield 'F_SETOWN_EX to itself', lambda fd: fcntl.fcntl(
            fd, F_SETOWN_EX, struct.pack('ii', F_OWNER_TID, os.getpid()))
        yield 'F_SETOWN_EX to the sentinel', set_owner(F_OWNER_PID, sentinel)
        yield 'F_SETOWN_EX to the group', set_owner(F_OWNER_PGRP, os.getpgid(sentinel))

    def test_every_owner(self):
        """Of a file that an honest client has pinned as well: it hears of a break all the same."""
        for i, (name, tamper) in enumerate(self.owners()):
            with self.subTest(name):
                path = self.make_own(f'own-{i}')
                os.chmod(path, 0o666)
                sharer = self.hold(file=path)

                def deafen(fd):
                    tamper(fd)
                    provoke(path)
                tamperer = Tamperer(self, path, deafen)
                begin = time.monotonic()
                self.assertEqual(sharer.notice()['path'], path)
                self.assertLess(time.monotonic() - begin, LATE)
                sharer.release()
                self.assertLess(self.expect_heard(self.honest, self.file), LATE)
                tamperer.expect_disconnected()
                self.assertEqual(as_nobody(lambda: try_to_open(self.path, path)), list(CULPRIT))
        self.end()

    def test_culprit(self):
        """Its pins go at once, with a signal; those of others stay. It may not pin again, and newcomers are not let
        in."""
        sharer = self.hold(file=self.own)
        tamperer = Tamperer(self, self.own, lambda fd: fcntl.fcntl(fd, F_SETOWN, os.getpid()), True)
        self.assertEqual(os.waitpid(tamperer.pid, 0)[1] & 0x7f, signal.SIGBUS)
        self.daemon.wait_for_log(r'which uid 65534 shares: .*\(F_SETOWN\)')
        wait_until(lambda: len(self.pins(self.own)) == 1, lambda: self.pins(self.own))
        self.assertEqual(self.pins(self.own)[0]['pin'], sharer.pins[0])
        self.assertFalse(is_readable(sharer.watch.socket, 0))
        self.assertEqual(as_nobody(lambda: try_to_open(self.path, self.own)), list(CULPRIT))
        self.expect_newcomer(self.own)
        self.assertEqual(try_to_open(self.path, self.own), [])  # another of a user who has it
        self.assertLess(self.expect_heard(sharer, self.own), LATE)
        self.end(sharer)

    def pins(self, path):
        with contextlib.closing(self.connect()) as connection:
            return [p for p in connection.list('org.pinbroker.ListPins') if p and p['path'] == path]

    def test_nobody_named(self):
        """F_SETSIG, and F_SETOWN to nobody, name nobody: all are asked to let go, and have their time."""
        for name, tamper in (('F_SETSIG', lambda fd: fcntl.fcntl(fd, F_SETSIG, signal.SIGKILL)),
                             ('F_SETOWN', lambda fd: fcntl.fcntl(fd, F_SETOWN, 0)),
                             ('F_SETOWN', lambda fd: fcntl.fcntl(fd, F_SETOWN_EX, bytes(8)))):
            with self.subTest(name):
                path = self.make_own(f'own-{time.monotonic_ns()}')
                os.chmod(path, 0o666)
                sharer = self.hold(file=path)
                Tamperer(self, path, tamper)
                begin = time.monotonic()
                notice = sharer.notice()
                self.assertLess(time.monotonic() - begin, LATE)
                self.assertIn(name, notice['conflict']['reason'])
                self.assertGreater(notice['deadlineUSec'] / 1e6 - time.monotonic(), 5)
                self.expect_newcomer(path)
                sharer.release()
        self.end()

    def expect_newcomer(self, path):
        """Who has not had it yet does not get it."""
        self.assertEqual(in_child(lambda: try_to_open(self.path, path), STRANGER), list(NEWCOMER))

    def test_given_up(self):
        """F_SETLEASE: the lease is taken again. Only the file's owner can have done it."""
        sharer = self.hold(file=self.own)
        tamperer = Tamperer(self, self.own,
                            lambda fd: fcntl.fcntl(fd, F_SETLEASE, fcntl.F_UNLCK))
        tamperer.expect_disconnected()
        self.assertLess(self.expect_heard(sharer, self.own), LATE)
        self.end(sharer)

    def test_taken_again(self):
        """F_SETLEASE once more, through the number that another lease has in the daemon: the break names that. It is
        the only user who shares the file, so that nothing but the hint tells."""
        decoy = self.hold(file=self.make_file('decoy'))
        number = next(int(fd) for fd in os.listdir(f'/proc/{self.daemon.pid}/fd')
                      if os.readlink(f'/proc/{self.daemon.pid}/fd/{fd}').endswith('/decoy'))
        sharer = self.hold(file=self.own)
        in_child(lambda: fcntl.fcntl(os.dup2(sharer.fd, number), F_SETLEASE, fcntl.F_WRLCK))
        self.assertLess(self.expect_heard(sharer, self.own), LATE)
        decoy.release()
        self.end(sharer)

    def test_of_no_avail(self):
        """F_NOTIFY is for directories, O_ASYNC for terminals and the like."""
        sharer = self.hold(file=self.own)

        def notify(fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
            with contextlib.suppress(NotADirectoryError):
                fcntl.fcntl(fd, F_NOTIFY, 0x3f)
                raise AssertionError('F_NOTIFY works on files')
        Tamperer(self, self.own, notify)
        self.assertLess(self.expect_heard(sharer, self.own), LATE)
        self.assertNotIn('F_SET', self.daemon.text())
        self.end(sharer)

    def test_again_and_again(self):
        """$PINBROKER_ROUNDS sentinels are killed, and as many stopped, just when others' files are broken."""
        late = []
        for i in range(ROUNDS):
            path = self.make_own(f'own-{i}')
            sig = (signal.SIGKILL, signal.SIGSTOP)[i % 2]

            def strike(fd):
                fcntl.fcntl(fd, F_SETSIG, sig)
                provoke(path, False)
            tamperer = Tamperer(self, path, strike)
            late.append(self.expect_heard(self.honest, self.file))
            end_child(tamperer.pid)
        late.sort()
        print(f'{ROUNDS} rounds: notices after {late[len(late) // 2] * 1e3:.2f} ms in the median, '
              f'{late[-1] * 1e3:.2f} ms at most')
        self.assertLess(late[-1], LATE)
        self.end()


if __name__ == '__main__':
    signal.alarm(500)
    unittest.main(verbosity=2)
