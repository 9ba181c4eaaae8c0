#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What may be opened and pinned, by whom, and how much: each rule of the broker with the refusal that
names it, on every file system that it knows and the machine has."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time

from client import (Connection, PAGE, Refused, Ring, SIZE, WAIT, World, equal, expect,
                    truncate_in_child)

PB = 'org.pinbroker.'
FILE_SYSTEMS = ('ext4', 'xfs', 'btrfs', 'hugetlbfs')


class Holder:
    def __init__(self, world, name=None):
        self.connection = Connection(world.path)
        hello = self.call('Hello', {'name': name})
        self.client = {'client': hello['client'], 'token': hello['token']}

    def call(self, method, parameters=None, fds=()):
        return self.connection.call(PB + method, parameters, fds)

    def refused(self, error, expected, method, parameters, fds=()):
        self.connection.refused(PB + error if '.' not in error else error, expected, PB + method,
                                parameters, fds)

    def invalid(self, parameter, method, parameters):
        self.refused('org.varlink.service.InvalidParameter', {'parameter': parameter}, method,
                     parameters)

    def open(self, path, access='read', flags=os.O_PATH, refused=None, cause=None):
        fd = os.open(path, flags | os.O_CLOEXEC)
        parameters = {'fileDescriptor': 0, 'access': access}
        try:
            if refused:
                return self.refused(refused, {'cause': cause}, 'OpenFile', parameters, [fd])
            reply = self.call('OpenFile', parameters, [fd])
        finally:
            os.close(fd)
        for received in self.connection.fds:
            os.close(received)
        return reply

    def preflight(self, path, access):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return self.call('Preflight', {'fileDescriptor': 0, 'access': access}, [fd])
        finally:
            os.close(fd)

    def context(self):
        fd = os.eventfd(0)
        try:
            return self.call('AddContext', {'fileDescriptor': 0}, [fd])['context']
        finally:
            os.close(fd)

    def close(self):
        self.connection.close()


def ranges(*pairs):
    return [{'offset': offset, 'length': length} for offset, length in pairs]


