#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `meson install` makes of the build tree ($BUILD_ROOT): where it lies, that systemd and the bus
take it, and that a program can be built with it.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import unittest

from client import PAGE, WAIT
from world import Case, NOBODY

EXPOSURE = 26  # of 100, at most: systemd-analyze security
EXAMPLES = ('epoll', 'holder', 'repin')

PROGRAM = r'''
#include <inttypes.h>
#include <pinbroker.h>
#include <stdio.h>
#include <sys/eventfd.h>

static int on_pin(const struct pinbroker_pin_info *info, void *userdata)
{
	printf("%s %" PRIu64 "\n", info->path, info->length);
	return 0;
}

int main(int argc, char *argv[])
{
	struct pinbroker_range range = { 0, 4096 };
	pinbroker *pb = NULL;
	pinbroker_file *file = NULL;
	pinbroker_context *context = NULL;
	uint64_t pin;

	if (argc != 3 || pinbroker_new("program", argv[1], &pb) < 0)
		return 2;
	if (pinbroker_connect(pb) < 0 ||
	    pinbroker_open_file(pb, argv[2], PINBROKER_WRITE, &file) < 0 ||
	    pinbroker_add_context(pb, eventfd(0, EFD_CLOEXEC), NULL, &context) < 0 ||
	    pinbroker_pin(pb, file, context, &range, 1, PINBROKER_WRITE, NULL, &pin) < 0 ||
	    pinbroker_bind(pb, pin, 0) < 0 || pinbroker_list_pins(pb, 0, 0, on_pin, NULL) < 0 ||
	    pinbroker_unpin(pb, &pin, 1, NULL, NULL) < 0 || pinbroker_remove_context(context) < 0 ||
	    pinbroker_close_file(file) < 0) {
		fprintf(stderr, "%s\n", pinbroker_last_error(pb)->message);
		return 1;
	}
	pinbroker_unref(pb);
	return 0;
}
'''


