#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as installed, with systemd as the first process and the system's bus: started, found on the
bus, in the journal; what its sandbox leaves it is enough for all that it does; stopped.
"""
import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import case
from installed import (ADDRESS, MANAGER, NAME, ROOT, SECOND, SERVICE, SOCKET, TESTER, TIMEOUT, Holder,
                       busctl, call, daemon_pid, journal, leases, output, properties, run, show)
from client import PAGE, Connection, is_readable, truncate_in_child

UNIT_DROP_IN = f'/run/systemd/system/{SERVICE}.d/test.conf'
RULES = '/etc/polkit-1/rules.d/10-test.rules'
DROP_IN = '/etc/pinbroker/pinbroker.conf.d/test.conf'
SIZE = 64 * PAGE
GRACE, SIGNAL_GRACE = 6, 2  # seconds
MESSAGES = {}
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../../daemon/util/log.h'),
          encoding='utf-8') as header:
    MESSAGES = dict(re.findall(r'#define MESSAGE_(\w+)\s+"(\w{32})"', header.read()))


def setUpModule():
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Revocation]\nRevokeGraceSec={GRACE}s\nSignalGraceSec={SIGNAL_GRACE}s\n')
    output('systemctl', 'stop', SERVICE)


class Case(unittest.TestCase):
    def setUp(self):
        self.restarts = show(SERVICE, 'NRestarts')

    def tearDown(self):
        """Whatever was done to it, it has not failed."""
        self.assertNotEqual(show(SERVICE, 'ActiveState'), 'failed')
        self.assertIn(show(SERVICE, 'NRestarts'), ('0', self.restarts))

    def make_file(self, directory='/dev/shm', owner=0):
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir=directory)
        self.addCleanup(shutil.rmtree, directory)
        path = os.path.join(directory, 'data')
        with open(path, 'wb') as f:
            f.write(b'a' * SIZE)
        os.chown(directory, owner, owner)
        os.chown(path, owner, owner)
        return path

    def hold(self, path, *options, **kwargs):
        holder = Holder(path, *options, **kwargs)
        self.addCleanup(holder.close)
        return holder

    def truncate(self, path):
        """A process that does it, and where its result will be."""
        pid, result = truncate_in_child(path, PAGE)
        self.addCleanup(os.close, result)

        def end():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.addCleanup(end)
        return pid, result

    def expect_truncated(self, path, result):
        """How long it took."""
        self.assertTrue(is_readable(result, TIMEOUT), 'the truncate does not return')
        error, seconds, _ = struct.unpack('idq', os.read(result, 64))
        self.assertEqual(error, 0, os.strerror(error))
        self.assertEqual(os.stat(path).st_size, PAGE)
        return seconds


class Service(Case):
    def test_socket_activation(self):
        """The first contact starts it, and finds it ready."""
        output('systemctl', 'stop', SERVICE)
        self.assertEqual(show(SERVICE, 'ActiveState'), 'inactive')
        self.assertEqual(show(SOCKET, 'SubState'), 'listening')
        connection = Connection(ADDRESS)
        self.addCleanup(connection.close)
        connection.socket.settimeout(TIMEOUT)
        info = connection.call('org.varlink.service.GetInfo')
        self.assertEqual(info['product'], 'pinbrokerd')
        self.assertEqual(show(SERVICE, 'ActiveState'), 'active')

    def test_start(self):
        output('systemctl', 'start', SERVICE)
        self.assertEqual((show(SERVICE, 'ActiveState'), show(SERVICE, 'SubState')),
                         ('active', 'running'))
        self.assertRegex(show(SERVICE, 'StatusText'),
                         r'^\d+ pins? of \d+ files? by \d+ clients?, \d+ revocations? running$')
        output('busctl', 'status', NAME)

    def test_sandbox(self):
        """The process is as the unit has it."""
        output('systemctl', 'start', SERVICE)
        pid = daemon_pid()
        with open(f'/proc/{pid}/status', encoding='ascii') as f:
            status = dict(re.findall(r'(?m)^(\w+):\t(.*)$', f.read()))
        self.assertEqual((status['NoNewPrivs'], status['Seccomp']), ('1', '2'))
        cap_sys_admin = 1 << 21
        self.assertFalse(int(status['CapBnd'], 16) & cap_sys_admin)
        self.assertNotEqual(os.readlink(f'/proc/{pid}/ns/mnt'), os.readlink('/proc/1/ns/mnt'))
        with open(f'/proc/{pid}/oom_score_adj', encoding='ascii') as f:
            self.assertLess(int(f.read()), 0)

    def test_stop(self):
        """It has the holders let go first, and ends well. Without its socket: else a holder that goes on
        talking starts it again."""
        path = self.make_file()
        holder = self.hold(path)
        self.addCleanup(output, 'systemctl', 'start', SOCKET)
        output('systemctl', 'stop', SERVICE, SOCKET)
        self.assertEqual(holder.expect('revoked')['cause'], 'shutdown')
        holder.expect_release()
        self.assertEqual(holder.wait(), 0)
        self.assertEqual(leases(path), [])
        self.assertEqual([show(SERVICE, name) for name in ('ActiveState', 'Result', 'ExecMainStatus')],
                         ['inactive', 'success', '0'])


class Bus(Case):
    def test_tree(self):
        """A pin, and whose it is, as busctl shows it and as the kernel has it."""
        path = self.make_file()
        holder = self.hold(path)
        tree = output('busctl', 'tree', '--list', NAME).split()
        pins = [o for o in tree if re.fullmatch(rf'{ROOT}/file/\d+/pin/{holder.pin}', o)]
        self.assertEqual(len(pins), 1, tree)
        file = properties(pins[0].rsplit('/', 2)[0], 'org.pinbroker1.File')
        self.assertEqual((file['Path'], file['Pins']), (path, 1))
        client = properties(f'{ROOT}/client/{properties(pins[0], "org.pinbroker1.Pin")["Client"]}',
                            'org.pinbroker1.Client')
        self.assertEqual((client['Pid'], client['Unit']), (holder.pid, holder.unit))
        self.assertEqual([pid for _, _, pid in leases(path)], [daemon_pid()])

    def test_revoke(self):
        path = self.make_file()
        holder = self.hold(path)
        file = next(o for o in call('ListFiles', 'a{sv}tu', 0, 0, 0)[0] if o['path']['data'] == path)
        call('RevokeFile', 'tst', file['file']['data'], 'maintenance', 60 * SECOND)
        notice = holder.expect('revoked')
        self.assertEqual((notice['cause'], notice['reason']), ('admin', 'maintenance'))
        holder.expect_release()
        self.assertEqual(holder.wait(), 0)

    def test_strangers(self):
        """An ordinary user may not, unless a rule of polkit lets him; a member of the group may."""
        argv = ('call', NAME, ROOT, MANAGER, 'ListFiles', 'a{sv}tu', 0, 0, 0)
        stranger = {'user': TESTER, 'group': TESTER, 'extra_groups': []}
        output('systemctl', 'start', SERVICE)
        refused = busctl(*argv, **stranger)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn('Only root and the group pinbroker may do this', refused.stderr)
        allowed = busctl(*argv, **stranger | {'extra_groups': ['pinbroker']})
        self.assertEqual(allowed.returncode, 0, allowed.stderr)

        self.addCleanup(output, 'systemctl', 'restart', 'polkit.service')
        self.addCleanup(os.unlink, RULES)
        with open(RULES, 'w', encoding='utf-8') as f:
            f.write('polkit.addRule(function(action, subject) {'
                    ' if (action.id == "org.pinbroker1.inspect" && subject.user == "tester")'
                    ' return polkit.Result.YES; });')
        output('systemctl', 'restart', 'polkit.service')
        allowed = busctl(*argv, **stranger)
        self.assertEqual(allowed.returncode, 0, allowed.stderr)
        refused = busctl('call', NAME, ROOT, MANAGER, 'RevokeDevice', 'sst', 'none0', '', 0, **stranger)
        self.assertNotEqual(refused.returncode, 0)


class Journal(Case):
    def test_catalog(self):
        """journalctl -x explains a line, with what the line is about."""
        output('journalctl', '--update-catalog')
        path = self.make_file()
        self.hold(path)
        journal(MESSAGES['LEASE_TAKEN'], PINBROKER_PATH=path)
        told = output('journalctl', '-x', '--no-pager', 'MESSAGE_ID=' + MESSAGES['LEASE_TAKEN'],
                      'PINBROKER_PATH=' + path)
        self.assertRegex(told, r'(?m)^.. Defined-By: pinbroker$')
        self.assertIn(path, told.split('Defined-By: pinbroker', 1)[1])
        # as pinbrokerd(8) has it, whether there is any or not
        run('journalctl', '-x', '--no-pager', 'MESSAGE_ID=' + MESSAGES['LEASE_LOST'], check=True)

    def test_truncate(self):
        """What was pinned, who broke it, what was done: each can be found by its fields."""
        path = self.make_file()
        holder = self.hold(path)
        pid, result = self.truncate(path)
        self.expect_truncated(path, result)
        holder.expect_release()
        fields = {'PINBROKER_PATH': path}
        journal(MESSAGES['LEASE_TAKEN'], **fields)
        journal(MESSAGES['LEASE_BROKEN'], **fields)
        started = journal(MESSAGES['REVOKE_STARTED'], **fields)
        self.assertTrue(int(started['PINBROKER_REVOCATION']) > 0)
        fields['PINBROKER_REVOCATION'] = started['PINBROKER_REVOCATION']
        blamed = journal(MESSAGES['REVOKE_BLAMED'], **fields)
        self.assertEqual((blamed['PINBROKER_BREAKER_PID'], blamed['PINBROKER_CAUSE']),
                         (str(pid), 'truncate'))
        ended = journal(MESSAGES['REVOKE_ENDED'], **fields)
        self.assertEqual((ended['PINBROKER_OUTCOME'], ended['SYSLOG_IDENTIFIER']),
                         ('released', 'pinbrokerd'))


class Files(Case):
    """ProtectSystem=, ProtectHome= and PrivateTmp= are about the daemon's own view: not about files that
    others hand it."""

    def hold_back(self, directory, owner=0, user='root'):
        path = self.make_file(directory, owner)
        holder = self.hold(path, user=user)
        self.assertEqual([pid for _, _, pid in leases(path)], [daemon_pid()])
        pid, result = self.truncate(path)
        self.assertEqual(holder.expect('revoked')['path'], path)
        # it is waiting for its holder, whom somebody has to wait for as well
        holder.expect_release()
        self.expect_truncated(path, result)

    def test_tmpfs(self):
        self.hold_back('/dev/shm')

    def test_ext4(self):
        self.assertEqual(output('stat', '-f', '-c', '%T', '/var/tmp').strip(), 'ext2/ext3')
        self.hold_back('/var/tmp')

    def test_xfs(self):
        self.hold_back('/mnt/xfs')

    def test_dax(self):
        """The kernel pins nothing there, which the holder is told."""
        result = run('pinbrokerctl', 'hold', '--access', 'write', self.make_file('/mnt/dax'))
        self.assertNotEqual(result.returncode, 0, result)
        self.assertIn('on-demand', result.stderr)

    def test_tmp(self):
        self.hold_back('/tmp')

    def test_home(self):
        self.hold_back('/home')

    def test_home_of_a_user(self):
        self.hold_back('/home/tester', TESTER, 'tester')

    def test_root(self):
        self.hold_back('/root')


class Ladder(Case):
    """Who does not let go is made to."""

    def expect_force(self, **kwargs):
        path = self.make_file(owner=kwargs.pop('owner', 0))
        holder = self.hold(path, '--on-revoke', 'ignore', **kwargs)
        _, result = self.truncate(path)
        seconds = self.expect_truncated(path, result)
        self.assertGreaterEqual(seconds, GRACE - 0.01)
        ended = journal(MESSAGES['REVOKE_ENDED'], PINBROKER_PATH=path)
        self.assertEqual(ended['PINBROKER_OUTCOME'], 'released')
        return ended['PINBROKER_REVOCATION'], holder

    def test_detach(self):
        """An io_uring's buffer: its holder lives on, and says so."""
        revocation, holder = self.expect_force()
        entry = journal(MESSAGES['REVOKE_ESCALATED'], PINBROKER_REVOCATION=revocation)
        self.assertEqual(entry['PINBROKER_CLIENT_PID'], str(holder.pid))
        self.assertEqual(holder.expect_release()['by'], 'force')

    def test_detach_of_a_user(self):
        """... also one of another user's."""
        _, holder = self.expect_force(owner=TESTER, user='tester')
        self.assertEqual(holder.expect_release()['by'], 'force')

    def test_signal(self):
        """Another user's holder, of what cannot be detached: an eventfd."""
        from world import Holder as PlainHolder, fork_nobody, NOBODY
        path = self.make_file(owner=NOBODY)
        ready, end = os.pipe()

        def ignore():
            holder = PlainHolder(ADDRESS, path)
            os.write(end, b'x')
            signal.pause()
            return holder.pins
        pid, answer = fork_nobody(ignore)
        os.close(end)
        with answer, os.fdopen(ready, 'rb') as ready:
            self.assertEqual(ready.read(1), b'x', answer.read() if is_readable(answer, 0) else '')
            _, result = self.truncate(path)
            self.assertGreaterEqual(self.expect_truncated(path, result), GRACE - 0.01)
        self.assertEqual(os.waitpid(pid, 0)[1] & 0x7f, signal.SIGBUS)

    def test_administrator(self):
        """pinbrokerctl revoke, with less time than configured."""
        path = self.make_file()
        holder = self.hold(path, '--on-revoke', 'ignore')
        output('pinbrokerctl', 'revoke', '--file', path, '--reason', 'umount soon', '--timeout', '1')
        ended = journal(MESSAGES['REVOKE_ENDED'], PINBROKER_PATH=path)
        self.assertEqual((ended['PINBROKER_CAUSE'], ended['PINBROKER_OUTCOME']), ('admin', 'released'))
        self.assertEqual(holder.expect('revoked')['reason'], 'umount soon')


