#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What outlives the daemon: a service manager keeps its descriptors, as systemd does, and starts it anew.
No lease lapses, breaks that came meanwhile are found, holders go on.
"""

import contextlib
import fcntl
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import unittest

from client import PAGE, SLOWNESS, WAIT, Connection, Refused, Ring, is_readable
from world import DAEMON, PASS_SOCKETS, READY, SIZE, Case, end_child, fork_nobody, open_file

F_SETOWN, F_GETLEASE = 8, 1025
RESTART = signal.SIGUSR1
DIGITS = '0123456789abcdefghijklmnopqrstuvwxyz'
RESTORED = r'Took up (\d+) pins? of (\d+) files? by (\d+) clients? .* (\d+) objects? lost'


def name(kind, number):
    """Of a descriptor in the store."""
    digits = ''
    while number:
        number, digit = divmod(number, 36)
        digits = DIGITS[digit] + digits
    return kind + digits


class Survivor:
    """A client that resumes; its pins are of one file, through an eventfd, which can be kept, or an io_uring,
    which cannot.
    """

    def __init__(self, path, file, access='write', ring=False):
        self.path, self.data, self.access = path, file, access
        self.fd, self.ring, self.pins = None, Ring() if ring else None, []
        self.connection = Connection(path)
        try:
            self.open()
        except BaseException:
            self.close()
            raise

    def open(self):
        hello = self.connection.call('org.pinbroker.Hello',
                                     {'name': 'survivor', 'busName': ':1.42'})
        self.client, self.token = hello['client'], hello['token']
        fd = os.open(self.data, os.O_PATH | os.O_CLOEXEC)
        try:
            self.file = self.connection.call('org.pinbroker.OpenFile', {
                'fileDescriptor': 0, 'access': self.access}, [fd])['file']
        finally:
            os.close(fd)
        self.fd = self.connection.fds[0]
        if self.ring:
            self.context = self.connection.call('org.pinbroker.AddContext', {
                'remoteDescriptor': self.ring.fd, 'label': 'ring'})['context']
        else:
            event = os.eventfd(0, os.EFD_CLOEXEC)
            self.context = self.connection.call('org.pinbroker.AddContext', {
                'fileDescriptor': 0, 'label': 'event'}, [event])['context']
            os.close(event)

    def pin(self, offset=0, length=PAGE, label=None, on_demand=False):
        pins = self.connection.call('org.pinbroker.Pin', {
            'file': self.file, 'context': self.context, 'access': self.access, 'label': label,
            'onDemand': on_demand, 'ranges': [{'offset': offset, 'length': length}]})['pins']
        self.pins += pins
        return pins[0]

    def resume(self):
        """The old connection goes only then: one who has neither pins nor connections is forgotten."""
        old, self.connection = self.connection, Connection(self.path)
        try:
            return self.connection.call('org.pinbroker.Resume',
                                        {'client': self.client, 'token': self.token})['notices']
        finally:
            old.close()

    def watch(self):
        watch = Connection(self.path)
        watch.send('org.pinbroker.Watch', {'client': self.client, 'token': self.token}, more=True)
        return watch

    def unpin(self, pins=None):
        pins = self.pins if pins is None else pins
        return self.connection.call('org.pinbroker.Unpin', {'pins': pins})['ended']

    def listed(self):
        c = self.connection
        return (c.list('org.pinbroker.ListPins', {'client': self.client}),
                [{key: value for key, value in f.items() if key not in ('lease', 'settledUSec')}
                 for f in c.list('org.pinbroker.ListFiles')],
                c.list('org.pinbroker.ListContexts', {'client': self.client}),
                c.list('org.pinbroker.ListClients'))

    def close(self):
        self.connection.close()
        if self.fd is not None:
            os.close(self.fd)
        if self.ring:
            os.close(self.ring.fd)


class Restart(Case):
    def setUp(self):
        super().setUp()
        self.state = self.path + '.state'
        self.store = self.make_manager()
        self.listener = self.listen()
        self.daemon = None

    def run_daemon(self, env=None, may_end=False):
        """As systemd starts it: with the socket, and what is in the store."""
        self.store.catch_up()
        with self.store.changed:
            kept = dict(self.store.kept)
            self.store.messages.clear()
        fds = [self.listener.fileno(), *kept.values()]
        names = ':'.join(['pinbrokerd.socket', *kept])
        argv = [sys.executable, '-ISc', PASS_SOCKETS, str(len(fds)), *map(str, fds), DAEMON]
        self.daemon = self.spawn(argv + self.arguments(), pass_fds=fds, env={
            'NOTIFY_SOCKET': self.store.address, 'LISTEN_FDNAMES': names, **(env or {})})
        with self.store.changed:
            while (not any(READY.search(m) for m in self.store.messages) and
                   self.daemon.process.poll() is None):  # of its end the store is not told
                self.store.changed.wait(0.05)
        if not may_end:
            self.assertIsNone(self.daemon.process.poll(), self.daemon.text())
        return self.daemon

    def end_daemon(self, sig=signal.SIGKILL):
        self.daemon.kill(sig)
        self.assertEqual(self.daemon.wait(), -sig if sig == signal.SIGKILL else 0,
                         self.daemon.text())

    def restart(self, sig=signal.SIGKILL):
        self.end_daemon(sig)
        return self.run_daemon()

    def survivor(self, *args, **kwargs):
        survivor = Survivor(self.path, *args, **kwargs)
        self.addCleanup(survivor.close)
        return survivor

    def expect_restored(self, pins, files, clients, lost=0):
        self.daemon.wait_for_log(RESTORED)
        match = re.search(RESTORED, self.daemon.text())
        self.assertEqual(tuple(map(int, match.groups())), (pins, files, clients, lost),
                         self.daemon.text())

    def wait_for_kept(self, names):
        self.store.wait_until(lambda: set(self.store.kept) == names)

    def lease(self, file):
        with contextlib.closing(Connection(self.path)) as connection:
            listed = connection.list('org.pinbroker.ListFiles')
        return next(f['lease'] for f in listed if f['path'] == file)

    def wait_for_lease(self, file, state):
        end = time.monotonic() + WAIT
        while self.lease(file) != state:  # of this no event tells
            self.assertLess(time.monotonic(), end, self.lease(file))

    def test_everything_is_there_again(self):
        self.run_daemon()
        survivor = self.survivor(self.file, ring=True)
        survivor.pin(0, PAGE, 'with a label = of %41 words')
        pin = survivor.pin(PAGE, 2 * PAGE)
        mapping = self.register(survivor)
        survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
        reader = self.make_file('read only')
        other = self.survivor(reader, 'read')
        other.pin(8 * PAGE, PAGE)
        before, before_other = survivor.listed(), other.listed()
        for sig in (signal.SIGKILL, RESTART, signal.SIGKILL):
            self.restart(sig)
            self.expect_restored(3, 2, 2)
            self.assertEqual(survivor.resume(), [])
            self.assertEqual(other.resume(), [])
            self.assertEqual(survivor.listed(), before)
            self.assertEqual(other.listed(), before_other)
        # what is made now has a number of its own
        self.assertGreater(survivor.pin(4 * PAGE), max(survivor.pins[:-1]))
        # and the old rules hold
        with self.assertRaises(Refused) as refused:
            survivor.connection.call('org.pinbroker.CloseFile', {'file': survivor.file})
        self.assertEqual(refused.exception.error, 'org.pinbroker.Busy')
        del mapping
        self.assertEqual(survivor.unpin(), [])
        survivor.connection.call('org.pinbroker.CloseFile', {'file': survivor.file})
        survivor.connection.call('org.pinbroker.RemoveContext', {'context': survivor.context})

    def register(self, survivor):
        """A buffer for the second pin; it is unregistered when the ring goes."""
        import ctypes
        import mmap
        mapping = mmap.mmap(survivor.fd, SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        survivor.ring.register(address + PAGE, 2 * PAGE)
        return mapping

    def test_shared_with_somebody_who_has_gone(self):
        """Its copy of the description is still looked after: it could keep others from hearing of breaks."""
        os.chmod(self.dir, 0o755)
        os.chmod(self.file, 0o666)
        os.chmod(self.path, 0o666)
        self.run_daemon()
        survivor = self.survivor(self.file)
        survivor.pin()
        pid, copy = self.start_copier()
        end = time.monotonic() + WAIT
        while len(survivor.connection.list('org.pinbroker.ListClients')) > 1:
            self.assertLess(time.monotonic(), end)
        self.restart()
        self.expect_restored(1, 1, 1)
        self.assertEqual(survivor.resume(), [])
        with contextlib.closing(survivor.watch()) as watch:
            os.write(copy, b'x')
            self.assertEqual(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_status, 0)
            _, result = self.truncate()
            begin = time.monotonic()
            self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['pins'], survivor.pins)
            self.assertLess(time.monotonic() - begin, SLOWNESS)
            survivor.unpin()
            self.truncated(result)
        self.daemon.wait_for_log(r'shares: .*\(F_SETOWN\)')

    def start_copier(self):
        """A process of nobody's that had the file open, keeps its copy, and is told when to use it."""
        told, tell = os.pipe()
        ready, end = os.pipe()

        def copy():
            os.close(tell)
            with contextlib.closing(Connection(self.path)) as connection:
                connection.call('org.pinbroker.Hello')
                open_file(connection, self.file)
                fd = connection.fds[0]
            os.write(end, b'x')
            os.read(told, 1)
            fcntl.fcntl(fd, F_SETOWN, os.getpid())
        pid, answer = fork_nobody(copy)
        self.addCleanup(answer.close)
        self.addCleanup(end_child, pid)
        self.addCleanup(os.close, tell)
        os.close(told)
        os.close(end)
        said = os.read(ready, 1)
        os.close(ready)
        self.assertEqual(said, b'x', said or answer.read())
        return pid, tell

    def test_break_meanwhile(self):
        """Somebody truncates while nobody is there: he waits, and the holder learns of it on his return."""
        for access in ('write', 'read'):
            with self.subTest(access):
                file = self.make_file(f'data-{access}')
                self.run_daemon()
                survivor = self.survivor(file, access)
                survivor.pin()
                self.end_daemon()
                _, result = self.truncate(file)
                self.wait_for_break()
                self.assertFalse(is_readable(result, 0))
                self.run_daemon()
                self.daemon.wait_for_log('Revocation .* started')
                notices = survivor.resume()
                self.assertEqual([n['pins'] for n in notices], [survivor.pins])
                self.assertEqual(notices[0]['conflict']['cause'] in ('modify', 'truncate'), True)
                self.assertFalse(is_readable(result, 0))
                self.assertEqual(survivor.unpin(), [])
                self.truncated(result)
                self.end_daemon(signal.SIGTERM)

    def wait_for_break(self):
        """Of the breaker's waiting no event tells but to the lease's owner, who is dead."""
        fd = next(fd for name, fd in self.store.kept.items() if name[0] == 'f')
        end = time.monotonic() + WAIT
        while fcntl.fcntl(fd, F_GETLEASE) != fcntl.F_UNLCK:
            self.assertLess(time.monotonic(), end)

    def test_break_afterwards(self):
        """Leases signal the new daemon, whatever had become of them before."""
        self.set_lease_break_time(1)
        for access, state in (('read', 'read'), ('write', 'settling'), ('write', 'settled')):
            with self.subTest(state):
                file = self.make_file(f'data-{state}')
                self.run_daemon()
                survivor = self.survivor(file, access)
                survivor.pin()
                if state != 'settling':
                    self.wait_for_lease(file, state)
                self.restart(RESTART)
                self.assertEqual(survivor.resume(), [])
                if state == 'settling':
                    self.wait_for_lease(file, 'settled')
                self.set_lease_break_time(45)
                watch = survivor.watch()
                begin = time.monotonic()
                _, result = self.truncate(file)
                notice = watch.reply('org.pinbroker.Watch')[0]['notice']
                # a signal told, and not the audit, which comes every 5 s
                self.assertLess(time.monotonic() - begin, 2)
                self.assertEqual(notice['pins'], survivor.pins)
                survivor.unpin()
                self.truncated(result)
                watch.close()
                self.end_daemon(signal.SIGTERM)
                self.set_lease_break_time(1)

    def test_little_time_left(self):
        """What has gone by of the kernel's time is not given away twice."""
        self.set_lease_break_time(45)
        self.run_daemon()
        survivor = self.survivor(self.file)
        survivor.pin()
        self.end_daemon()
        _, result = self.truncate()
        self.wait_for_break()
        # nobody was awake for 30 s, says the file
        then = time.time() - 30
        os.utime(self.state, (then, then))
        self.run_daemon()
        self.daemon.wait_for_log('What is left of the kernel.s lease-break-time, 1[0-4].\d s, is too short')
        notices = survivor.resume()
        self.assertLess(notices[0]['deadlineUSec'] / 1e6 - time.monotonic(), 9)
        survivor.unpin()
        self.truncated(result)

    def test_given_up_meanwhile(self):
        """A client without pins that asks for too long, and then asks again, is known still."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        self.end_daemon()
        survivor.connection.close()
        for _ in range(2):
            with contextlib.closing(Connection(self.path)) as impatient:
                impatient.send('org.pinbroker.Resume',
                               {'client': survivor.client, 'token': survivor.token})
        self.run_daemon()
        self.expect_restored(0, 1, 1)
        self.assertEqual(survivor.resume(), [])
        # its death is its end as ever
        pid = os.fork()
        if pid == 0:
            try:
                Survivor(self.path, self.make_file('other'))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        with contextlib.closing(Connection(self.path)) as connection:
            end = time.monotonic() + WAIT
            while len(connection.list('org.pinbroker.ListClients')) > 1:
                self.assertLess(time.monotonic(), end)

    def test_holder_died_meanwhile(self):
        self.run_daemon()
        pid = os.fork()
        if pid == 0:
            try:
                Survivor(self.path, self.file).pin()
                signal.pause()
            finally:
                os._exit(0)
        self.wait_for_pin('reserved')
        self.end_daemon()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.store.catch_up()
        self.assertEqual(len(self.store.kept), 2)
        _, result = self.truncate()
        self.run_daemon()
        self.daemon.wait_for_log('died with 1 pin;')
        self.truncated(result)
        self.store.wait_until(lambda: not self.store.kept)
        self.assertEqual(self.connect().list('org.pinbroker.ListClients'), [])

    def wait_for_pin(self, state):
        end = time.monotonic() + WAIT
        with contextlib.closing(Connection(self.path)) as connection:
            while [p['state'] for p in connection.list('org.pinbroker.ListPins')] != [state]:
                self.assertLess(time.monotonic(), end)

    def test_ended_by_force(self):
        """A pin that was destroyed is named as such after a restart, too."""
        self.write(self.config, '[Revocation]\nRevokeGraceSec=0\n')
        self.run_daemon()
        survivor = self.survivor(self.file, ring=True)
        pin = survivor.pin(PAGE, 2 * PAGE)
        mapping = self.register(survivor)
        survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
        _, result = self.truncate()
        self.truncated(result)
        self.restart()
        self.expect_restored(0, 1, 1)
        survivor.resume()
        self.assertEqual(survivor.unpin(), [pin])
        del mapping

    def test_destroyed(self):
        """What was destroyed under a pin that has not ended is named as such, however often it ends meanwhile."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        pins = [survivor.pin(), survivor.pin(PAGE)]
        self.end_daemon()
        with open(self.state, encoding='ascii') as f:
            text = f.read()
        line = f'pin id={pins[0]} '
        self.assertIn('\n' + line, text)
        self.write(self.state, text.replace(line, line + 'destroyed=1 '))
        for _ in range(2):
            self.run_daemon()
            self.expect_restored(2, 1, 1)
            self.end_daemon()
        self.run_daemon()
        survivor.resume()
        self.assertEqual(survivor.unpin(), pins[:1])

    def test_limits(self):
        """What is taken up counts, and is the most that there can be."""
        self.write(self.config, '[Limits]\nMaxPinsPerUser=2\n')
        self.run_daemon()
        survivor = self.survivor(self.file)
        survivor.pin()
        survivor.pin(PAGE)
        self.restart()
        self.expect_restored(2, 1, 1)
        survivor.resume()
        with self.assertRaises(Refused) as refused:
            survivor.pin(2 * PAGE)
        self.assertEqual(refused.exception.parameters, {'limit': 'MaxPinsPerUser', 'maximum': 2, 'used': 2})
        survivor.unpin()
        survivor.pins.clear()
        survivor.pin(2 * PAGE)
        survivor.unpin()

    def test_leaving(self):
        """A pin that was let go of and was not gone yet is its holder's no more, and still waited for."""
        self.run_daemon()
        survivor = self.survivor(self.file, ring=True)
        pin = survivor.pin(PAGE, 2 * PAGE)
        mapping = self.register(survivor)
        survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
        watch = survivor.watch()
        _, result = self.truncate()
        watch.reply('org.pinbroker.Watch')
        watch.close()
        survivor.unpin()
        self.wait_for_pin('leaving')
        self.restart()
        self.expect_restored(1, 1, 1)
        survivor.resume()
        self.wait_for_pin('leaving')
        with self.assertRaises(Refused) as refused:
            survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
        self.assertEqual(refused.exception.error, 'org.pinbroker.NoSuchObject')
        self.assertFalse(is_readable(result, 0))
        survivor.ring.unregister()
        self.truncated(result)
        del mapping

    def test_on_demand(self):
        """What its holder had been told of is told again, until it binds anew; nobody waits for it."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        pin = survivor.pin(PAGE, on_demand=True)
        _, result = self.truncate()
        self.truncated(result)
        end = time.monotonic() + WAIT
        while not (told := survivor.resume()) or told[0]['conflict']['cause'] != 'shrink':
            self.assertLess(time.monotonic(), end, told)
        for sig in (signal.SIGKILL, RESTART):
            self.restart(sig)
            self.expect_restored(1, 1, 1)
            (notice,) = survivor.resume()
            self.assertEqual((notice['revocation'], notice['pins']), (told[0]['revocation'], [pin]))
            self.assertEqual([p['onDemand'] for p in survivor.listed()[0]], [True])
        survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 1})
        self.restart()
        self.assertEqual(survivor.resume(), [])
        watch = survivor.watch()
        _, result = self.truncate()
        self.truncated(result)
        notice = watch.reply('org.pinbroker.Watch')[0]['notice']
        self.assertEqual((notice['pins'], notice['conflict']['cause']), ([pin], 'modify'))
        survivor.unpin()
        watch.close()

    def test_what_is_let_go_leaves_the_store(self):
        self.run_daemon()
        survivor = self.survivor(self.file)
        self.store.wait_until(lambda: sorted(name[0] for name in self.store.kept) == ['c', 'f'])
        survivor.pin()
        survivor.unpin()
        survivor.connection.call('org.pinbroker.CloseFile', {'file': survivor.file})
        self.store.wait_until(lambda: [name[0] for name in self.store.kept] == ['c'])
        survivor.connection.call('org.pinbroker.RemoveContext', {'context': survivor.context})
        self.store.wait_until(lambda: not self.store.kept)
        self.restart()
        self.expect_restored(0, 0, 1)
        survivor.resume()

        # a stop lets everything go, and leaves nothing behind
        survivor = self.survivor(self.make_file('more'))
        survivor.pin()
        watch = survivor.watch()
        self.daemon.kill(signal.SIGTERM)
        self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['conflict']['cause'],
                         'shutdown')
        survivor.unpin()
        self.assertEqual(self.daemon.wait(), 0)
        watch.close()
        self.assertFalse(os.path.exists(self.state))
        self.store.wait_until(lambda: not self.store.kept)

    def test_lingering_context(self):
        """The manager is not given what could keep it waiting when it closes it; the pin outlives that."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as lingering:
            context = survivor.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                               [lingering.fileno()])['context']
            ring, survivor.context = survivor.context, context
            survivor.pin()
            self.store.catch_up()
            self.assertEqual(len(self.store.kept), 2)
            self.restart()
            self.expect_restored(1, 1, 1)
            self.daemon.wait_for_log(f'Context {context} was not kept')
            survivor.resume()
            with self.assertRaises(Refused) as refused:
                survivor.pin()
            self.assertEqual(refused.exception.parameters['cause'], 'closed')
            watch = survivor.watch()
            _, result = self.truncate()
            self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['pins'], survivor.pins)
            survivor.unpin()
            self.truncated(result)
            watch.close()
        survivor.context = ring

    def lose(self, survivors):
        """The daemon ends in a way after which nothing of these files is kept."""
        self.end_daemon()
        for survivor in survivors:
            os.close(self.store.kept.pop(name('f', survivor.file)))

    def test_lost(self):
        """Who resumes is told what nothing protects any more, until he has let go of it, and however often
        the daemon ends meanwhile.
        """
        self.run_daemon()
        survivor, other = self.survivor(self.file), self.survivor(self.make_file('other'))
        idle = self.survivor(self.make_file('idle'))
        pins = [survivor.pin(i * PAGE) for i in range(3)]
        other.pin()
        survivor.connection.call('org.pinbroker.Bind', {'pin': pins[1], 'handle': 7})
        self.lose([survivor, idle])
        self.run_daemon()
        self.expect_restored(1, 1, 3, 5)
        for pin in pins:
            self.daemon.wait_for_log(f'Pin {pin} of .* was lost .* nothing protects {self.file} any more')
        self.assertEqual(other.resume(), [])
        for sig in (signal.SIGKILL, RESTART, None):
            (notice,) = survivor.resume()
            self.assertEqual((notice['conflict']['cause'], notice['file'], notice['path'], notice['pins']),
                             ('lost', survivor.file, self.file, pins))
            (told,) = idle.resume()
            self.assertEqual((told['conflict']['cause'], told['file'], told['path'], told['pins']),
                             ('lost', idle.file, idle.data, []))
            watch = survivor.watch()
            self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['pins'], pins)
            watch.close()
            if sig:
                self.restart(sig)
                self.expect_restored(1, 1, 3)  # that it was lost has been said
        self.assertNotEqual(notice['revocation'], told['revocation'])
        self.assertEqual(survivor.listed()[0], [])
        for call in (lambda: survivor.pin(),
                     lambda: survivor.connection.call('org.pinbroker.Bind', {'pin': pins[0], 'handle': 1})):
            with self.assertRaises(Refused) as refused:
                call()
            self.assertEqual(refused.exception.error, 'org.pinbroker.Revoked')
        # nobody has touched what was registered: it is for the holder to deregister
        self.assertEqual(survivor.unpin(pins[:2]), [])
        self.restart()
        self.assertEqual([n['pins'] for n in survivor.resume()], [pins[2:]])
        self.assertEqual(survivor.unpin(pins[2:]), [])
        self.assertEqual([n['pins'] for n in survivor.resume()], [[]])
        survivor.connection.call('org.pinbroker.CloseFile', {'file': survivor.file})
        self.assertEqual(survivor.resume(), [])
        self.restart()
        self.assertEqual(survivor.resume(), [])
        # and the file can be opened again, and pinned
        os.close(survivor.fd)
        survivor.open()
        survivor.pin()
        _, result = self.truncate()
        self.assertFalse(is_readable(result, 0.1))
        survivor.unpin(survivor.pins[-1:])
        self.truncated(result)

    def test_lost_by_the_library(self):
        """A program's callback hears of it."""
        self.run_daemon()
        ctl = os.path.join(os.environ['BUILD_ROOT'], 'client', 'pinbrokerctl')
        holder = self.spawn([ctl, '--socket', self.path, 'hold', '--access', 'write', self.file],
                            env={'PINBROKER_BUS': self.address})
        self.assertRegex(holder.process.stdout.readline(), f'^holding {self.file} pin ')
        self.end_daemon()
        for kept in [n for n in self.store.kept if n[0] == 'f']:
            os.close(self.store.kept.pop(kept))
        self.run_daemon()
        self.assertRegex(holder.process.stdout.readline(), f'^revoked {self.file} pins .* cause lost')
        self.assertRegex(holder.process.stdout.readline(), f'^released {self.file} pin ')
        self.assertEqual(holder.wait(), 0)

    def test_lost_in_part(self):
        """Of a file that is there a pin that cannot be read is lost."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        lost, pin = survivor.pin(), survivor.pin(PAGE)
        self.end_daemon()
        with open(self.state, encoding='utf-8') as f:
            state = f.read()
        self.write(self.state, re.sub(rf'(?m)^(pin id={lost} .* offset=)\d+', r'\1nowhere', state))
        self.run_daemon()
        self.expect_restored(1, 1, 1, 1)
        for _ in range(2):
            (notice,) = survivor.resume()
            self.assertEqual((notice['conflict']['cause'], notice['file'], notice['pins']),
                             ('lost', survivor.file, [lost]))
            self.restart()
        survivor.resume()
        self.assertEqual(survivor.unpin([lost, pin]), [])
        self.assertEqual(survivor.resume(), [])

    def test_killed_while_opening(self):
        """What nobody had been told of is not lost."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        blocked = self.make_file('blocked')
        fd = os.open(blocked, os.O_RDWR)
        path = os.open(blocked, os.O_PATH)
        connection = self.connect()
        connection.call('org.pinbroker.Hello')
        # the lease cannot be had while that is open: it tries for a while
        connection.send('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'write'}, [path])
        end = time.monotonic() + WAIT
        while True:
            with open(self.state, encoding='utf-8') as f:
                if blocked in f.read():
                    break
            self.assertLess(time.monotonic(), end)
        self.end_daemon()
        os.close(fd)
        os.close(path)
        self.run_daemon()
        self.expect_restored(0, 1, 2)
        self.assertEqual(survivor.resume(), [])

    def test_context_added_twice(self):
        """The manager keeps one of two that are alike: it is both contexts', and whose name it has may go first."""
        self.run_daemon()
        survivor, other = self.survivor(self.file), self.survivor(self.make_file('other'))
        event = os.eventfd(0, os.EFD_CLOEXEC)
        self.addCleanup(os.close, event)

        def add(holder):
            return holder.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                          [event])['context']
        first, second, third = add(survivor), add(survivor), add(other)
        kept = {name('c', s.context) for s in (survivor, other)}
        kept |= {name('f', s.file) for s in (survivor, other)} | {name('c', first)}
        self.wait_for_kept(kept)
        for gone in (None, first, second):
            if gone:
                survivor.connection.call('org.pinbroker.RemoveContext', {'context': gone})
            for sig in (signal.SIGKILL, RESTART):
                self.restart(sig)
                self.expect_restored(0, 2, 2)
                self.assertNotIn('was not kept', self.daemon.text())
                survivor.resume()
                other.resume()
                self.wait_for_kept(kept)
        other.context = third
        pin = other.pin()
        self.restart()
        other.resume()
        _, result = self.truncate(other.data)
        self.assertFalse(is_readable(result, 0.1))
        other.unpin([pin])
        self.truncated(result)
        other.connection.call('org.pinbroker.RemoveContext', {'context': third})
        self.wait_for_kept(kept - {name('c', first)})

    def test_full_store(self):
        """What finds no room is served all the same, and said."""
        self.run_daemon(env={'FDSTORE': '2'})
        first = self.survivor(self.file)
        first.pin()
        second = self.survivor(self.make_file('second'))
        self.daemon.wait_for_log('store is full with 2 descriptors')
        second.pin()
        first.unpin()
        first.connection.call('org.pinbroker.CloseFile', {'file': first.file})
        first.connection.call('org.pinbroker.RemoveContext', {'context': first.context})
        # there is room again: the audit finds that
        self.wait_for_kept({name('c', second.context), name('f', second.file)})
        self.end_daemon()
        _, result = self.truncate(second.data)
        self.assertFalse(is_readable(result, 0.2))
        self.run_daemon()
        self.assertEqual(second.resume()[0]['pins'], second.pins)
        second.unpin()
        self.truncated(result)

    def test_told_before_answered(self):
        """Who has a file or context is told so once the manager has its descriptor: what is lost with the daemon
        until then nobody knew of.
        """
        self.run_daemon()
        survivor = self.survivor(self.file)
        other = self.make_file('other')

        def open_other():
            fd = os.open(other, os.O_PATH)
            survivor.connection.send('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'write'}, [fd])
            os.close(fd)

        def add_context():
            event = os.eventfd(0)
            survivor.connection.send('org.pinbroker.AddContext', {'fileDescriptor': 0}, [event])
            os.close(event)
        for call, method in ((open_other, 'OpenFile'), (add_context, 'AddContext')):
            for killed in (True, False):
                with self.store.hanging():
                    call()
                    self.assertFalse(is_readable(survivor.connection.socket.fileno(), 0.3))
                    # whoever asks for nothing of the kind is answered
                    self.expect_served()
                    if killed:
                        self.end_daemon()
                if killed:
                    self.run_daemon()
                    self.assertEqual([n['pins'] for n in survivor.resume() if n['pins']], [])
                else:
                    reply, _ = survivor.connection.reply('org.pinbroker.' + method)
                    self.store.catch_up()
                    kind, key = ('f', 'file') if call == open_other else ('c', 'context')
                    self.assertIn(name(kind, reply[key]), self.store.kept)

    def test_told_before_it_ends(self):
        """The manager is busy while it ends: it is told the rest all the same."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        for sig in (RESTART, signal.SIGTERM):
            with self.store.hanging():
                survivor.connection.call('org.pinbroker.RemoveContext', {'context': survivor.context})
                self.daemon.kill(sig)
                self.wait_until_it_waits()
            self.assertEqual(self.daemon.wait(), 0)
            self.store.catch_up()
            if sig == RESTART:
                self.assertEqual(set(self.store.kept), {name('f', survivor.file)})
                self.run_daemon()
                survivor.resume()
                event = os.eventfd(0)
                survivor.context = survivor.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                                            [event])['context']
                os.close(event)
            else:
                self.assertEqual(self.store.kept, {})

    def wait_until_it_waits(self):
        """Not in its loop, but for the manager; or it has ended."""
        end = time.monotonic() + WAIT
        while self.daemon.process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f'/proc/{self.daemon.pid}/wchan', encoding='ascii') as f:
                    if 'poll_schedule' in f.read():
                        break
            self.assertLess(time.monotonic(), end)

    def test_killed_while_it_ends(self):
        """What had not been let go of by then is there afterwards."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        pin = survivor.pin()
        watch = survivor.watch()
        self.daemon.kill(signal.SIGTERM)
        self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['conflict']['cause'], 'shutdown')
        watch.close()
        self.restart()
        self.expect_restored(1, 1, 1)
        self.assertEqual(survivor.resume(), [])
        _, result = self.truncate()
        self.assertFalse(is_readable(result, 0.1))
        survivor.unpin([pin])
        self.truncated(result)

    def test_manager_that_does_not_read(self):
        """One that hangs is waited for once, and not for ever; what it was not told before it is told in order."""
        self.run_daemon()
        with self.store.hanging():
            survivors = [self.survivor(self.make_file(f'file-{i}')) for i in range(12)]
            for survivor in survivors:
                survivor.pin()
            gone = survivors[-1]
            gone.unpin()
            gone.connection.call('org.pinbroker.CloseFile', {'file': gone.file})
            self.assertLess(len(self.store.kept), 23)
            self.daemon.wait_for_log('The service manager has not heard for 5 s')
        self.wait_for_kept({name('c', s.context) for s in survivors} |
                           {name('f', s.file) for s in survivors if s is not gone})
        self.restart()
        self.expect_restored(11, 11, 12)

    def test_bad_state(self):
        self.run_daemon()
        survivor = self.survivor(self.file)
        pin = survivor.pin()
        self.end_daemon()
        with open(self.state, 'rb') as f:
            good = f.read()
        self.assertTrue(good.startswith(b'pinbroker-state 1\n'))
        kept = {name: os.dup(fd) for name, fd in self.store.kept.items()}
        for fd in kept.values():
            self.addCleanup(os.close, fd)

        def run(data, pattern, **kwargs):
            """The daemon starts, and serves."""
            self.store.kept = {name: os.dup(fd) for name, fd in kept.items()}
            with open(self.state, 'wb') as f:
                f.write(data)
            self.run_daemon(**kwargs)
            self.daemon.wait_for_log(pattern)
            self.expect_served()
            self.end_daemon()

        everything = r'Took up 1 pin of 1 file by 1 client .* 0 objects'
        # the end of the writer, in the middle of a line; keys and kinds of a later version
        run(good + b'pin id=77 context=1', everything)
        run(good.replace(b' writable=', b' colour=blue writable=') + b'comet id=9999 tail=long\n',
            everything)
        run(good + f'pin id={pin} context\n'.encode(), r'Cannot take up pin .*Bad message')
        run(good.replace(b'device=', b'device=1'), r'Cannot take up file .*Stale file handle')
        run(good.replace(b' inode=', b' inode=1'), r'Cannot take up file .*Stale file handle')
        run(good.replace(b'offset=0', b'offset=9223372036854775807'), r'Pin \d+ of .* was lost')
        run(good.replace(b'token=', b'token=x'), r'Cannot take up client')
        run(good.replace(b'length=', b'length=9999999999999999999'), r'Pin \d+ of .* was lost')
        run(good.replace(b'kind=opaque', b'kind=quantum'), everything)
        self.store.wait_until(lambda: True)
        for data in (b'', b'pinbroker-state 2\n', b'\0' * 4096, b'x' * 100000, os.urandom(10000)):
            run(data, r'Cannot read .*state, beginning anew with 2 descriptors lost')
            self.store.wait_until(lambda: not self.store.kept)
        rng = random.Random(1)
        for _ in range(20):  # whatever it is, it comes up
            data = bytearray(good)
            for _ in range(rng.randrange(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            run(bytes(data), '')

    def test_no_files(self):
        """What lies there in the place of the state and the identifiers keeps the daemon from nothing."""
        def leased(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            self.addCleanup(os.close, fd)
            fcntl.fcntl(fd, 10, signal.SIGURG)  # F_SETSIG, to what nobody minds
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

        for make in (os.mkfifo, os.mkdir, leased, lambda path: os.symlink('/dev/zero', path)):
            for name in ('.state', '.state.new', '.ids'):
                with self.subTest(make=make, name=name):
                    make(self.path + name)
                    begin = time.monotonic()
                    self.run_daemon()
                    self.expect_served()
                    # not when the kernel takes a lease
                    self.assertLess(time.monotonic() - begin, 10)
                    self.end_daemon()
                    for file in ('.state', '.state.new', '.ids'):
                        path = self.path + file
                        if os.path.isdir(path):
                            os.rmdir(path)
                        elif os.path.lexists(path):
                            os.unlink(path)

    def test_identifiers(self):
        """Whatever becomes of the file of identifiers, none is given twice: the state says which are in use (I7)."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        given = [survivor.client, survivor.file, survivor.context, survivor.pin()]
        contents = [b'%020d\n' % n for n in (0, 1, 2**62 + 1, 2**63 - 1, 2**64 - 1)]
        for content in (None, b'', b'-5\n', b'0' * 19 + b'\n', b'%020d' % 7, b'%020d\n\n' % 7, b'\xff\0',
                        b'9' * 30 + b'\n', *contents):
            with self.subTest(content=content):
                # the highest that was given is of something that is not there any more
                given.append(survivor.pin(PAGE))
                survivor.unpin([survivor.pins.pop()])
                self.end_daemon()
                os.unlink(self.path + '.ids')
                if content is not None:
                    with open(self.path + '.ids', 'wb') as f:
                        f.write(content)
                self.run_daemon()
                self.expect_restored(1, 1, 1)
                survivor.resume()
                pin = survivor.pin(PAGE)
                self.assertGreater(pin, max(given))
                self.assertLess(pin, 2**62)
                given.append(pin)
                survivor.unpin([survivor.pins.pop()])
        self.assertEqual(len(set(given)), len(given))

    def test_damaged_identifiers(self):
        """What has no identifier of ours is lost, and does not take another's place."""
        self.run_daemon()
        survivor = self.survivor(self.file)
        survivor.pin()
        self.end_daemon()
        with open(self.state, encoding='utf-8') as f:
            state = f.read()
        for bad in ('0', '-5', str(2**63 - 1), str(2**64 + survivor.pins[0]), f'{survivor.pins[0]}x', ''):
            with self.subTest(bad=bad):
                self.write(self.state, state.replace(f'pin id={survivor.pins[0]} ', f'pin id={bad} '))
                self.run_daemon()
                self.expect_restored(0, 1, 1, lost=1)
                self.daemon.wait_for_log('damaged line about a pin')
                self.end_daemon()

    def test_kill_at_any_instant(self):
        """What a client was told of is there afterwards, and its lease has been there all the time."""
        rng = random.Random(os.environ.get('SEED', 'seed'))
        self.run_daemon()
        survivor = self.survivor(self.file)
        live, unsure = set(), set()

        def work(until):
            with contextlib.suppress(AssertionError, ConnectionError):
                while time.monotonic() < until:
                    if live and rng.random() < 0.4:
                        pin = rng.choice(sorted(live))
                        live.discard(pin)
                        unsure.add(pin)
                        survivor.unpin([pin])
                        unsure.discard(pin)
                    else:
                        live.add(survivor.pin(PAGE * rng.randrange(16)))

        def expect_lease():
            """Asked of the description, which the manager has and the client shares."""
            self.assertIn(fcntl.fcntl(survivor.fd, F_GETLEASE), (fcntl.F_WRLCK, fcntl.F_RDLCK))

        for _ in range(25):
            killer = threading.Timer(rng.random() * 0.05, self.daemon.kill, [signal.SIGKILL])
            killer.start()
            work(time.monotonic() + WAIT)
            killer.join()
            expect_lease()
            self.daemon.wait()
            self.run_daemon()
            self.assertEqual(survivor.resume(), [])
            expect_lease()
            listed = {p['pin'] for p in survivor.listed()[0]}
            self.assertLessEqual(live, listed)
            # one may have been made that its holder was not told of
            self.assertLessEqual(len(listed - live - unsure), 1)
            strays = listed - live
            unsure.clear()
            if strays:
                survivor.unpin(sorted(strays))
        survivor.unpin(sorted(live))
        _, result = self.truncate()
        self.truncated(result)

    def session(self, done):
        """All that a holder does; what has been answered is noted in `done`."""
        survivor = done['survivor'] = Survivor(self.path, self.file, ring=True)
        mapping = self.register(survivor)
        for _ in range(2):
            first = survivor.pin(0, PAGE, 'first')
            done['live'].add(first)
            second = survivor.pin(PAGE, 2 * PAGE)
            done['live'].add(second)
            survivor.connection.call('org.pinbroker.Bind', {'pin': second, 'handle': 0})
            done['bound'].add(second)
            done['live'].discard(first)
            survivor.unpin([first])
        pins = sorted(done['live'])
        done['live'].clear()
        survivor.unpin(pins)
        del mapping

    def expect_intact(self, survivor, live, bound):
        """The next run has all that was answered, under a lease that was never away."""
        self.assertEqual(survivor.resume(), [])
        self.assertIn(fcntl.fcntl(survivor.fd, F_GETLEASE), (fcntl.F_WRLCK, fcntl.F_RDLCK))
        listed = {p['pin']: p for p in survivor.listed()[0]}
        self.assertLessEqual(live, set(listed))
        for pin in bound & set(listed):
            self.assertEqual((listed[pin]['state'], listed[pin]['handle']), ('bound', 0))
        watch = survivor.watch()
        _, result = self.truncate()
        if listed:
            notice = watch.reply('org.pinbroker.Watch')[0]['notice']
            self.assertEqual(sorted(notice['pins']), sorted(listed))
            survivor.ring.unregister()
            self.assertEqual(survivor.unpin(sorted(listed)), [])
        self.truncated(result)
        watch.close()

    def kill_at(self, env):
        """False: it outlived the session."""
        self.write(self.file, 'a' * SIZE)
        done = {'survivor': None, 'live': set(), 'bound': set()}
        first = self.run_daemon(env=env, may_end=True)

        def run_next():
            first.process.wait()
            self.run_daemon()
        successor = threading.Thread(target=run_next)
        successor.start()
        try:
            self.session(done)
            ended = first.process.poll() is not None  # the next one served
        except (AssertionError, ConnectionError):
            ended = True
        first.process.kill()
        self.assertEqual(first.wait(), -signal.SIGKILL, first.text())
        successor.join()
        if done['survivor']:
            self.expect_intact(**done)
            done['survivor'].close()
        self.end_daemon(signal.SIGTERM)
        self.store.wait_until(lambda: not self.store.kept)
        return ended

    def preload(self):
        return {'LD_PRELOAD': os.environ['DIE_AT'],
                'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':verify_asan_link_order=0'}

    def test_hang(self):
        """Deaf to all signals and with its loop stuck it does not outlast the kernel's patience, before it is
        ready and afterwards.
        """
        self.set_lease_break_time(6)
        hang = os.path.join(self.dir, 'hang')
        env = {**self.preload(), 'HANG_IF': hang, 'WATCHDOG_USEC': '20000000'}
        self.run_daemon(env=env)
        self.daemon.wait_for_log('lease-break-time is 6 s, where .* hangs for 2.0 s')
        self.store.wait_until(lambda: b'WATCHDOG_USEC=2000000' in self.store.messages)
        survivor = self.survivor(self.file)
        survivor.pin()
        for before in (False, True):
            self.write(hang, '')
            if before:
                self.run_daemon(env=env, may_end=True)
            end = time.monotonic() + WAIT
            while os.path.exists(hang):  # it is about to say or write something
                self.assertLess(time.monotonic(), end)
            begin = time.monotonic()
            self.assertEqual(self.daemon.wait(), -signal.SIGKILL, self.daemon.text())
            # 2 s and 4 s after it last did something
            self.assertLess(time.monotonic() - begin, 3 if before else 5.5)
        # no time is left of 6 s, for all that the next run knows, if it finds the lease broken
        self.set_lease_break_time(45)
        self.run_daemon(env=env)
        self.assertEqual(survivor.resume(), [])
        with contextlib.closing(survivor.watch()) as watch:
            _, result = self.truncate()
            self.assertEqual(watch.reply('org.pinbroker.Watch')[0]['notice']['pins'], survivor.pins)
            survivor.unpin()
            self.truncated(result)

    def test_patience_changes(self):
        """The manager is told how closely to watch as the kernel's patience changes."""
        self.set_lease_break_time(45)
        self.run_daemon(env={'WATCHDOG_USEC': '2000000'})
        for seconds, usec in ((3, 1000000), (45, 2000000), (0, None), (4, 1333333)):
            self.set_lease_break_time(seconds)
            told = b'WATCHDOG_USEC=%d' % (usec or 2000000)
            self.store.wait_until(lambda: told in self.store.messages)
            self.assertEqual([m for m in self.store.messages if m.startswith(b'WATCHDOG_USEC=')][-1], told)
        self.end_daemon(signal.SIGTERM)

    def test_slow_start(self):
        """One that gets on with its start may take its time."""
        self.run_daemon()
        survivors = [self.survivor(self.make_file(f'file-{i}')) for i in range(12)]
        self.end_daemon()
        self.set_lease_break_time(3)
        begin = time.monotonic()
        self.run_daemon(env={**self.preload(), 'SLOW': '200000', 'WATCHDOG_USEC': '20000000'})
        self.assertGreater(time.monotonic() - begin, 2.4)
        self.expect_restored(0, 12, 12)
        extended = [m for m in self.store.messages if m == b'EXTEND_TIMEOUT_USEC=20000000']
        self.assertGreaterEqual(len(extended), 2)
        for survivor in survivors:
            self.assertEqual(survivor.resume(), [])
        self.end_daemon(signal.SIGTERM)

    def fork_holder(self):
        """A process that has a bound pin, and does nothing about it."""
        pid = os.fork()
        if pid == 0:
            try:
                survivor = Survivor(self.path, self.file, ring=True)
                mapping = self.register(survivor)
                pin = survivor.pin(PAGE, 2 * PAGE)
                survivor.connection.call('org.pinbroker.Bind', {'pin': pin, 'handle': 0})
                signal.pause()
                del mapping
            finally:
                os._exit(0)
        self.addCleanup(end_child, pid)
        self.wait_for_pin('bound')
        return pid

    def test_no_time_left(self):
        """When the break came nobody knows: the steps are hurried, but the pages are not given away while the kernel
        may yet wait for them to work (I2).
        """
        self.set_lease_break_time(45)
        self.run_daemon()
        self.fork_holder()
        self.end_daemon()
        _, result = self.truncate()
        self.wait_for_break()
        then = time.time() - 60
        os.utime(self.state, (then, then))
        self.run_daemon()
        self.daemon.wait_for_log('What is left of the kernel.s lease-break-time, 0.0 s, is too short')
        self.truncated(result)
        self.daemon.wait_for_log('Revocation .* released after .*, 1 pin gone')
        self.assertNotIn('lost after', self.daemon.text())

    def test_killed_in_a_detach(self):
        """A holder whom it has stopped does not stand still for ever."""
        self.write(self.config, '[Revocation]\nRevokeGraceSec=0\n')
        self.run_daemon(env={**self.preload(), 'DIE_ON_STOP': '1'})
        pid = self.fork_holder()
        _, result = self.truncate()
        self.assertEqual(self.daemon.wait(), -signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        self.run_daemon()
        end = time.monotonic() + WAIT
        while not os.waitid(os.P_PID, pid, os.WCONTINUED | os.WNOHANG):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)
        self.truncated(result)
        self.assertEqual(os.waitpid(pid, os.WNOHANG), (0, 0))  # detached, not killed

    def test_kill_at_every_line(self):
        """It ends before, and after, each single thing that it writes or says."""
        for variable in ('DIE_AT', 'DIE_AFTER'):
            n, ended = 1, True
            while ended:
                with self.subTest(**{variable: n}):
                    ended = False
                    ended = self.kill_at({**self.preload(), variable: str(n)})
                n += 1
            self.assertGreater(n, 20)

    def test_no_store(self):
        """Without a manager the request to leave everything behind is one to end."""
        daemon = self.spawn([DAEMON] + self.arguments(self.path + '2'))
        self.expect_served_soon(self.path + '2')
        self.expect_end(daemon, sig=RESTART)
        self.assertFalse(os.path.exists(self.path + '2.state'))

    def expect_served_soon(self, path):
        end = time.monotonic() + WAIT
        while True:
            try:
                return self.expect_served(path)
            except (FileNotFoundError, ConnectionRefusedError):  # of its start nobody is told
                self.assertLess(time.monotonic(), end)


if __name__ == '__main__':
    signal.alarm(550)
    unittest.main(verbosity=2)
