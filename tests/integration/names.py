#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A path is what it is where and when it is given: files and mounts that are named to be revoked are those, and no
others that were, or are elsewhere, called the same."""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess

from admin import Manager, inode
from client import PAGE, SIZE, WAIT, World, equal, expect
from tool import DATAERR, NOINPUT, TOOL, Tool, fields

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=WAIT)


def make(path):
    with open(path, 'wb') as f:
        f.truncate(SIZE)
    return path


def make_directory(world, name):
    path = os.path.join(world.dir, name)
    os.mkdir(path)
    return path


@contextlib.contextmanager
def mounted(point, *options):
    run('mount', *options, point)
    try:
        yield point
    finally:
        run('umount', '--recursive', '--lazy', point)


class Held:
    """A process that holds a page of a file until it is revoked. setup: what a shell does before, in a mount namespace
    of its own."""

    def __init__(self, tool, path, setup=None, access='read'):
        command = [TOOL, 'hold', '--access', access, '--range', f'0:{PAGE}', path]
        if setup:
            script = f'set -e; {setup}; exec {shlex.join(command)}'
            command = ['unshare', '--mount', '--propagation', 'private', 'sh', '-c', script]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        env=tool.env, encoding='utf-8', errors='replace')
        self.tool = tool
        self.pin = int(fields(self.process.stdout.readline())['pin'])

    def expect_held(self):
        expect(self.pin in [p['pin'] for p in self.tool.json('list', 'pins')])

    def expect_revoked(self):
        equal(self.process.wait(WAIT), 0)

    def file(self):
        return self.tool.json('show', self.pin)[0]['file']

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.process.terminate()
        self.process.wait(WAIT)
        self.process.stdout.close()


def released(tool, *args, pins=1):
    o = tool.once('revoke', *args)
    equal((o['outcome'], o['pins'], o['clients'], o['remaining']), ('released', pins, pins, []))


def test_replaced(world, tool, manager):
    """As editors and package managers do."""
    path = make(os.path.join(world.dir, 'replaced'))
    with Held(tool, path) as old:
        os.rename(make(path + '.new'), path)
        tool.run('revoke', '--file', path, status=NOINPUT, error='not open through the broker')
        tool.run('map', path, status=NOINPUT, error='not open through the broker')
        manager.refused('another file now', 'RevokePath', 'sst', path, '', 0)
        with Held(tool, path) as new:
            expect(f'file {new.file()},' in tool.run('map', path))
            manager.refused('Several files', 'RevokePath', 'sst', path, '', 0)
            released(tool, '--file', path)
            new.expect_revoked()
        with Held(tool, path) as new:
            os.unlink(path)
            tool.run('map', path, status=DATAERR, error='several files')
            tool.run('revoke', new.pin)
        make(path)
        old.expect_held()
        # it has no name any more, so nothing contradicts what it is listed as
        os.unlink(path)
        tool.run('revoke', '--file', path, status=NOINPUT, error='by its pins')
        manager.call('RevokePath', 'sst', path, '', 0)
        old.expect_revoked()


def test_renamed(world, tool, manager):
    first, second = make(os.path.join(world.dir, 'first')), os.path.join(world.dir, 'second')
    for rename in (os.rename, os.link, os.symlink):
        with Held(tool, first) as held:
            rename(first, second)
            released(tool, '--file', second)
            held.expect_revoked()
        os.rename(second, first)  # a link goes on being one
        if os.path.islink(first):
            os.unlink(first)
            make(first)
        elif os.path.exists(second):
            os.unlink(second)
    above, path = make_directory(world, 'above'), os.path.join(world.dir, 'above', 'file')
    with Held(tool, make(path)) as held:
        os.rename(above, above + '-2')
        released(tool, '--file', os.path.join(above + '-2', 'file'))
        held.expect_revoked()
    with Held(tool, first) as held:
        os.rename(first, second)
        make(first)  # a decoy
        tool.run('revoke', '--file', first, status=NOINPUT, error='not open through the broker')
        manager.refused('another file now', 'RevokePath', 'sst', first, '', 0)
        held.expect_held()
        manager.call('RevokeInode', 'ttst', *inode(second), '', 0)
        held.expect_revoked()


def test_not_utf8(world, tool, manager):
    """Both are listed alike."""
    one, other = (make(os.fsdecode(os.fsencode(world.dir) + name)) for name in (b'/\xff\n', b'/\xfe\n'))
    with Held(tool, one) as held, Held(tool, other) as second:
        label = tool.json('show', held.file())[0]['path']
        equal(label, tool.json('show', second.file())[0]['path'])
        manager.refused('Several files', 'RevokePath', 'sst', label, '', 0)
        released(tool, '--file', other)
        second.expect_revoked()
        held.expect_held()
        released(tool, '--file', one)
        held.expect_revoked()


def test_namespaces(world, tool, manager):
    """The same path is another file elsewhere, or where something is mounted over it."""
    point = make_directory(world, 'point')
    path = make(os.path.join(point, 'file'))
    over = f'mount -t tmpfs none {point}; truncate -s {SIZE} {path}'
    with Held(tool, path, setup=over) as inside:
        equal(tool.json('show', inside.file())[0]['path'], path)
        tool.run('revoke', '--file', path, status=NOINPUT, error='not open through the broker')
        manager.refused('another file now', 'RevokePath', 'sst', path, '', 0)
        inside.expect_held()
        with Held(tool, path) as outside:
            released(tool, '--file', path)
            outside.expect_revoked()
        inside.expect_held()
        # who is there himself names it so
        there = ['nsenter', '--mount', '--target', str(inside.process.pid)]
        out = subprocess.run([*there, TOOL, 'revoke', '--json=short', '--file', path], env=tool.env,
                             check=True, stdout=subprocess.PIPE, timeout=WAIT).stdout
        equal(json.loads(out)['outcome'], 'released')
        inside.expect_revoked()
    with Held(tool, path, setup=over) as inside:
        run('nsenter', '--mount', '--target', str(inside.process.pid), 'busctl',
            '--address=' + world.address, 'call', 'org.pinbroker1', '/org/pinbroker1',
            'org.pinbroker1.Manager', 'RevokePath', 'sst', path, '', '0')
        inside.expect_revoked()
    with Held(tool, path) as held:
        with mounted(point, '-t', 'tmpfs', 'none'):
            make(path)
            tool.run('revoke', '--file', path, status=NOINPUT, error='not open through the broker')
            manager.refused('another file now', 'RevokePath', 'sst', path, '', 0)
        held.expect_held()
        released(tool, '--file', path)


def test_bind_mount(world, tool):
    """One file, opened for reading through two mounts: what keeps the one busy goes, and no more."""
    source, bound = make_directory(world, 'source'), make_directory(world, 'bound')
    with mounted(source, '-t', 'tmpfs', 'none'), mounted(bound, '--bind', source):
        make(os.path.join(source, 'file'))
        with Held(tool, os.path.join(source, 'file')) as first:
            with Held(tool, os.path.join(bound, 'file')) as second:
                equal(first.file(), second.file())
                released(tool, '--mount', bound)
                second.expect_revoked()
            run('umount', bound)
            first.expect_held()
            run('mount', '--bind', source, bound)
            # another process's namespace may have what is unmounted here
            with Held(tool, os.path.join(source, 'file'), setup=':') as elsewhere:
                released(tool, '--mount', bound)
                elsewhere.expect_revoked()
            first.expect_held()
            # the broker's own description is on the first mount
            with Held(tool, os.path.join(bound, 'file')) as second:
                released(tool, '--mount', source, pins=2)
                first.expect_revoked()
                second.expect_revoked()
        # a copy of a description stays on the mount of the first
        with Held(tool, os.path.join(source, 'file'), access='write') as first, \
                Held(tool, os.path.join(bound, 'file'), access='write') as second:
            released(tool, '--mount', bound, pins=0)
            first.expect_held()
            second.expect_held()


def test_moved_mount(world, tool):
    """With a decoy: what is listed below the mount point, and is not there."""
    one, two = make_directory(world, 'one'), make_directory(world, 'two')
    make(os.path.join(two, 'file'))
    with Held(tool, os.path.join(two, 'file')) as decoy:
        run('mount', '-t', 'tmpfs', 'none', one)
        with Held(tool, make(os.path.join(one, 'file'))) as held:
            run('mount', '--move', one, two)
            released(tool, '--mount', two)
            held.expect_revoked()
        run('umount', two)
        decoy.expect_held()


def test_subvolume(world, tool):
    """Its files have a device number of their own."""
    image, point = os.path.join(world.dir, 'image'), make_directory(world, 'btrfs')
    with open(image, 'wb') as f:
        f.truncate(400 << 20)
    run('mkfs.btrfs', '-q', image)
    with mounted(point, '-o', 'loop', image):
        run('btrfs', 'subvolume', 'create', os.path.join(point, 'sub'))
        path = make(os.path.join(point, 'sub', 'file'))
        expect(os.stat(path).st_dev != os.stat(point).st_dev)
        with Held(tool, path) as held:
            released(tool, '--mount', point)
            held.expect_revoked()
        run('umount', point)
        run('mount', '-o', 'loop', image, point)
        with Held(tool, path) as held:
            released(tool, '--file', path)
            held.expect_revoked()


def main():
    signal.alarm(300)
    libc = ctypes.CDLL(None, use_errno=True)
    expect(libc.unshare(CLONE_NEWNS) == 0 and
           libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) == 0)
    with World() as world:
        world.start()
        tool, manager = Tool(world), Manager(world)
        for test in (test_replaced, test_renamed, test_not_utf8, test_namespaces):
            test(world, tool, manager)
            print(f'ok {test.__name__}', flush=True)
        for test in (test_bind_mount, test_moved_mount, test_subvolume):
            test(world, tool)
            print(f'ok {test.__name__}', flush=True)
        world.stop()


if __name__ == '__main__':
    main()