def break_lease(path):
    """Somebody wants to write, and does not wait."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except OSError as e:
        equal(e.errno, errno.EAGAIN)
        return True
    return False


def revocation_of(h, path):
    """Of which its holders have been told: a break is heard of a moment after whoever caused it is answered."""
    end = time.monotonic() + WAIT
    while True:
        for r in h.connection.list(PB + 'ListRevocations'):
            if (r['path'], r['state']) == (path, 'notified') and r['remaining'] > 0:
                return r
        expect(time.monotonic() < end)


def write_at_last(path):
    """With nothing pinned a lease that is in the way is given up at once, if not in time for those
    who do not wait."""
    end = time.monotonic() + WAIT
    while break_lease(path):
        expect(time.monotonic() < end)


@contextlib.contextmanager
def running(settings=''):
    with World() as world:
        world.start(settings)
        yield world
        world.stop()


def test_ranges():
    with running() as world:
        h = Holder(world)
        pin = {'file': h.open(world.file)['file'], 'context': h.context(), 'access': 'read'}

        pins = h.call('Pin', pin | {'ranges': ranges(*[(0, PAGE)] * 1024)})['pins']
        equal(len(set(pins)), 1024)
        equal(h.connection.list(PB + 'ListClients')[0]['pinnedBytes'], 1024 * PAGE)
        equal(h.call('Unpin', {'pins': pins[:1000]}), {'ended': []})
        equal(h.connection.list(PB + 'ListClients')[0]['pinnedBytes'], 24 * PAGE)
        h.call('Unpin', {'pins': pins[1000:]})
        equal(h.connection.list(PB + 'ListClients')[0]['pinnedBytes'], 0)
        for bad in ([], [(0, PAGE)] * 1025, [(0, 0)], [(-PAGE, PAGE)], [(0, -1)],
                    [(2 ** 63 - 1, 1)], [(PAGE, 2 ** 63 - 1)], [(0, PAGE), (0, 0)]):
            h.invalid('ranges', 'Pin', pin | {'ranges': ranges(*bad)})
        h.refused('BeyondEndOfFile', {'offset': SIZE, 'length': 1, 'size': SIZE}, 'Pin',
                  pin | {'ranges': ranges((0, PAGE), (SIZE, 1))})
        h.refused('BeyondEndOfFile', {'offset': 1, 'length': SIZE, 'size': SIZE}, 'Pin',
                  pin | {'ranges': ranges((1, SIZE))})
        h.refused('NotAllowed', {'cause': 'readOnly'}, 'Pin',
                  pin | {'access': 'write', 'ranges': ranges((0, PAGE))})
        equal(h.connection.list(PB + 'ListPins'), [])


def test_revocation_in_the_way():
    with running() as world:
        h, other = Holder(world), Holder(world)
        file, context = h.open(world.file)['file'], h.context()
        pin = {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((0, PAGE))}
        reserved = h.call('Pin', pin)['pins']
        other.open(world.file)
        other_pin = pin | {'context': other.context()}
        expect(break_lease(world.file))
        revocation = revocation_of(h, world.file)
        equal(revocation['remaining'], 1)

        h.refused('RangeConflict', {'revocation': revocation['revocation']}, 'Pin', pin)
        Holder(world).open(world.file, refused='Busy', cause='revoking')
        other.refused('RangeConflict', {'revocation': revocation['revocation']}, 'Pin', other_pin)
        other.refused('NoSuchObject', {}, 'Extend',
                      {'revocation': revocation['revocation'], 'byUSec': 1})
        h.call('Extend', {'revocation': revocation['revocation'], 'byUSec': 0})
        # whatever is asked for, the rest of the ladder fits before the kernel takes the lease
        with open('/proc/sys/fs/lease-break-time', encoding='ascii') as f:
            seconds = int(f.read())
        deadline = h.call('Extend', {'revocation': revocation['revocation'],
                                     'byUSec': 2 ** 62})['deadlineUSec']
        expect(seconds < 20 or deadline <= revocation['startUSec'] + (seconds - 9) * 10 ** 6, deadline)
        # never bound, it is let go like any other
        h.call('Unpin', {'pins': reserved})
        equal(h.connection.list(PB + 'ListRevocations')[0]['state'], 'released')
        h.refused('NoSuchObject', {}, 'Extend',
                  {'revocation': revocation['revocation'], 'byUSec': 1})
        write_at_last(world.file)
        other.call('Unpin', {'pins': other.call('Pin', other_pin)['pins']})


def test_leaving():
    """A pin that was let go of and is not gone yet is its holder's no more; it is waited for."""
    with running() as world:
        h, ring = Holder(world), Ring()
        file = h.open(world.file)['file']
        context = h.call('AddContext', {'remoteDescriptor': ring.fd})['context']
        memory = mmap.mmap(-1, PAGE)
        view = ctypes.c_char.from_buffer(memory)
        ring.register(ctypes.addressof(view), PAGE)
        pin = h.call('Pin', {'file': file, 'context': context, 'access': 'read',
                             'ranges': ranges((0, PAGE))})['pins'][0]
        h.call('Bind', {'pin': pin, 'handle': 0})
        expect(break_lease(world.file))
        h.call('Unpin', {'pins': [pin]})
        equal([p['state'] for p in h.connection.list(PB + 'ListPins')], ['leaving'])
        h.refused('NoSuchObject', {'type': 'pin', 'id': pin}, 'Bind', {'pin': pin, 'handle': 0})
        equal(h.connection.list(PB + 'ListRevocations')[0]['state'], 'notified')
        ring.unregister()
        write_at_last(world.file)
        equal(h.connection.list(PB + 'ListPins'), [])
        del view
        memory.close()
        os.close(ring.fd)


def test_who_comes_later():
    """One who did not wait leaves no trace; one who then waits for the same break is found all the same."""
    with running() as world:
        h = Holder(world)
        pins = h.call('Pin', {'file': h.open(world.file)['file'], 'context': h.context(),
                              'access': 'read', 'ranges': ranges((0, PAGE))})['pins']
        expect(break_lease(world.file))
        pid, result = truncate_in_child(world.file, PAGE)
        world.wait_for_log(lambda: any(f'on behalf of python3 (pid {pid})' in line
                                       for line in world.log))
        conflict = h.connection.list(PB + 'ListRevocations')[0]['conflict']
        equal((conflict['cause'], conflict['size'], conflict['pid']), ('truncate', PAGE, pid))
        h.call('Unpin', {'pins': pins})
        os.waitpid(pid, 0)
        os.close(result)


def test_reading_and_writing():
    with running() as world:
        h, other = Holder(world), Holder(world)
        file, context = h.open(world.file)['file'], h.context()
        pin = {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((0, PAGE))}
        pins = h.call('Pin', pin)['pins']
        # not while it is pinned, nor while another has it, …
        h.open(world.file, 'write', refused='Busy', cause='heldForReading')
        h.call('Unpin', {'pins': pins})
        other.open(world.file)
        h.open(world.file, 'write', refused='Busy', cause='heldForReading')
        other.call('CloseFile', {'file': file})
        # … but for the only one, whose it becomes for writing
        opened = h.open(world.file, 'write')
        equal((opened['file'], opened['info']['access']), (file, 'write'))
        h.call('Unpin', {'pins': h.call('Pin', pin | {'access': 'write'})['pins']})
        # a second one who writes shares it
        equal(other.open(world.file, 'write')['file'], file)


