#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that decides on opens (fanotify), as an on-access scanner does, is given what is opened open: it must not
have to wait for a lease to settle, as all who open anything there wait for it."""

import contextlib
import ctypes
import os
import select
import signal
import struct
import subprocess
import time

from client import SLOWNESS, WAIT, World, equal, expect
from names import CLONE_NEWNS, MS_PRIVATE, MS_REC, Held, make, make_directory, mounted
from tool import Tool

FAN_CLASS_CONTENT, FAN_MARK_ADD, FAN_MARK_FILESYSTEM, FAN_OPEN_PERM, FAN_ALLOW = 4, 1, 0x100, 0x10000, 1
AT_FDCWD = -100
PROBE = 5  # seconds, as in daemon/core/settle.h
LIBC = ctypes.CDLL(None, use_errno=True)


def scan(point, ready):
    """Lets everybody in, once it has looked."""
    fan = LIBC.fanotify_init(FAN_CLASS_CONTENT, os.O_RDONLY)
    expect(fan >= 0 and LIBC.fanotify_mark(fan, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
                                           ctypes.c_uint64(FAN_OPEN_PERM), AT_FDCWD, point.encode()) == 0)
    os.write(ready, b'x')
    while True:
        data = os.read(fan, 4096)
        while data:
            length, fd = struct.unpack_from('I12xi', data)
            os.pread(fd, 512, 0)
            os.write(fan, struct.pack('iI', fd, FAN_ALLOW))
            os.close(fd)
            data = data[length:]


@contextlib.contextmanager
def scanner(point):
    ready, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            scan(point, end)
        finally:
            os._exit(1)
    try:
        equal(os.read(ready, 1), b'x')
        yield
        equal(os.waitpid(pid, os.WNOHANG), (0, 0))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(end)


def reader(path):
    """A process that opens it, and says so."""
    return subprocess.Popen(['sh', '-c', 'exec <"$1" && echo open', 'sh', path], stdout=subprocess.PIPE)


def expect_open(path, seconds):
    begin = time.monotonic()
    with reader(path) as process:
        try:
            expect(select.select([process.stdout], [], [], WAIT)[0], f'{path} cannot be opened')
            equal(process.stdout.read(), b'open\n')
        finally:
            process.kill()
    took = time.monotonic() - begin
    expect(took < seconds * SLOWNESS, took)


def wait_for_lease(tool, held, states):
    end = time.monotonic() + WAIT
    while (lease := tool.json('show', held.file())[0]['lease']) not in states:
        expect(time.monotonic() < end, lease)


def test_scanner(world, tool):
    """While it is about, readers are admitted; whoever opens something else notices nothing."""
    point = make_directory(world, 'scanned')
    with mounted(point, '-t', 'tmpfs', 'none'):
        other = make(os.path.join(point, 'other'))
        with scanner(point):
            with Held(tool, make(os.path.join(point, 'first')), access='write') as held:
                for _ in range(3):
                    expect_open(other, 1)
                world.wait_for_log(lambda: any('A program decides on opens' in line for line in world.log))
                wait_for_lease(tool, held, ('write',))
                expect_open(os.path.join(point, 'first'), 1)
                expect_open(other, 1)
                wait_for_lease(tool, held, ('write',))
                text = tool.run('preflight', os.path.join(point, 'first'))
                expect('Settle: readers are let in at once' in text, text)
            # it is known by now
            with Held(tool, make(os.path.join(point, 'second')), access='write') as held:
                wait_for_lease(tool, held, ('write',))
                expect_open(other, 1)
                expect_open(os.path.join(point, 'second'), 1)
            with Held(tool, make(os.path.join(point, 'third'))):
                expect_open(os.path.join(point, 'third'), 1)
            equal(sum('A program decides on opens' in line for line in world.log), 1)


def test_scanner_comes_later(world, tool):
    """While a lease settles: nobody can know until somebody waits."""
    point = make_directory(world, 'later')
    with mounted(point, '-t', 'tmpfs', 'none'):
        other, path = make(os.path.join(point, 'other')), make(os.path.join(point, 'file'))
        with Held(tool, path, access='write') as held:
            wait_for_lease(tool, held, ('settling',))
            with scanner(point), reader(path) as first:
                expect_open(other, PROBE + 1)
                equal(first.stdout.read(), b'open\n')
                expect_open(other, 1)


def main():
    signal.alarm(300)
    expect(LIBC.unshare(CLONE_NEWNS) == 0 and
           LIBC.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) == 0)
    for test in (test_scanner, test_scanner_comes_later):
        with World() as world:  # one that has not seen a scanner yet
            world.start()
            test(world, Tool(world))
            print(f'ok {test.__name__}', flush=True)
            world.stop()


if __name__ == '__main__':
    main()