class Restart(Case):
    """The daemon's end is nobody else's."""

    def setUp(self):
        super().setUp()
        self.path = self.make_file()
        self.holder = self.hold(self.path)
        self.before = daemon_pid()
        self.pins = output('pinbrokerctl', '--json=short', 'list', 'pins')

    def tearDown(self):
        self.assertEqual(show(SERVICE, 'ActiveState'), 'active')

    def expect_going_on(self, result=None):
        """What was pinned is, and whoever wants it waits for the holder, who is told."""
        restored = journal(MESSAGES['STATE_RESTORED'], _PID=daemon_pid())
        self.assertRegex(restored['MESSAGE'], '^Took up 1 pin of 1 file .* 0 objects lost')
        self.assertNotEqual(daemon_pid(), self.before)
        if not result:
            self.assertEqual(output('pinbrokerctl', '--json=short', 'list', 'pins'), self.pins)
            self.assertEqual(len(leases(self.path)), 1)
            _, result = self.truncate(self.path)
        self.assertEqual(self.holder.expect('revoked')['path'], self.path)
        self.holder.expect_release()
        self.expect_truncated(self.path, result)

    def wait_for_restart(self):
        """Until it is another process, that serves."""
        end = time.monotonic() + TIMEOUT
        while (daemon_pid() in (0, self.before) or
               show(SERVICE, 'SubState') != 'running'):  # systemctl cannot wait for that
            self.assertLess(time.monotonic(), end)

    def test_systemctl_restart(self):
        output('systemctl', 'restart', SERVICE)
        self.expect_going_on()

    def test_killed(self):
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        self.wait_for_restart()
        self.expect_going_on()

    def test_killed_with_helpers(self):
        """They end with it, so that the manager waits for nobody before it starts the next."""
        with open(f'/sys/fs/cgroup{show(SERVICE, "ControlGroup")}/cgroup.procs', encoding='ascii') as f:
            pids = [int(pid) for pid in f]
        self.assertEqual(len(pids), 4)  # the keeper, the sentinel, and a spare
        pidfds = [os.pidfd_open(pid) for pid in pids]
        begin = time.monotonic()
        os.kill(self.before, signal.SIGKILL)
        for fd in pidfds:
            self.assertTrue(is_readable(fd, TIMEOUT))
            os.close(fd)
        self.wait_for_restart()
        # the rest is how long programs take to start on an emulated processor
        self.assertLess(int(show(SERVICE, 'ExecMainStartTimestampMonotonic')) / SECOND - begin, 1)
        self.expect_going_on()

    def test_killed_under_a_break(self):
        """Somebody began to wait while nobody was there."""
        output('systemctl', 'kill', '--signal=STOP', '--kill-whom=main', SERVICE)
        _, result = self.truncate(self.path)
        self.assertFalse(is_readable(result, 1))
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        self.wait_for_restart()
        self.expect_going_on(result)

    def test_watchdog(self):
        """One that hangs is ended by the manager, long before the kernel's patience is."""
        output('systemctl', 'kill', '--signal=STOP', '--kill-whom=main', SERVICE)
        _, result = self.truncate(self.path)
        self.wait_for_restart()
        output('journalctl', '--boot', '--grep', 'Watchdog timeout', '-u', SERVICE)
        self.expect_going_on(result)

    def test_left_by_hand(self):
        """It ends well, as it was told to, and follows itself."""
        output('systemctl', 'kill', '--signal=USR1', '--kill-whom=main', SERVICE)
        self.wait_for_restart()
        self.expect_going_on()

    def test_reload(self):
        """Everything stays as it is, but for what the configuration says."""
        with open(DROP_IN, encoding='utf-8') as f:
            text = f.read()

        def configure(text):
            with open(DROP_IN, 'w', encoding='utf-8') as f:
                f.write(text)
            output('systemctl', 'reload', SERVICE)
        self.addCleanup(configure, text)
        configure(text.replace(f'RevokeGraceSec={GRACE}s', 'RevokeGraceSec=3min'))
        end = time.monotonic() + TIMEOUT
        while show(SERVICE, 'SubState') != 'running':  # the signal may come a little later
            self.assertLess(time.monotonic(), end)
        output('journalctl', '--boot', '--grep', 'Read the configuration anew', '-u', SERVICE)
        self.assertEqual(daemon_pid(), self.before)
        self.assertEqual(output('pinbrokerctl', '--json=short', 'list', 'pins'), self.pins)
        _, result = self.truncate(self.path)
        self.holder.expect('revoked')
        self.holder.expect_release()
        self.expect_truncated(self.path, result)

    def test_killed_while_it_stops(self):
        """What had not been let go of is there afterwards, where systemd keeps it; where it does not, the holder
        is told.
        """
        stubborn = self.make_file()
        holder = self.hold(stubborn, '--on-revoke', 'ignore')
        output('systemctl', 'stop', '--no-block', SERVICE)
        self.assertEqual(holder.expect('revoked')['cause'], 'shutdown')
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        output('systemctl', 'start', SERVICE)
        self.wait_for_restart()
        if show(SERVICE, 'FileDescriptorStorePreserve') == 'yes':  # systemd 254
            restored = journal(MESSAGES['STATE_RESTORED'], _PID=daemon_pid())
            self.assertRegex(restored['MESSAGE'], r'^Took up \d pins? of \d files? .* 0 objects lost')
            self.assertEqual(len(leases(stubborn)), 1)
        else:
            self.assertEqual(holder.expect('revoked')['cause'], 'lost')

    def hang(self, sign):
        """Deaf to all signals, with its loop stuck, when the sign is there."""
        def configure(text):
            os.makedirs(os.path.dirname(UNIT_DROP_IN), exist_ok=True)
            with open(UNIT_DROP_IN, 'w', encoding='utf-8') as f:
                f.write(text)
            output('systemctl', 'daemon-reload')
        self.addCleanup(configure, '')
        configure('[Service]\nEnvironment=LD_PRELOAD=/build/tests/integration/die-at.so '
                  f'HANG_IF={sign}\n')
        output('systemctl', 'restart', SERVICE)
        self.wait_for_restart()
        self.before = daemon_pid()
        with open(sign, 'w', encoding='ascii'):
            pass

    def test_hang(self):
        """The watchdog ends it."""
        sign = '/run/pinbroker/hang'
        self.hang(sign)
        end = time.monotonic() + TIMEOUT
        while os.path.exists(sign):  # it is about to do something
            self.assertLess(time.monotonic(), end)
        _, result = self.truncate(self.path)
        self.wait_for_restart()
        self.expect_going_on(result)

    def test_hang_before_it_is_ready(self):
        """... and so does the time that it has for its start."""
        self.hang('/run/pinbroker/hang')
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        _, result = self.truncate(self.path)
        self.wait_for_restart()
        output('journalctl', '--boot', '--grep', 'start operation timed out', '-u', SERVICE)
        self.expect_going_on(result)

    def test_socket_meanwhile(self):
        """It keeps who comes while nobody is there."""
        output('systemctl', 'kill', '--signal=KILL', '--kill-whom=main', SERVICE)
        connection = Connection(ADDRESS)
        self.addCleanup(connection.close)
        connection.socket.settimeout(TIMEOUT)
        self.assertEqual(connection.call('org.varlink.service.GetInfo')['product'], 'pinbrokerd')
        self.wait_for_restart()
        self.expect_going_on()


if __name__ == '__main__':
    case.main()
