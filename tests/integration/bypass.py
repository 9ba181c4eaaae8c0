#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done to a pinned file where no lease holds it up: while it is exposed, through an overlay, through a
descriptor that the broker handed out, or after the kernel's time is over (I1).
"""

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import time
import unittest

import rules
from client import PAGE, SLOWNESS, WAIT, is_readable
from holders import Process
from world import DAEMON, READY, SIZE, Case, DeafManager

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
WRITES = 20000
HUGE_PAGES = '/proc/sys/vm/nr_hugepages'


def punch(fd, offset, length):
    if LIBC.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, ctypes.c_long(offset),
                      ctypes.c_long(length)) < 0:
        raise OSError(ctypes.get_errno(), 'fallocate')


class Bypass(Case):
    def setUp(self):
        super().setUp()
        # what is revoked by force is ours, and we are not quick enough
        before = signal.signal(signal.SIGBUS, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGBUS, before)

    def launch(self, config='', env=None):
        self.write(self.config, config)
        manager = DeafManager(os.path.join(self.dir, f'ready-{time.monotonic_ns()}'))
        daemon = self.spawn([DAEMON] + self.arguments(self.path),
                            env={'NOTIFY_SOCKET': manager.address, **(env or {})})
        manager.wait_for(READY)
        manager.close()
        return daemon

    def revocations(self):
        return self.connect().list('org.pinbroker.ListRevocations')

    def told(self, holder, seconds=1):
        """The conflict that it is told of within that time."""
        self.assertTrue(is_readable(holder.watch.socket, seconds), 'nothing is told')
        return holder.notice()['conflict']

    def overlay(self, function):
        """Has another process do it to the file's directory through an overlay."""
        for name in ('upper', 'work', 'merged', 'lower'):
            os.mkdir(os.path.join(self.dir, name))
        os.rename(self.file, os.path.join(self.dir, 'upper', 'data'))
        self.file = os.path.join(self.dir, 'upper', 'data')
        yield
        pid = os.fork()
        if pid == 0:
            try:
                LIBC.unshare(CLONE_NEWNS)
                LIBC.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None)
                options = ','.join(f'{option}dir={self.dir}/{option}' for option in
                                   ('lower', 'upper', 'work'))
                if LIBC.mount(b'overlay', f'{self.dir}/merged'.encode(), b'overlay', 0,
                              options.encode()) < 0:
                    os._exit(77)
                function(os.path.join(self.dir, 'merged', 'data'))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 77:
            self.skipTest('no overlay can be mounted there')
        self.assertEqual(status, 0)
        yield

    def through_overlay(self, env=None):
        steps = self.overlay(lambda path: os.truncate(path, PAGE))
        next(steps)
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n', env)
        holder = self.hold()
        next(steps)
        conflict = self.told(holder)
        self.assertEqual((conflict['cause'], conflict['size']), ('shrink', PAGE))
        daemon.wait_for_log('truncated to 4096 bytes past its lease, under 1 pin:')
        holder.release()

    def test_truncate_through_overlay(self):
        """No lease is asked, but it is seen."""
        self.through_overlay()

    def test_unwatched(self):
        """Nor does it take inotify."""
        self.through_overlay({
            'LD_PRELOAD': os.environ['REFUSE_WATCH'],
            'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':verify_asan_link_order=0'})

    def expose(self):
        """A reader is admitted: the lease is gone while it is there."""
        reader = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        self.addCleanup(os.close, reader)
        self.assertTrue(self.connect().list('org.pinbroker.ListFiles')[0]['exposed'])

    def test_overflow(self):
        """The queue of events is full: each file is looked at."""
        with open('/proc/sys/fs/inotify/max_queued_events', encoding='ascii') as f:
            n_events = int(f.read())
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')
        busy = [self.hold(file=self.make_file(f'busy-{i}')) for i in range(2)]
        # several times, as each file is looked at now and then anyway
        for i in range(3):
            holder = self.hold(file=self.make_file(f'data-{i}'))
            daemon.kill(signal.SIGSTOP)
            os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
            for k in range(n_events + 100):
                os.pwrite(busy[k % 2].fd, b'b', 0)
            os.ftruncate(holder.fd, PAGE)
            daemon.kill(signal.SIGCONT)
            self.assertEqual(self.told(holder)['cause'], 'shrink')
            holder.release()

    def test_regrown(self):
        """It is as long as before when anybody looks; its pages are gone."""
        daemon = self.launch('[Files]\nReaders=admit\n[Revocation]\nRevokeGraceSec=20s\n')
        holder = self.hold()
        self.expose()
        fd = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        self.addCleanup(os.close, fd)
        daemon.kill(signal.SIGSTOP)  # it cannot look in between
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, SIZE)
        daemon.kill(signal.SIGCONT)
        self.assertEqual(self.told(holder)['cause'], 'shrink')
        daemon.wait_for_log('Pages were taken from .* while it was exposed, under 1 pin:')
        holder.release()

    def test_regrown_on_disk(self):
        """Pages that the kernel may drop, as it is not known that they are pinned, are on the disk at least."""
        for kind in ('ext4', 'xfs', 'btrfs'):
            if not shutil.which('mkfs.' + kind):
                continue
            with self.subTest(kind=kind), rules.mounted(kind) as mount:
                self.file = os.path.join(mount, 'data')
                self.write(self.file, 'a' * 2 * SIZE)
                daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')
                holder = self.hold()
                # they are dropped, and it has less behind them
                os.fsync(holder.fd)
                os.posix_fadvise(holder.fd, 0, 2 * SIZE, os.POSIX_FADV_DONTNEED)
                os.ftruncate(holder.fd, SIZE)
                self.assertFalse(is_readable(holder.watch.socket, 0.3))
                daemon.kill(signal.SIGSTOP)
                os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
                os.ftruncate(holder.fd, SIZE - 2 * PAGE)
                os.ftruncate(holder.fd, SIZE)
                daemon.kill(signal.SIGCONT)
                self.assertEqual(self.told(holder)['cause'], 'shrink')
                daemon.wait_for_log('Pages were taken from .* past its lease, under 1 pin')
                holder.release()
                self.expect_end(daemon)

    def test_rewritten(self):
        """Nothing shows what was done to its pages, but somebody did something: a break that comes late."""
        daemon = self.launch('[Files]\nReaders=admit\n[Revocation]\nRevokeGraceSec=20s\n')
        holder = self.hold()
        self.expose()
        daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        fd = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b'b' * SIZE, 0)
        os.close(fd)
        daemon.kill(signal.SIGCONT)
        self.assertEqual(self.told(holder)['cause'], 'modify')
        self.assertEqual(self.revocations()[0]['state'], 'notified')
        daemon.wait_for_log('opened for writing and changed while it was exposed')
        holder.release()

    def test_time_of_the_forced(self):
        """A holder that cannot be detached has the time that it is told of, and a signal no sooner."""
        daemon = self.launch()
        holder = self.hold()
        heard, number = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.addCleanup(os.close, heard)
        self.addCleanup(os.close, number)
        self.addCleanup(signal.set_wakeup_fd, signal.set_wakeup_fd(number))
        signal.signal(signal.SIGBUS, lambda *_: None)
        os.ftruncate(holder.fd, PAGE)
        notice = holder.notice()
        self.assertEqual(notice['conflict']['cause'], 'shrink')
        self.assertGreater(notice['deadlineUSec'] / 1e6, time.monotonic() + 0.5)
        self.assertFalse(is_readable(heard, 0.5), 'it was signalled')
        holder.release()
        self.assertEqual(self.revocations()[0]['state'], 'released')
        self.assertNotIn('Sent SIG', daemon.text())
        # it has no more than that
        holder = self.hold(file=self.make_file('ignored'))
        os.ftruncate(holder.fd, PAGE)
        deadline = holder.notice()['deadlineUSec'] / 1e6
        self.assertTrue(is_readable(heard, WAIT), 'it was not signalled')
        self.assertGreaterEqual(time.monotonic(), deadline)
        holder.release()

    def test_punched(self):
        """Through the description that is shared: the pins there are revoked, and no others."""
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n')
        holder = self.hold()
        holder.release()
        holder.pins = holder.connection.call('org.pinbroker.Pin', {
            'file': holder.file, 'context': holder.context, 'access': 'write',
            'ranges': [{'offset': n * 4 * PAGE, 'length': 4 * PAGE} for n in range(2)]})['pins']
        punch(holder.fd, 9 * PAGE, PAGE)
        punch(holder.fd, 5 * PAGE, PAGE)
        conflict = self.told(holder)
        self.assertEqual((conflict['cause'], conflict['offset'], conflict['length']),
                         ('shrink', 4 * PAGE, 4 * PAGE))
        daemon.wait_for_log('Pages were taken from .* past its lease, under 1 pin:')
        self.assertEqual([r['pins'] for r in self.revocations()], [1])
        holder.release()

    def test_punched_hugetlbfs(self):
        """Which page it was is not known there, but that there are too few."""
        huge = 2 << 20
        with open(HUGE_PAGES, encoding='ascii') as f:
            before = f.read()
        self.addCleanup(self.write, HUGE_PAGES, before)
        self.write(HUGE_PAGES, str(int(before) + 4))
        mount = os.path.join(self.dir, 'huge')
        os.mkdir(mount)
        subprocess.run(['mount', '-t', 'hugetlbfs', '-o', 'pagesize=2M', 'none', mount], check=True)
        self.addCleanup(subprocess.run, ['umount', '-l', mount], check=True)
        self.file = os.path.join(mount, 'data')
        fd = os.open(self.file, os.O_RDWR | os.O_CREAT)
        if LIBC.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(3 * huge)) < 0:
            os.close(fd)
            self.skipTest('there are no huge pages')
        os.close(fd)
        self.launch('[Revocation]\nRevokeGraceSec=20s\n')
        holder = self.hold()
        holder.connection.call('org.pinbroker.Bind', {'pin': holder.connection.call(
            'org.pinbroker.Pin', {'file': holder.file, 'context': holder.context, 'access': 'write',
                                  'ranges': [{'offset': 0, 'length': 2 * huge}]})['pins'][0],
            'handle': 1})
        punch(holder.fd, 2 * huge, huge)
        self.assertFalse(is_readable(holder.watch.socket, 0.3))
        punch(holder.fd, huge, huge)
        self.assertEqual(self.told(holder)['cause'], 'shrink')

    def used(self, daemon):
        """Seconds of a CPU."""
        with open(f'/proc/{daemon.pid}/stat', encoding='ascii') as f:
            fields = f.read().rsplit(')', 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def write_honestly(self, holder):
        memory = mmap.mmap(holder.fd, SIZE)
        for i in range(WRITES):
            os.pwrite(holder.fd, b'c' * 64, i % 16 * PAGE)
            memory[i % 16 * PAGE] = i % 256
        memory.flush()
        os.fsync(holder.fd)
        os.ftruncate(holder.fd, 4 * SIZE)
        os.pwrite(holder.fd, b'c' * SIZE, SIZE)
        punch(holder.fd, SIZE, SIZE)
        os.ftruncate(holder.fd, 2 * SIZE)
        os.utime(self.file)
        memory.close()

    def test_honest(self):
        """What holders write, and what nobody has pinned, is no conflict, nor much work."""
        daemon = self.launch('[Files]\nReaders=admit\n')
        holder = self.hold()
        begin, before = time.monotonic(), self.used(daemon)
        self.write_honestly(holder)
        self.expose()
        self.write_honestly(holder)
        took, used = time.monotonic() - begin, self.used(daemon) - before
        # once each 2 ms, at most, which is much for an emulated machine, with what a burst may take
        self.assertLess(used, took / (4 if SLOWNESS < 10 else 1.5) + 0.1)
        self.assertFalse(is_readable(holder.watch.socket, 1))
        self.assertEqual(self.revocations(), [])
        holder.release()

    def test_read_and_touched(self):
        """A file that is held for reading may be given other times."""
        self.launch()
        connection = self.connect()
        connection.call('org.pinbroker.Hello', {'name': 'reader'})
        fd = os.open(self.file, os.O_PATH)
        self.addCleanup(os.close, fd)
        file = connection.call('org.pinbroker.OpenFile',
                               {'fileDescriptor': 0, 'access': 'read'}, [fd])['file']
        os.close(connection.fds[0])
        event = os.eventfd(0)
        self.addCleanup(os.close, event)
        context = connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                  [event])['context']
        connection.call('org.pinbroker.Pin', {
            'file': file, 'context': context, 'access': 'read',
            'ranges': [{'offset': 0, 'length': SIZE}]})
        for seconds in range(100):
            os.utime(self.file, (seconds, seconds))
            os.chmod(self.file, 0o600)
        self.assertEqual(self.revocations(), [])

    def test_taken_by_the_kernel(self):
        """Nobody had a look until its time was over: the truncate has gone through, and nobody waits."""
        daemon = self.launch('[Revocation]\nRevokeGraceSec=20s\n[Files]\nReaders=admit\n')
        self.set_lease_break_time(1)

        def ignore(say, hear):
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            holder = self.hold()
            say('holds')
            hear()
            del holder

        process = Process(self, ignore)
        self.assertEqual(process.hear(), 'holds')
        daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
        _, result = self.truncate()
        self.truncated(result)
        daemon.kill(signal.SIGCONT)
        daemon.wait_for_log('The lease of .* was lost, with 1 pin alive')
        daemon.wait_for_log('truncated to 4096 bytes while it was exposed')
        self.assertEqual(os.waitpid(process.pid, 0)[1], signal.SIGBUS)
        self.assertEqual([r['conflict']['cause'] for r in self.revocations()], ['shrink'], daemon.text())


if __name__ == '__main__':
    unittest.main()
