#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as a service: what it tells the service manager, sockets that it is passed, options and
configuration, how it ends, and without root.
"""

import contextlib
import ctypes
import glob
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import unittest

from client import PAGE, WAIT, Connection, Refused, is_readable
from world import (CONFIG, Case, DAEMON, Holder, IOERR, NOBODY, OSERR, READY, STOPPING, TEMPFAIL, UNAVAILABLE,
                   USAGE, WATCHDOG, as_nobody, end_child, fork_as, open_file)


class Notification(Case):
    """What the service manager is told."""

    def test_ready(self):
        manager = self.make_manager(deaf=True)
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
        self.assertRegex(message, rb'(?m)^STATUS=Ending: 1 pin of 1 file by 1 client, 1 revocation running')
        self.assertEqual(holder.notice()['conflict']['cause'], 'shutdown')
        with self.assertRaises(Refused) as refused:
            holder.pin()
        self.assertEqual(refused.exception.error, 'org.pinbroker.Busy')
        self.assertIsNone(daemon.process.poll())
        holder.release()
        self.assertEqual(daemon.wait(), 0, daemon.text())

    def test_watchdog(self):
        manager = self.make_manager(deaf=True)
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
        manager = self.make_manager(deaf=True)
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '20000',
                                 'WATCHDOG_PID': '1'})
        self.assertNotRegex(manager.wait_for(READY), WATCHDOG)
        self.expect_end(daemon)
        self.assertNotRegex(manager.wait_for(STOPPING), WATCHDOG)

    def test_reader_that_never_reads(self):
        """I6: nobody waits for the manager, neither the loop nor a thread that others need."""
        manager = self.make_manager(deaf=True)
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
        manager = self.make_manager(deaf=True, address='\0pinbroker-test-%d' % os.getpid())
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
        manager = self.make_manager(deaf=True)
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, 'WATCHDOG_USEC': '20000'})
        manager.wait_for(READY)
        manager.close()
        os.unlink(manager.address)
        daemon.wait_for_log('Cannot reach the service manager')
        manager = self.make_manager(manager.address, deaf=True)
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
                ('two', [one.fileno(), two.fileno()], 'Several descriptors were passed')):
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


class Configured(Case):
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


class Options(Configured):
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
        for arguments, said in ((['--nonsense'], 'There is no option --nonsense.'), (['-x'], 'There is no option -x.'),
                                (['--bus=a', '-xh'], 'There is no option -x.'),
                                (['--socket'], 'The option --socket needs an argument.'),
                                (['--socket='], 'The option --socket needs an argument.'),
                                (['--bus', ''], 'The option --bus needs an argument.'),
                                (['--config'], 'The option --config needs an argument.'),
                                (['--help=x'], 'The option --help=x takes no argument.'),
                                (['--version=1'], 'The option --version=1 takes no argument.'),
                                (['stray'], 'There is nothing to be done with stray.'),
                                (['--', ''], "There is nothing to be done with ''."),
                                ([b'a\x1b[2J\x9b\n'], r'There is nothing to be done with a\x1b[2J\x9b\x0a.'),
                                ([b'--\x1b[2J\xc2\x9b'], r'There is no option --\x1b[2J\xc2\x9b.')):
            with self.subTest(arguments):
                result = self.command(*arguments)
                self.assertEqual((result.returncode, result.stdout), (USAGE, ''))
                self.assertEqual(result.stderr, f'pinbrokerd: {said}\nTry pinbrokerd --help.\n')

    def test_output_that_cannot_be_written(self):
        for option in ('--help', '--version'):
            with open('/dev/full', 'wb') as full:
                result = subprocess.run([DAEMON, option], stdout=full, stderr=subprocess.PIPE, encoding='utf-8',
                                        timeout=WAIT, check=False)
            self.assertEqual((result.returncode, result.stderr),
                             (IOERR, 'pinbrokerd: Cannot write the output: No space left on device.\n'))

    def test_closed_descriptors(self):
        """Nothing else gets the number of one that people read: its log would go there."""
        for closed in ('2>&-', '<&- >&- 2>&-'):
            self.manager = self.make_manager()
            daemon = self.spawn(['sh', '-c', f'exec "$@" {closed}', 'sh', DAEMON] + self.arguments(self.path),
                                env={'NOTIFY_SOCKET': self.manager.address})
            self.manager.wait_for(READY)
            for fd in (0, 1, 2) if '<' in closed else (2,):
                self.assertEqual(os.readlink(f'/proc/{daemon.pid}/fd/{fd}'), '/dev/null')
            self.expect_served()
            self.expect_end(daemon)

    def test_wrong_settings(self):
        """They are named, and the default stands; those beside them count."""
        self.write(self.config, '[Revocation]\nNonsense=1\nRevokeGraceSec=soon\n'
                                'SignalGraceSec=3\n\n[Nowhere]\nLeases=owner\n[Limits]\n'
                                'MaxClientsPerUser=3\nMaxPinsPerUser=-1\nnonsense\n # =\n[Limits\n')
        daemon = self.start()
        for message in (r':2: .*"Revocation".* no Nonsense=', r':3: "soon" .*RevokeGraceSec=',
                        r':7: .*"Nowhere".* no Leases=', r':10: "-1" .*MaxPinsPerUser=',
                        ':11: This is neither a section nor Key=value', ':13: This is neither'):
            daemon.wait_for_log(re.escape(self.config) + message)
        self.assertEqual(daemon.text().count(self.config), 6)
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

    def test_file_systems(self):
        """Those on which a lease promises nothing are taken, but not without a word."""
        self.write(self.config, '[Files]\nFileSystems=tmpfs nfs xfs fuse.sshfs overlay\n')
        daemon = self.start()
        for name in ('nfs', 'fuse.sshfs', 'overlay'):
            daemon.wait_for_log(rf'FileSystems= has {re.escape(name)}: leases there do not see all who ')
        self.assertEqual(daemon.text().count('FileSystems='), 3)
        self.expect_end(daemon)

    def test_no_configuration(self):
        missing = os.path.join(self.dir, 'missing.conf')
        os.mkfifo(self.dir + '/pipe')
        writer = os.open(self.dir + '/pipe', os.O_RDWR)
        self.addCleanup(os.close, writer)
        os.write(writer, b'[Files]\n')
        # what has no end, or has to be waited for, is none either
        for path, reason in ((missing, 'No such file'), (self.dir, 'Is a directory'), ('/dev/zero', 'Wrong medium'),
                             (self.dir + '/pipe', 'Wrong medium')):
            daemon = self.spawn([DAEMON] + self.arguments(self.path, path))
            self.expect_refusal(daemon, CONFIG,
                                f'Cannot read {re.escape(path)}: {reason}')
            self.assertFalse(os.path.exists(self.path))
        self.expect_end(self.start(self.arguments(self.path, '/dev/null')))

    def test_bad_socket_paths(self):
        regular = os.path.join(self.dir, 'regular')
        self.write(regular, 'precious')
        link = os.path.join(self.dir, 'link')
        os.symlink(regular, link)
        for path, reason in ((os.path.join(self.dir, 'missing', 'socket'), 'directory has to be made.*No such file'),
                             (regular, 'no socket .*File exists'), (link, 'File exists'),
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
        daemon.wait_for_log(rf'bus is not there, going on without \({self.address}\): No such file')
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


class Reload(Configured):
    """SIGHUP: the configuration is read anew, and nothing else changes."""

    def reload(self, daemon, log='Read the configuration anew'):
        before = daemon.text().count(log)
        daemon.kill(signal.SIGHUP)
        self.manager.wait_for(re.compile(rb'^RELOADING=1\nMONOTONIC_USEC=\d+$', re.M))
        self.manager.wait_for(READY)
        daemon.wait_for_log(f'(?s)(?:{log}.*){{{before + 1}}}')

    def test_reload(self):
        daemon = self.start()
        holder = self.hold(file=self.make_file('held'))
        self.assertTrue(9 < self.grace() < 10.5)
        self.write(self.config, '[Revocation]\nRevokeGraceSec=4s\nSignalOnTimeout=none\n'
                                '[Files]\nFileSystems=ext4\n[Limits]\nMaxPinsPerUser=1\n')
        self.reload(daemon)
        with self.assertRaises(Refused) as refused:
            holder.pin()
        self.assertEqual(refused.exception.parameters['maximum'], 1)
        with self.assertRaises(Refused) as refused:
            open_file(holder.connection, self.file)
        self.assertEqual(refused.exception.error, 'org.pinbroker.NotLeasable')
        # what was pinned before is, and its holder has what the file says now
        _, result = self.truncate(os.path.join(self.dir, 'held'))
        seconds = holder.notice()['deadlineUSec'] / 1e6 - time.monotonic()
        self.assertTrue(3 < seconds < 4.5, seconds)
        self.assertFalse(is_readable(result, 0))
        holder.release()
        self.truncated(result)
        self.expect_end(daemon)

    def test_under_way(self):
        """A revocation goes on as it was planned."""
        self.write(self.config, '[Revocation]\nRevokeGraceSec=1s\nSignalOnTimeout=SIGUSR2\n'
                                'SignalGraceSec=10s\n')
        daemon = self.start()
        heard = []
        self.addCleanup(signal.signal, signal.SIGUSR2,
                        signal.signal(signal.SIGUSR2, lambda sig, _: heard.append(sig)))
        holder = self.hold()
        _, result = self.truncate()
        holder.notice()
        self.write(self.config, '[Revocation]\nSignalOnTimeout=none\n')
        self.reload(daemon)
        end = time.monotonic() + WAIT
        while not heard:
            self.assertLess(time.monotonic(), end)
            is_readable(result, 0.1)  # a signal interrupts nothing here
        self.assertFalse(is_readable(result, 0))
        holder.release()
        self.truncated(result)
        self.expect_end(daemon)

    def test_unreadable(self):
        """What was read before stands."""
        self.write(self.config, '[Revocation]\nRevokeGraceSec=7s\n')
        daemon = self.start()
        os.unlink(self.config)
        self.reload(daemon, 'Cannot read .*conf, going on with what was read before: No such file')
        self.assertTrue(6 < self.grace() < 7.5)
        self.expect_end(daemon)

    def test_before_it_is_ready(self):
        """It is no signal to die by, however early it comes."""
        self.manager = self.make_manager(deaf=True)
        read, write = os.pipe()
        # becomes the daemon with the signal pending
        program = ('import os, sys; '
                   'os.read(int(sys.argv[1]), 1); os.execv(sys.argv[2], sys.argv[2:])')
        daemon = self.spawn([sys.executable, '-ISc', program, str(read), DAEMON] +
                            self.arguments(self.path), pass_fds=[read],
                            env={'NOTIFY_SOCKET': self.manager.address},
                            preexec_fn=lambda: signal.pthread_sigmask(0, [signal.SIGHUP]))
        daemon.kill(signal.SIGHUP)
        os.write(write, b'x')
        os.close(read)
        os.close(write)
        self.manager.wait_for(READY)
        daemon.wait_for_log('Read the configuration anew')
        self.expect_end(daemon)


class End(Case):
    def test_signals(self):
        for sig in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start()
            idle = self.connect()
            idle.call('org.varlink.service.GetInfo')  # one in the backlog would be reset
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
            self.assertRegex(daemon.text(), 'Asked again to end: ending at once, with 1 pin\.')
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


class UserCase(Case):
    """The daemon of another user than root, who can have limits, and use them up."""

    def setUp(self):
        super().setUp()
        os.chmod(self.dir, 0o755)
        self.home = os.path.join(self.dir, 'home')
        os.mkdir(self.home)
        self.path = os.path.join(self.home, 'socket')
        self.own, self.other = self.make_file('home/own'), self.make_file('home/other')

    def spawn_as(self, uid, env=None, **kwargs):
        for name in (self.home, self.own, self.other):
            os.chown(name, uid, uid)
        self.manager = self.make_manager()
        os.chmod(self.manager.address, 0o666)
        # the build tree may be where nobody can go
        fd = os.open(DAEMON, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return self.spawn(['pinbrokerd'] + self.arguments(self.path),
                          executable=f'/proc/self/fd/{fd}', pass_fds=[fd],
                          env={'NOTIFY_SOCKET': self.manager.address} | (env or {}),
                          user=uid, group=uid, extra_groups=[], **kwargs)

    def start_as(self, uid, **kwargs):
        daemon = self.spawn_as(uid, **kwargs)
        self.manager.wait_for(READY)
        return daemon


@unittest.skipUnless(os.getuid() == 0, 'needs root to become somebody else')
class Limits(UserCase):
    """What other programs of its user have left: it goes on without, or says which limit is in the way."""

    UID = 61803  # nobody else's, who would feel the limits, too

    def use_up_inotify(self):
        """A process that has all instances there are; returns what ends it."""
        ready, end = os.pipe()

        def use_up():
            while ctypes.CDLL(None).inotify_init1(os.O_CLOEXEC) >= 0:
                pass
            os.write(end, b'x')
            signal.pause()

        pid, result = fork_as(self.UID, use_up)
        self.addCleanup(end_child, pid)
        result.close()
        os.close(end)
        self.assertEqual(os.read(ready, 1), b'x')
        os.close(ready)
        return lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0))

    def hold_as(self, file=None):
        """A holder that lets go when told, and ends; a function that waits for that, and says what was told."""
        ready, end = os.pipe()

        def hold():
            with contextlib.closing(Holder(self.path, file or self.own)) as holder:
                os.write(end, b'x')
                notice = holder.notice()
                holder.release()
                return notice['conflict']['cause']

        def told():
            os.waitpid(pid, 0)
            return json.load(result)['result']

        pid, result = fork_as(self.UID, hold)
        self.addCleanup(end_child, pid)
        self.addCleanup(result.close)
        os.close(end)
        self.assertTrue(os.read(ready, 1) or self.fail(result.read()))
        os.close(ready)
        return told

    def test_inotify(self):
        """A truncate of a file that is exposed is seen all the same, and is watched for once that can be (I1)."""
        give_back = self.use_up_inotify()
        self.write(self.config, '[Files]\nReaders=admit\n')
        daemon = self.start_as(self.UID)
        daemon.wait_for_log('Cannot watch files that are pinned, .*: Too many open files '
                            r'\(the limit is /proc/sys/fs/inotify/max_user_instances: \d+\)')
        self.hold_as()
        with open(self.own, 'rb'):
            daemon.wait_for_log(f'{self.own} is exposed')
            os.truncate(self.own, PAGE)
            daemon.wait_for_log(f'{self.own} was truncated to {PAGE} bytes while it was exposed')
        self.hold_as(self.other)
        with open(self.other, 'rb'):
            daemon.wait_for_log(f'{self.other} is exposed')
            give_back()
            daemon.wait_for_log('Files can be watched again')
            self.assertEqual(daemon.text().count('Cannot watch'), 1)
            self.assertIn('inotify wd:', self.descriptions(daemon.pid))
            os.truncate(self.other, 0)
            daemon.wait_for_log(f'{self.other} was truncated to 0 bytes while it was exposed')
        self.expect_end(daemon)

    def descriptions(self, pid):
        text = ''
        for path in glob.glob(f'/proc/{pid}/fdinfo/*'):
            with contextlib.suppress(OSError), open(path, encoding='utf-8') as f:
                text += f.read()
        return text

    def limited(self, which, value):
        # a sanitizer looks for leaks in a process of its own, which then cannot be
        return self.spawn_as(self.UID, {'ASAN_OPTIONS': 'detect_leaks=0'} if which == resource.RLIMIT_NPROC else None,
                             preexec_fn=lambda: resource.setrlimit(which, (value, value)))

    def test_file_size(self):
        daemon = self.limited(resource.RLIMIT_FSIZE, 0)
        self.manager.wait_for(READY)
        for what in ('record which identifiers are in use', f'write {self.path}.state: what is pinned would not'):
            daemon.wait_for_log(f'Cannot {what}.*: File too large '
                                r'\(the limit is RLIMIT_FSIZE, LimitFSIZE=: 0\)')
        told = self.hold_as()
        _, result = self.truncate(self.own)
        self.truncated(result)
        self.assertEqual(told(), 'modify')
        self.expect_end(daemon)

    def test_queued_signals(self):
        """The kernel then tells that it could not tell."""
        daemon = self.limited(resource.RLIMIT_SIGPENDING, 0)
        self.manager.wait_for(READY)
        told = self.hold_as()
        _, result = self.truncate(self.own)
        self.truncated(result)
        self.assertEqual(told(), 'modify')
        self.expect_end(daemon)

    def test_threads_and_descriptors(self):
        self.expect_refusal(self.limited(resource.RLIMIT_NPROC, 1), OSERR,
                            'Cannot start the thread that logs: .*the limit is TasksMax=, RLIMIT_NPROC or')
        for maximum in (8, 12):
            self.expect_refusal(self.limited(resource.RLIMIT_NOFILE, maximum), UNAVAILABLE, 'Cannot start: .*'
                                rf'the limit is RLIMIT_NOFILE, LimitNOFILE=: {maximum}\)')


@unittest.skipUnless(os.getuid() == 0, 'needs root to become somebody else')
class Unprivileged(UserCase):
    def test_nobody(self):
        path, own = self.path, self.own
        foreign = self.make_file('foreign')
        os.chmod(foreign, 0o666)
        daemon = self.start_as(NOBODY)
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


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