class Installed(Case):
    """A build directory's installation below cls.root."""

    @classmethod
    def install(cls, build):
        # not /dev/shm, where programs may not be allowed
        cls.root = tempfile.mkdtemp(prefix='pinbroker-test-')
        cls.addClassCleanup(shutil.rmtree, cls.root)
        meson = subprocess.run(['meson', 'install', '--no-rebuild', '--destdir', cls.root,
                                '-C', build],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
                               timeout=60, check=False)
        if meson.returncode != 0:
            raise AssertionError(meson.stdout)
        cls.options = {o['name']: o['value'] for o in cls.introspect(build, '--buildoptions')}
        cls.project = cls.introspect(build, '--projectinfo')

    @staticmethod
    def introspect(build, what):
        told = subprocess.run(['meson', 'introspect', what, build], check=True, capture_output=True,
                              timeout=60)
        return json.loads(told.stdout)

    def directory(self, option):
        return os.path.join(self.options['prefix'], self.options[option])

    def systemd(self, variable, default):
        """Where systemd wants it, if it is installed."""
        result = subprocess.run(['pkg-config', '--variable', variable, 'systemd'],
                                capture_output=True, encoding='utf-8', check=False)
        return result.stdout.strip() or os.path.join(self.options['prefix'], default)

    def unit_directory(self):
        return self.systemd('systemdsystemunitdir', 'lib/systemd/system')

    def has_verbs(self):
        return os.path.exists(os.path.join(os.environ['BUILD_ROOT'], 'client/libpinbroker-verbs.so'))

    def installed(self, *path):
        return self.root + os.path.join(*path)

    def run_command(self, argv, env=None):
        """What it prints."""
        result = subprocess.run(argv, capture_output=True, encoding='utf-8', timeout=WAIT,
                                env=dict(os.environ, **(env or {})), check=False)
        self.assertEqual(result.returncode, 0, f'{argv}: {result.stdout}{result.stderr}')
        return result.stdout + result.stderr

    def pkg_config(self, *arguments):
        return self.run_command(['pkg-config', *arguments], {
            'PKG_CONFIG_SYSROOT_DIR': self.root,
            'PKG_CONFIG_LIBDIR': self.installed(self.directory('libdir'), 'pkgconfig'),
            # /usr/include is none of the compiler's own when it is below the root
            'PKG_CONFIG_ALLOW_SYSTEM_CFLAGS': '1', 'PKG_CONFIG_ALLOW_SYSTEM_LIBS': '1'}).split()

    def build(self, source, *flags):
        """A program by somebody who has what is installed, and the compiler that built it."""
        compiler = os.environ.get('CC', 'cc').split()
        program = os.path.join(self.root, os.path.basename(source) + '.out')
        self.run_command([*compiler, '-Wall', '-Wextra', '-Wno-unused-parameter', '-Werror', '-o',
                          program, source, *self.pkg_config('--cflags', '--libs', 'libpinbroker'),
                          *flags])
        self.addCleanup(os.unlink, program)
        return program

    def check_library(self):
        self.assertEqual(self.pkg_config('--validate', 'libpinbroker'), [])
        self.assertEqual(self.pkg_config('--modversion', 'libpinbroker'),
                         [self.project['version']])
        include = self.installed(self.directory('includedir'))
        libdir = self.installed(self.directory('libdir'))
        libs = ['-L' + libdir, '-lpinbroker']
        self.assertEqual(self.pkg_config('--cflags', '--libs', 'libpinbroker'),
                         ['-I' + include, *libs])
        # There is no static library, so nothing of what this one is made with concerns anybody.
        self.assertEqual(self.pkg_config('--static', '--libs', 'libpinbroker'), libs)

    def check_programs(self):
        """All that a holder does, with a real daemon, by programs built with what is installed."""
        source = os.path.join(self.dir, 'program.c')
        self.write(source, PROGRAM)
        program = self.build(source)
        libraries = {'LD_LIBRARY_PATH': self.installed(self.directory('libdir'))}
        daemon = self.start()
        self.assertEqual(self.run_command([program, self.path, self.file], libraries),
                         f'{self.file} {PAGE}\n')
        said = self.run_command([self.installed(self.directory('bindir'), 'pinbrokerctl'),
                                 '--socket', self.path, 'list', 'files', '--json=short'], libraries)
        self.assertEqual(said.strip(), '[]')

        examples = self.installed(self.directory('datadir'), 'doc/pinbroker/examples')
        programs = {name: self.build(os.path.join(examples, name + '.c'), '-luring')
                    for name in EXAMPLES}
        holder = self.spawn([programs['holder'], self.file],
                            env={**libraries, 'PINBROKER_SOCKET': self.path,
                                 'PINBROKER_BUS': self.address})
        self.assertRegex(holder.process.stdout.readline(), '^holding ')
        self.truncated(self.truncate()[1])
        self.assertEqual(holder.wait(), 0, holder.text())
        self.expect_end(daemon)


# A library with a sanitizer in it needs a program with it; what is to be seen is seen without.
@unittest.skipIf(os.environ.get('PINBROKER_SANITIZED'), 'the library needs a sanitizer')
class Elsewhere(Installed):
    """At a prefix, and in directories, that nobody expects."""

    @classmethod
    def setUpClass(cls):
        build = tempfile.mkdtemp(prefix='pinbroker-test-')
        cls.addClassCleanup(shutil.rmtree, build)
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../..')
        for argv in (['meson', 'setup', build, source, '--prefix', '/opt/pin+broker', '--libdir',
                      'l/i/b', '--includedir', 'headers', '-Dtests=false'],
                     ['ninja', '-C', build]):
            made = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  encoding='utf-8', timeout=300, check=False)
            if made.returncode != 0:
                raise AssertionError(made.stdout)
        cls.install(build)

    def test_library(self):
        self.check_library()
        self.check_programs()


