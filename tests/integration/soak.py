#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Thousands of holders come, pin, are revoked and go: the daemon keeps no descriptor and no memory.

The number of cycles may be given as an argument.
"""

import os
import signal
import sys
import time

sys.dont_write_bytecode = True

from client import Connection, WAIT, World, equal, expect  # noqa: E402

CYCLES = 10000
WARM = 1000
SLACK_KIB = 256


def cycle(world):
    connection, watch = Connection(world.path), Connection(world.path)
    hello = connection.call('org.pinbroker.Hello', {'name': 'visitor'})
    # the round trip to come shows that the watch is there before the notice is
    watch.send('org.pinbroker.Watch', {'client': hello['client'], 'token': hello['token']}, more=True)
    fd = os.open(world.file, os.O_PATH | os.O_CLOEXEC)
    file = connection.call('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'write'},
                           [fd])['file']
    leased = connection.fds[0]
    os.close(fd)
    event = os.eventfd(0, os.EFD_CLOEXEC)
    context = connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0}, [event])
    os.close(event)
    equal((context['kind'], context['forcible']), ('opaque', False))
    pins = connection.call('org.pinbroker.Pin', {
        'file': file, 'context': context['context'], 'access': 'write', 'label': 'visitor',
        'ranges': [{'offset': 0, 'length': 4096}]})['pins']
    try:
        os.close(os.open(world.file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        raise AssertionError('the lease let somebody in')
    except BlockingIOError:
        pass  # he is told to go away, and the revocation runs all the same
    notice = watch.reply('org.pinbroker.Watch')[0]['notice']
    equal(notice['pins'], pins)
    equal(connection.call('org.pinbroker.Unpin', {'pins': pins})['ended'], [])
    # the next holder's lease wants the only description
    os.close(leased)
    connection.close()
    watch.close()


def settled_fds(world, expected):
    """The daemon's descriptors, once those that are being closed are."""
    other = Connection(world.path)
    end = time.monotonic() + WAIT
    while world.fds() > expected + 1 and time.monotonic() < end:
        other.call('org.varlink.service.GetInfo')
    n = world.fds() - 1
    other.close()
    return n


def main():
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else CYCLES
    warm = WARM if cycles > WARM else cycles // 10
    signal.alarm(600)
    with World() as world:
        world.start()
        idle = world.fds()
        own = len(os.listdir('/proc/self/fd'))
        begin = time.monotonic()
        for n in range(1, cycles + 1):
            cycle(world)
            if n == warm:
                warm_kib = world.rss_kib()
        took = time.monotonic() - begin
        fds, kib = settled_fds(world, idle), world.rss_kib()
        print(f'{cycles} cycles in {took:.1f} s; descriptors {idle} before, {fds} after; '
              f'RSS {warm_kib} KiB after {warm}, {kib} KiB at the end')
        other = Connection(world.path)
        for what in ('Clients', 'Files', 'Contexts', 'Pins'):
            equal(other.list('org.pinbroker.List' + what), [])
        other.close()
        equal(len(os.listdir('/proc/self/fd')), own)
        expect(fds <= idle, f'{fds} descriptors, not {idle}')
        expect(kib <= warm_kib + SLACK_KIB or os.environ.get('PINBROKER_SANITIZED'),
               f'{kib - warm_kib} KiB more than after {warm} cycles')
        world.stop()


if __name__ == '__main__':
    main()