def test_others_objects():
    with running() as world:
        h, other = Holder(world), Holder(world)
        file, context = h.open(world.file)['file'], h.context()
        pin = {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((0, PAGE))}
        pins = h.call('Pin', pin)['pins']
        own = other.context()
        other.refused('NoSuchObject', {'type': 'pin', 'id': pins[0]}, 'Unpin', {'pins': pins})
        other.refused('NoSuchObject', {'type': 'pin'}, 'Bind', {'pin': pins[0], 'handle': 1})
        other.refused('NoSuchObject', {'type': 'file'}, 'CloseFile', {'file': file})
        other.refused('NoSuchObject', {'type': 'context'}, 'RemoveContext', {'context': context})
        other.refused('NoSuchObject', {'type': 'file'}, 'Pin', pin)
        other.refused('NoSuchObject', {'type': 'file'}, 'Pin', pin | {'context': own})
        other.open(world.file)
        other.refused('NoSuchObject', {'type': 'context'}, 'Pin', pin)
        # a token is good for its own client only
        token = h.client['token']
        changed = [token[:i] + ('1' if token[i] == '0' else '0') + token[i + 1:]
                   for i in (0, len(token) // 2, len(token) - 1)]
        for wrong in (other.client['token'], token[:-1], token + '0', '', *changed):
            stranger = Connection(world.path)
            for method in ('Resume', 'Watch'):
                try:
                    stranger.send(PB + method, {'client': h.client['client'], 'token': wrong},
                                  more=method == 'Watch')
                    stranger.reply(PB + method)
                except Refused as e:
                    equal(e.error, PB + 'NoSuchObject')
                else:
                    raise AssertionError(method)
            stranger.close()
        equal([p['pin'] for p in h.connection.list(PB + 'ListPins')], pins)
        again = Connection(world.path)
        equal(again.call(PB + 'Resume', h.client), {'notices': []})
        again.call(PB + 'Unpin', {'pins': pins})


def test_limits():
    settings = ('[Limits]\nMaxClientsPerUser=6\nMaxFilesPerUser=1\nMaxContextsPerUser=2\n'
                f'MaxPinsPerUser=3\nMaxPinnedBytesPerUser={3 * PAGE}\n')
    with running(settings) as world:
        h = Holder(world)
        second = os.path.join(world.dir, 'second')
        with open(second, 'wb') as f:
            f.write(b'b' * PAGE)

        def limit(name, maximum, used, *args):
            h.refused('LimitExceeded', {'limit': name, 'maximum': maximum, 'used': used}, *args)

        file = h.open(world.file)['file']
        fd = os.open(second, os.O_PATH)
        limit('MaxFilesPerUser', 1, 1, 'OpenFile', {'fileDescriptor': 0, 'access': 'read'}, [fd])
        contexts = [h.context(), h.context()]
        limit('MaxContextsPerUser', 2, 2, 'AddContext', {'fileDescriptor': 0}, [os.eventfd(0)])
        pin = {'file': file, 'context': contexts[0], 'access': 'read'}
        small, large = ranges((0, 1)), ranges((0, 2 * PAGE))
        pins = h.call('Pin', pin | {'ranges': small * 2})['pins']
        # all or nothing, and what is refused costs nothing
        for _ in range(5):
            limit('MaxPinsPerUser', 3, 2, 'Pin', pin | {'ranges': small * 2})
        pins += h.call('Pin', pin | {'ranges': large})['pins']
        h.call('Unpin', {'pins': pins[:2]})
        limit('MaxPinnedBytesPerUser', 3 * PAGE, 2 * PAGE, 'Pin', pin | {'ranges': large})
        h.call('Unpin', {'pins': pins[2:]})
        h.call('Unpin', {'pins': h.call('Pin', pin | {'ranges': small * 3})['pins']})
        h.call('RemoveContext', {'context': contexts[1]})
        h.context()
        h.call('CloseFile', {'file': file})
        h.open(second)
        os.close(fd)

        # Connections and clients count together: one of each so far.
        others = [Holder(world) for _ in range(2)]
        one_more = Connection(world.path)
        refusal = one_more.receive()
        equal((refusal['error'], refusal['parameters']['limit']),
              (PB + 'LimitExceeded', 'MaxClientsPerUser'))
        equal(one_more.receive(), None)
        one_more.close()
        others[0].close()
        end = time.monotonic() + WAIT
        while len(others[1].connection.list(PB + 'ListClients')) > 2:
            expect(time.monotonic() < end)
        Holder(world).close()


def test_client_that_has_gone():
    """What is done for one that does not wait for it leaves no descriptor behind."""
    with running() as world:
        h = Holder(world)
        h.open(world.file, 'write')
        h.context()
        fd, event, ring = os.open(world.file, os.O_PATH | os.O_CLOEXEC), os.eventfd(0), Ring()
        n_fds = world.fds()
        calls = (('OpenFile', {'fileDescriptor': 0, 'access': 'write'}, [fd]),
                 ('AddContext', {'fileDescriptor': 0}, [event]),
                 ('AddContext', {'remoteDescriptor': ring.fd}, []))
        for i in range(60):
            gone = Holder(world).connection
            gone.send(PB + calls[i % 3][0], *calls[i % 3][1:])
            gone.close()
            # of one that is still there, a connection
            gone = Connection(world.path)
            gone.call(PB + 'Resume', h.client)
            gone.send(PB + calls[0][0], *calls[0][1:])
            gone.close()
        end = time.monotonic() + WAIT
        while len(h.connection.list(PB + 'ListClients')) > 1 or world.fds() > n_fds:
            expect(time.monotonic() < end, world.fds(), n_fds)
        for number in (fd, event, ring.fd):
            os.close(number)


def test_open_descriptor_wanted():
    with running('[Files]\nRequireOpenDescriptor=yes\n') as world:
        h = Holder(world)
        h.open(world.file, refused='NotAllowed', cause='descriptor')
        expect(h.open(world.file, flags=os.O_RDONLY)['file'])
        # one for reading is no proof that it may be written
        h.open(world.file, 'write', flags=os.O_RDONLY, refused='NotAllowed', cause='descriptor')


@contextlib.contextmanager
def mounted(kind):
    with tempfile.TemporaryDirectory(prefix='pinbroker-test-', dir='/var/tmp') as directory:
        mount = os.path.join(directory, 'mnt')
        os.mkdir(mount)
        command = ['mount', '-t', 'hugetlbfs', 'none', mount]
        if kind != 'hugetlbfs':
            image = os.path.join(directory, 'image')
            with open(image, 'wb') as f:
                f.truncate(400 << 20)
            subprocess.run(['mkfs.' + kind, '-q', image], check=True, stdout=subprocess.DEVNULL)
            command = ['mount', '-o', 'loop', image, mount]
        subprocess.run(command, check=True)
        try:
            yield mount
        finally:
            subprocess.run(['umount', '-l', mount], check=True)


def backing(path, kind):
    """What is to be told of a file there."""
    if kind in ('tmpfs', 'hugetlbfs'):
        return {'kind': kind}
    device = os.stat(path).st_dev
    if os.major(device) == 0:  # btrfs has numbers of its own
        return {'kind': 'pageCache'}
    link = os.readlink(f'/sys/dev/block/{os.major(device)}:{os.minor(device)}')
    return {'kind': 'pageCache', 'deviceName': os.path.basename(link)}


def grants_leases(path):
    with open(path, 'rb') as f:
        try:
            fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as e:
            equal(e.errno, errno.EINVAL)
            return False
        return True


def test_file_system(kind):
    """Why it cannot be tested, or None."""
    with open('/proc/filesystems', encoding='ascii') as f:
        if kind not in f.read().split():
            return 'not known to this kernel'
    with mounted(kind) as mount, running() as world:
        path = os.path.join(mount, 'data')
        with open(path, 'wb') as f:
            f.truncate(4 << 20)
        if not grants_leases(path):
            return 'this kernel grants no leases there'
        h = Holder(world)
        for access in ('read', 'write'):
            opened = h.open(path, access)
            equal((opened['info']['fileSystem'], opened['info']['size']), (kind, 4 << 20))
            equal(opened['info']['backing'], backing(path, kind))
            pins = h.call('Pin', {'file': opened['file'], 'context': h.context(), 'access': access,
                                  'ranges': ranges((0, 4 << 20))})['pins']
            expect(break_lease(path))
            revocation_of(h, path)
            h.call('Unpin', {'pins': pins})
            write_at_last(path)
            h.call('CloseFile', {'file': opened['file']})
            flight = h.preflight(path, access)
            equal((flight['backing'], flight['pinnable'], 'pinReason' in flight),
                  (backing(path, kind), *(('unknown', True) if access == 'write' and kind not in
                                          ('tmpfs', 'hugetlbfs') else ('yes', False))))
        h.close()


def main():
    """All tests, or those that the arguments name."""
    signal.alarm(300)
    for test in (test_ranges, test_revocation_in_the_way, test_leaving, test_who_comes_later,
                 test_reading_and_writing, test_others_objects, test_limits,
                 test_client_that_has_gone, test_open_descriptor_wanted):
        if sys.argv[1:] and test.__name__ not in sys.argv[1:]:
            continue
        test()
        print(f'ok {test.__name__}', flush=True)
    skipped = False
    for kind in FILE_SYSTEMS:
        if sys.argv[1:] and kind not in sys.argv[1:]:
            continue
        reason = test_file_system(kind)
        print(f'ok {kind} # SKIP {reason}' if reason else f'ok {kind}', flush=True)
        skipped |= reason is not None
    sys.exit(77 if skipped else 0)


if __name__ == '__main__':
    main()
