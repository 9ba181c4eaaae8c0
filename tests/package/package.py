#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian packages that tools/deb builds, in a bare Debian root without systemd running: where they
put what, that it works there, and what stays when they go.
"""

import ctypes
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

from client import PAGE
from world import READY, Case

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
TOOLS = ('apt-get', 'dh', 'dpkg-buildpackage', 'lintian', 'mmdebstrap', 'mount')
PACKAGES = ('libpinbroker-dev', 'libpinbroker-verbs-dev', 'libpinbroker-verbs1', 'libpinbroker1', 'pinbroker')
CONFIG = '/etc/pinbroker/pinbroker.conf'
RUN = '/run/pinbroker'
MOUNTS = ('/proc', '/dev')
CLONE_NEWNS = 0x20000

# Where a package of the system may write at any time.
ELSEWHERE = ('/dev', '/proc', '/sys', '/tmp', '/var/cache', '/var/lib/apt', '/var/lib/dpkg', '/var/log')
# What systemd-sysusers leaves of a change to the groups, of which Debian removes none.
GROUPS = {'/etc/.pwd.lock', '/etc/group-', '/etc/gshadow-'}


class Root:
    """A minimal Debian from this machine's mirrors, with a compiler, and what our packages need."""

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix='pinbroker-test-')
        self.debs = []
        self.bare = None

    def fill(self, debs):
        self.bootstrap()
        for directory in MOUNTS:
            subprocess.run(['mount', '--rbind', directory, self.path + directory], check=True)
        os.mkdir(self.path + '/debs')
        for package in PACKAGES:
            deb, = glob.glob(f'{debs}/{package}_*.deb')
            self.debs.append(shutil.copy(deb, self.path + '/debs')[len(self.path):])
        self.apt('satisfy', *(d for d in self.depends() if not d.startswith('libpinbroker')))
        self.bare = self.listing()

    def bootstrap(self):
        options = subprocess.run(['apt-config', 'dump'], capture_output=True, encoding='utf-8', check=True)
        sources = (glob.glob('/etc/apt/sources.list') + glob.glob('/etc/apt/sources.list.d/*.list') +
                   glob.glob('/etc/apt/sources.list.d/*.sources'))
        with tempfile.NamedTemporaryFile('w', encoding='utf-8') as config:
            config.writelines(re.findall('(?m)^Acquire::(?:Check|http|Languages|Retries).*\n',
                                         options.stdout))
            config.flush()
            made = subprocess.run(['mmdebstrap', '--quiet', '--variant=minbase', '--format=directory',
                                   '--include=gcc,libc6-dev,liburing-dev,pkg-config',
                                   '--skip=cleanup/apt/lists', '--aptopt', config.name,
                                   '', self.path, *sources], check=False)
        if made.returncode != 0:
            skip('no bare Debian to install the packages in: mmdebstrap failed')

    def depends(self):
        for deb in self.debs:
            field = subprocess.run(['dpkg-deb', '--field', self.path + deb, 'Depends'], check=True,
                                   capture_output=True, encoding='utf-8').stdout
            yield from field.strip().split(', ')

    def argv(self, *argv):
        return ['chroot', self.path, *argv]

    def run(self, *argv):
        """What it prints."""
        result = subprocess.run(self.argv(*argv), stdin=subprocess.DEVNULL, capture_output=True,
                                encoding='utf-8', timeout=300, check=False,
                                env=dict(os.environ, DEBIAN_FRONTEND='noninteractive', LC_ALL='C.UTF-8'))
        if result.returncode != 0:
            raise AssertionError(f'{argv}: {result.stdout}{result.stderr}')
        return result.stdout

    def apt(self, command, *arguments):
        return self.run('apt-get', '-qy', '--no-install-recommends', command, *arguments)

    def install(self):
        return self.apt('install', '--reinstall', *self.debs)

    def exists(self, path):
        return os.path.lexists(self.path + path)

    def read(self, path):
        with open(self.path + path, encoding='utf-8') as f:
            return f.read()

    def listing(self):
        """Every path, with its mode and owner."""
        found = set()
        for parent, directories, names in os.walk(self.path):
            parent = parent[len(self.path):]
            directories[:] = [d for d in directories if f'{parent}/{d}' not in ELSEWHERE]
            for name in directories + names:
                st = os.lstat(f'{self.path}{parent}/{name}')
                found.add((f'{parent}/{name}', oct(st.st_mode), st.st_uid, st.st_gid))
        return found

    def close(self):
        for directory in MOUNTS:
            if os.path.ismount(self.path + directory):
                subprocess.run(['umount', '--recursive', self.path + directory], check=True)
        shutil.rmtree(self.path)