@unittest.skipUnless(os.environ.get('BUILD_ROOT'), 'no build tree')
class Install(Installed):
    @classmethod
    def setUpClass(cls):
        cls.install(os.environ['BUILD_ROOT'])

    def test_layout(self):
        directory = self.directory
        library = os.path.join(directory('libdir'), 'libpinbroker.so')
        files = {
            os.path.join(directory('sbindir'), 'pinbrokerd'): 0o755,
            os.path.join(directory('bindir'), 'pinbrokerctl'): 0o755,
            library + '.1.0.0': 0o755,
            library + '.1': 'libpinbroker.so.1.0.0',
            library: 'libpinbroker.so.1',
            os.path.join(directory('libdir'), 'pkgconfig/libpinbroker.pc'): 0o644,
            os.path.join(directory('includedir'), 'pinbroker.h'): 0o644,
            **{os.path.join(directory('datadir'), 'doc/pinbroker/examples', name + '.c'): 0o644
               for name in EXAMPLES},
            os.path.join(self.unit_directory(), 'pinbrokerd.service'): 0o644,
            os.path.join(self.unit_directory(), 'pinbrokerd.socket'): 0o644,
            os.path.join(directory('datadir'), 'dbus-1/system.d/org.pinbroker1.conf'): 0o644,
            os.path.join(directory('datadir'),
                         'dbus-1/system-services/org.pinbroker1.service'): 0o644,
            os.path.join(directory('datadir'),
                         'polkit-1/actions/org.pinbroker1.policy'): 0o644,
            os.path.join(self.systemd('sysusersdir', 'lib/sysusers.d'), 'pinbroker.conf'): 0o644,
            os.path.join(self.systemd('catalogdir', 'lib/systemd/catalog'), 'pinbroker.catalog'): 0o644,
            os.path.join(directory('sysconfdir'), 'pinbroker/pinbroker.conf'): 0o644,
        }
        if self.has_verbs():
            verbs = os.path.join(directory('libdir'), 'libpinbroker-verbs.so')
            files |= {
                verbs + '.1.0.0': 0o755,
                verbs + '.1': 'libpinbroker-verbs.so.1.0.0',
                verbs: 'libpinbroker-verbs.so.1',
                os.path.join(directory('libdir'), 'pkgconfig/libpinbroker-verbs.pc'): 0o644,
                os.path.join(directory('includedir'), 'pinbroker-verbs.h'): 0o644,
            }
        self.assertRegex(self.unit_directory(), r'lib/systemd/system$')
        self.assertRegex(self.systemd('sysusersdir', 'lib/sysusers.d'), r'lib/sysusers\.d$')
        found = {}
        for parent, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(parent, name)
                mode = os.lstat(path).st_mode
                found[path[len(self.root):]] = (os.readlink(path) if stat.S_ISLNK(mode)
                                                else stat.S_IMODE(mode))
        # manual pages and catalogs may come with them
        missing = {path: found.get(path) for path in files if found.get(path) != files[path]}
        self.assertEqual(missing, {}, found)
        # nothing of the tests, nothing static, nothing that looks like a file of the build tree
        for path in found:
            self.assertNotRegex(path, r'\.a$|example-|test|demo|\.in$')

        dynamic = self.run_command(['readelf', '-d', self.installed(library)])
        self.assertRegex(dynamic, r'SONAME.*\[libpinbroker\.so\.1\]')
        for binary in (library, os.path.join(directory('sbindir'), 'pinbrokerd'),
                       os.path.join(directory('bindir'), 'pinbrokerctl')):
            self.assertNotRegex(self.run_command(['readelf', '-d', self.installed(binary)]),
                                'RPATH|RUNPATH')

    def test_configuration(self):
        """The daemon takes what is installed, without a complaint."""
        daemon = self.spawn([self.installed(self.directory('sbindir'), 'pinbrokerd')] +
                            self.arguments(self.path, self.installed(self.directory('sysconfdir'),
                                                                     'pinbroker/pinbroker.conf')))
        daemon.wait_for_log('bus is not there')
        self.expect_end(daemon)
        self.assertNotIn('pinbroker.conf', daemon.text())

    def test_units(self):
        with open(self.installed(self.unit_directory(), 'pinbrokerd.service'),
                  encoding='utf-8') as f:
            service = f.read()
        program = os.path.join(self.directory('sbindir'), 'pinbrokerd')
        self.assertRegex(service, f'(?m)^ExecStart={program}$')
        self.assertNotRegex(service, r'@\w+@')
        if not shutil.which('systemd-analyze'):
            self.skipTest('no systemd-analyze')
        # The program is not at its place. What stands in the unit must be known and sensible.
        units = os.path.join(self.dir, 'units')
        os.mkdir(units)
        shutil.copy(self.installed(self.unit_directory(), 'pinbrokerd.socket'), units)
        self.write(units + '/pinbrokerd.service',
                   service.replace(f'ExecStart={program}', 'ExecStart=' + self.installed(program)))
        for name in ('pinbrokerd.socket', 'pinbrokerd.service'):
            said = self.run_command(['systemd-analyze', 'verify', '--man=no', '--recursive-errors=no',
                                     os.path.join(units, name)], {'SYSTEMD_UNIT_PATH': units + ':'})
            self.assertNotRegex(said, 'pinbrokerd')
        # what systemd makes of its sandbox, in tenths of ten
        self.run_command(['systemd-analyze', 'security', '--no-pager', '--offline=true',
                          f'--threshold={EXPOSURE}', units + '/pinbrokerd.service'])

    @unittest.skipUnless(shutil.which('systemd-sysusers'), 'not installed')
    def test_sysusers(self):
        root = os.path.join(self.dir, 'root')
        os.makedirs(root + '/etc')
        self.run_command(['systemd-sysusers', '--root', root, self.installed(
            self.systemd('sysusersdir', 'lib/sysusers.d'), 'pinbroker.conf')])
        with open(root + '/etc/group', encoding='utf-8') as f:
            self.assertRegex(f.read(), r'(?m)^pinbroker:')

    @unittest.skipUnless(os.getuid() == 0, 'needs root to become somebody else')
    def test_bus_policy(self):
        """root may own the name and call; nobody may own nothing, and call what polkit allows."""
        os.chmod(self.dir, 0o755)
        policy = self.installed(self.directory('datadir'), 'dbus-1/system.d')
        services = self.installed(self.directory('datadir'), 'dbus-1/system-services')
        config = os.path.join(self.dir, 'bus.conf')
        self.write(config, f'''<busconfig><type>system</type><listen>{self.address}</listen>
            <auth>EXTERNAL</auth><policy context="default"><allow user="*"/><deny own="*"/>
            <deny send_type="method_call"/><allow send_type="signal"/>
            <allow send_requested_reply="true" send_type="method_return"/>
            <allow send_requested_reply="true" send_type="error"/>
            <allow receive_type="method_call"/><allow receive_type="method_return"/>
            <allow receive_type="error"/><allow receive_type="signal"/>
            <allow send_destination="org.freedesktop.DBus"/></policy>
            <servicedir>{services}</servicedir><includedir>{policy}</includedir></busconfig>''')
        self.start_bus('--config-file', config)
        self.assertIn('org.pinbroker1', self.run_command(
            ['busctl', '--address', self.address, 'list', '--activatable', '--no-legend']))
        with open(services + '/org.pinbroker1.service', encoding='utf-8') as f:
            unit = re.search(r'(?m)^SystemdService=(.*)$', f.read()).group(1)
        self.assertTrue(os.path.exists(self.installed(self.unit_directory(), unit)), unit)
        daemon = self.start()
        daemon.wait_for_log('On the bus as org.pinbroker1')
        call = ['busctl', '--address', self.address, 'get-property', 'org.pinbroker1',
                '/org/pinbroker1', 'org.pinbroker1.Manager', 'Version']
        self.run_command(call)
        request = ['busctl', '--address', self.address, 'call', 'org.freedesktop.DBus',
                   '/org/freedesktop/DBus', 'org.freedesktop.DBus', 'RequestName', 'su',
                   'org.pinbroker1', '0']
        for argv in (call, request):
            result = subprocess.run(argv, user=NOBODY, group=NOBODY, extra_groups=[], check=False,
                                    capture_output=True, encoding='utf-8', timeout=WAIT)
            self.assertNotEqual(result.returncode, 0)
            self.assertRegex(result.stderr, '(?i)access denied|not allowed')
        self.expect_end(daemon)

    def test_library(self):
        self.check_library()


    def test_verbs_header(self):
        """Compiles by itself; pinbroker.h's test is in tests/api."""
        if not self.has_verbs():
            return
        header = self.installed(self.directory('includedir'), 'pinbroker-verbs.h')
        for language, standards in (('c', ('c11', 'gnu17')), ('c++', ('c++11', 'c++17'))):
            for standard in standards:
                self.run_command([*os.environ.get('CC', 'cc').split(), '-x', language,
                                  '-std=' + standard, '-Wall', '-Wextra', '-Werror',
                                  '-fsyntax-only', '-I', os.path.dirname(header), header])

    @unittest.skipIf(os.environ.get('PINBROKER_SANITIZED'), 'the library needs a sanitizer')
    def test_programs(self):
        self.check_programs()


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
