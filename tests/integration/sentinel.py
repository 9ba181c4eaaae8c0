#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that share a leased description, and use it against the daemon, or against each other: whatever
signal they choose, and whoever they send it to, the daemon lives, and others hear of their breaks in time.
"""

import contextlib
import os
import re
import resource
import select
import signal
import time
import unittest

from client import SLOWNESS, WAIT, Refused
from world import DAEMON, NOBODY, READY, Case, open_file

# Beside what the loop needs for it: a description is looked at so often.
DELAY = 0.1


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


def provoke(path):
    """A break by somebody who does not wait."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except BlockingIOError:
        return
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


class Sentinel(Case):
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
            self.assertLess(self.expect_heard(holder, self.file), DELAY * SLOWNESS)
            wait_until(lambda: os.getpgid(spare) == group, daemon.text)
            _, sentinel, spare = self.helpers(daemon)
            self.assertEqual(os.getpgid(sentinel), group)
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: state(spare) is None, daemon.text)
        os.kill(self.helpers(daemon)[1], signal.SIGKILL)
        self.assertLess(self.expect_heard(holder, self.file), DELAY * SLOWNESS)
        self.finish(daemon, holder)

    def test_overflow(self):
        """More breaks than there is room for: in the socket to the daemon, and in the queue of signals."""
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
            self.assertLess(self.expect_heard(holder, self.file), DELAY * SLOWNESS)
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
                    self.assertLess(self.expect_heard(holder, path), 1.5 * DELAY * SLOWNESS)
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


if __name__ == '__main__':
    signal.alarm(500)
    unittest.main(verbosity=2)