def have_mounts_of_our_own():
    """They end with this process, however it ends."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) < 0:
        skip('may not mount')
    # fails in a chroot whose root is no mount point
    subprocess.run(['mount', '--make-rslave', '/'], stderr=subprocess.DEVNULL, check=False)


def skip(why):
    print('skipped:', why, flush=True)
    sys.exit(77)


class Package(Case):
    root = None

    def setUp(self):
        super().setUp()
        self.root.install()

    def contents(self, package):
        """Its files, without those that every package has."""
        return {path for path in self.root.run('dpkg', '-L', package).split()
                if not os.path.isdir(self.root.path + path)
                and not re.match('/usr/share/(doc/.*/(changelog|copyright|NEWS|README)|man/)', path)}

    def field(self, name, package='pinbroker'):
        return self.root.run('dpkg-query', '-W', '-f', '${%s}' % name, package)

    def serve(self):
        """The daemon, at its usual place; returns when it is ready."""
        os.makedirs(self.root.path + RUN, exist_ok=True)
        self.manager = self.make_manager()
        daemon = self.spawn(self.root.argv('/usr/sbin/pinbrokerd', '--socket', RUN + '/org.pinbroker'),
                            env={'NOTIFY_SOCKET': self.manager.address})
        self.manager.wait_for(READY)
        return daemon

    def test_files(self):
        library = '/usr/lib/' + self.root.run('gcc', '-print-multiarch').strip()
        self.assertEqual(self.contents('libpinbroker1'), {
            library + '/libpinbroker.so.1', library + '/libpinbroker.so.1.0.0'})
        development = self.contents('libpinbroker-dev')
        examples = {path for path in development if '/examples/' in path}
        self.assertIn('/usr/share/doc/libpinbroker-dev/examples/holder.c', examples)
        self.assertEqual(development - examples, {
            library + '/libpinbroker.so', library + '/pkgconfig/libpinbroker.pc',
            '/usr/include/pinbroker.h'})
        self.assertEqual(self.contents('libpinbroker-verbs1'), {
            library + '/libpinbroker-verbs.so.1', library + '/libpinbroker-verbs.so.1.0.0'})
        development = self.contents('libpinbroker-verbs-dev')
        examples = {path for path in development if '/examples/' in path}
        self.assertIn('/usr/share/doc/libpinbroker-verbs-dev/examples/rdma-server.c', examples)
        self.assertEqual(development - examples, {
            library + '/libpinbroker-verbs.so', library + '/pkgconfig/libpinbroker-verbs.pc',
            '/usr/include/pinbroker-verbs.h'})
        self.assertLessEqual({
            CONFIG, '/lib/systemd/system/pinbrokerd.service', '/lib/systemd/system/pinbrokerd.socket',
            '/usr/bin/pinbrokerctl', '/usr/lib/sysusers.d/pinbroker.conf', '/usr/sbin/pinbrokerd',
            '/usr/share/dbus-1/interfaces/org.pinbroker1.xml',
            '/usr/share/dbus-1/system.d/org.pinbroker1.conf',
            '/usr/share/varlink/org.pinbroker.varlink'}, self.contents('pinbroker'))
        self.assertEqual(re.findall(r'^ (\S+) ', self.field('Conffiles'), re.M), [CONFIG])
        self.assertEqual(self.root.run('dpkg', '--verify', *PACKAGES), '')

    def test_configured(self):
        """The maintainer scripts did their work, though systemd does not run."""
        self.assertRegex(self.root.read('/etc/group'), r'(?m)^pinbroker:')
        for wanted in ('multi-user.target.wants/pinbrokerd.service',
                       'sockets.target.wants/pinbrokerd.socket'):
            self.assertTrue(self.root.exists('/etc/systemd/system/' + wanted), wanted)
        self.assertEqual(self.root.run('pinbrokerd', '--version'), f'pinbrokerd {self.field("Version")}\n')
        self.assertIn('list', self.root.run('pinbrokerctl', '--help'))

    def test_holder(self):
        """An example, built with nothing but the packages, holds a file by the daemon in the root."""
        flags = self.root.run('pkg-config', '--cflags', '--libs', 'libpinbroker', 'liburing').split()
        self.root.run('gcc', '-Wall', '-Werror', '-o', '/tmp/holder',
                      '/usr/share/doc/libpinbroker-dev/examples/holder.c', *flags)
        daemon = self.serve()
        self.assertEqual(self.root.run('pinbrokerctl', 'list', 'pins', '--json=short').strip(), '[]')
        holder = self.spawn(self.root.argv('/tmp/holder', self.file))
        self.assertIn(f'holding {os.path.getsize(self.file)} bytes', holder.process.stdout.readline())
        self.assertIn(self.file, self.root.run('pinbrokerctl', 'list', 'pins'))
        _, result = self.truncate()
        self.truncated(result)
        self.assertEqual(os.path.getsize(self.file), PAGE)
        self.expect_end(holder)
        self.expect_end(daemon)

    def test_rdma_holder(self):
        """libpinbroker-verbs' example is built with nothing but the packages; there is no device to run it on."""
        flags = self.root.run('pkg-config', '--cflags', '--libs', 'libpinbroker-verbs').split()
        self.root.run('gcc', '-Wall', '-Werror', '-o', '/tmp/rdma-server',
                      '/usr/share/doc/libpinbroker-verbs-dev/examples/rdma-server.c', *flags)
        self.assertIn('libpinbroker-verbs.so.1', self.root.run('ldd', '/tmp/rdma-server'))

    def test_conffile(self):
        """What the administrator changed is his."""
        with open(self.root.path + CONFIG, 'a', encoding='utf-8') as f:
            f.write('\n[Revocation]\nRevokeGraceSec=7s\n')
        changed = self.root.read(CONFIG)
        self.root.install()
        self.assertEqual(self.root.read(CONFIG), changed)
        self.expect_end(self.serve())
        self.root.apt('purge', *PACKAGES)
        self.root.install()
        self.assertNotEqual(self.root.read(CONFIG), changed)

    def test_removal(self):
        self.expect_end(self.serve())
        self.root.apt('remove', *PACKAGES)
        self.assertTrue(self.root.exists(CONFIG))
        self.assertTrue(self.root.exists(RUN + '/org.pinbroker.ids'))
        self.assertFalse(self.root.exists('/usr/sbin/pinbrokerd'))
        self.assertEqual(self.field('Status'), 'deinstall ok config-files')

        self.root.apt('purge', 'pinbroker')
        left = {path for path, *_ in self.root.listing() ^ self.root.bare}
        self.assertEqual(left - GROUPS, set())
        self.assertRegex(self.root.read('/etc/group'), r'(?m)^pinbroker:')

        self.root.install()
        self.test_configured()


def main():
    # so that the root does not stay behind
    for sig in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(sig, signal.default_int_handler)
    signal.alarm(1100)
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or os.getuid() != 0:
        skip('needs root, and what is in tools/packages-deb: ' + ' '.join(missing))
    have_mounts_of_our_own()
    subprocess.run([SOURCE + '/tools/deb'], check=True)
    Package.root = Root()
    try:
        Package.root.fill(SOURCE + '/build-deb')
        unittest.main(verbosity=2)
    finally:
        Package.root.close()


if __name__ == '__main__':
    main()
