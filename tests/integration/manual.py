#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual, held to the code: every symbol, key, option, member of the D-Bus interface and message is
described, what is not there is not, and the examples are run.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import unittest
from xml.etree import ElementTree

from client import PAGE, SIZE, WAIT, Connection
from world import READY, Case, end_child, open_file

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
BUILD = os.environ['BUILD_ROOT']
PAGES = os.path.join(BUILD, 'man')
CTL = os.path.join(BUILD, 'client', 'pinbrokerctl')
DAEMON = os.environ['PINBROKERD']
VERBS = os.path.exists(os.path.join(BUILD, 'client', 'libpinbroker-verbs.so'))
EXAMPLE = os.environ['PINBROKER_EXAMPLE']

# Commands in examples that cannot be run here, and why.
NOT_RUN = {
    'systemctl enable --now pinbrokerd.socket': 'needs systemd as the first process',
    'journalctl -x MESSAGE_ID=80503b3b5efe466a9aa0b2136eb34f8e': 'needs a journal',
}


def read(*path):
    with open(os.path.join(SOURCE, *path), encoding='utf-8') as f:
        return f.read()


def section(text, title):
    """What stands below a heading, up to the next of its kind."""
    return re.search(rf'(?ms)^# {re.escape(title)}\n(.*?)(?=^# [A-Z[]|\Z)', text).group(1)


def terms(text):
    """What is described: terms, without emphasis, and their descriptions."""
    found = re.findall(r'(?m)^([*_$A-Z][^\t\n]*)\n((?:\t[^\n]*\n|\n(?=\t))+)', text)
    return {re.sub(r'[*\\]', '', term): description for term, description in found}


def literals(text):
    return re.findall(r'(?ms)^```\n(.*?)^```$', text)


def page(name):
    return read('man', name + '.scd')


def rendered(name):
    """As a terminal shows it."""
    groff = subprocess.run(['groff', '-man', '-t', '-ww', '-Kutf8', '-Tutf8', os.path.join(PAGES, name)],
                           check=True, capture_output=True, encoding='utf-8', timeout=WAIT)
    return re.sub(r'\x1b\[[\d;]*m|.\x08', '', groff.stdout), groff.stderr


def message_ids():
    return dict(re.findall(r'(?m)^#define (MESSAGE_[A-Z_]+) +"([0-9a-f]{32})"', read('daemon', 'util', 'log.h')))


def said(argv):
    return subprocess.run(argv, check=True, capture_output=True, encoding='utf-8', timeout=WAIT).stdout


class Pages(unittest.TestCase):
    def test_rendering(self):
        """Without a warning; each refers to pages of ours that there are."""
        names = {name[:-4] for name in os.listdir(os.path.join(SOURCE, 'man')) if name.endswith('.scd')}
        built = {n for n in os.listdir(PAGES) if re.search(r'\.\d$', n)}
        self.assertEqual(names - built, set() if VERBS else {'libpinbroker-verbs.3'})
        for name in built:
            text, complaints = rendered(name)
            self.assertEqual(complaints, '', name)
            self.assertNotIn('@', text, name)
            for other, number in re.findall(r'\*([\w.]*pinbroker[\w.]*)\*\((\d)\)', page(name)):
                self.assertIn(f'{other}.{number}', names, name)

    def test_symbols(self):
        self.check_symbols('libpinbroker', 'pinbroker.h')
        self.check_symbols('libpinbroker-verbs', 'pinbroker-verbs.h')

    def check_symbols(self, library, header):
        text, header = page(library + '.3'), read('client', header)
        symbols = set(re.findall(r'(?m)^\tpinbroker_\w+(?=;$)', read('client', library + '.sym')))
        symbols = {s.strip() for s in symbols}
        described = set(re.findall(r'(pinbroker_\w+)\(\)',
                                   ' '.join(terms(section(text, 'FUNCTIONS')))))
        self.assertEqual(described, symbols)

        def squeeze(c):
            return re.sub(r'\s+', ' ', c).replace('( ', '(')
        code = squeeze(re.sub(r'(?s)/\*.*?\*/', '', header))
        prototypes = squeeze(' '.join(literals(section(text, 'SYNOPSIS')))).split(';')[:-1]
        for prototype in prototypes:
            self.assertIn(prototype.strip() + ';', code)
        self.assertEqual({re.search(r'(pinbroker_\w+)\(', p).group(1) for p in prototypes
                          if 'typedef' not in p}, symbols)

    def test_types(self):
        text = page('libpinbroker.3')
        described = terms(section(text, 'TYPES'))
        header = re.sub(r'(?s)/\*.*?\*/', '', read('client', 'pinbroker.h'))
        kinds = re.findall(r'(?ms)^((?:struct|enum) pinbroker_\w+) \{(.*?)^\};', header)
        kinds = {name: body for name, body in kinds if name != 'enum pinbroker_channels'}
        self.assertEqual(set(described), set(kinds))
        for name, body in kinds.items():
            for member in re.findall(r'(\w+)\s*[;,]', body):
                member = member.replace('_', r'\_') if name.startswith('struct') else member
                word = rf'_{re.escape(member)}_' if name.startswith('struct') else member
                self.assertRegex(described[name], rf'(?<!\w){word}(?!\w)', name)
        for channel in re.findall(r'PINBROKER_CHANNEL_\w+', header):
            self.assertIn(channel, text)

    def test_errors(self):
        """Those of the broker, with their numbers, as the library has them."""
        told = dict(re.findall(r'(?m)^\*-(E\w+)\* \((\w+)\)$', page('libpinbroker.3')))
        code = re.findall(r'\{\w+ "\.(\w+)", -(E\w+)\}', read('client', 'error.c'))
        for number, name in told.items():
            self.assertIn((name, number), code)
        described = {name for name in re.findall(r'(?m)^error (\w+)',
                                                 read('protocol', 'org.pinbroker.varlink'))}
        self.assertEqual(described - set(told.values()), set())

    def test_dbus(self):
        text = page('org.pinbroker1.5')
        titles = {'Manager': 'THE MANAGER OBJECT', 'Client': 'CLIENT OBJECTS', 'File': 'FILE OBJECTS',
                  'Pin': 'PIN OBJECTS', 'Revocation': 'REVOCATION OBJECTS'}
        for interface in ElementTree.fromstring(
                re.sub(r'<!DOCTYPE[^>]*>', '', read('protocol', 'org.pinbroker1.xml'))):
            name = interface.get('name')
            self.assertIn(f'*{name}*', section(text, 'SYNOPSIS'))
            part = section(text, titles.pop(name.split('.')[-1]))
            described = ', '.join(terms(part))
            members = {m.get('name') + {'method': '()', 'signal': '', 'property': f' ({m.get("type")})'}[m.tag]
                       for m in interface}
            if name.endswith('.Manager'):  # where the types stand in the synopsis
                members = {m.split(' ')[0] for m in members}
                for member in interface:
                    for argument in member.iter('arg'):
                        self.assertRegex(literals(part)[0], rf'\b{argument.get("type")}'.replace('{', r'\{') +
                                         rf' {argument.get("name")}\b', member.get('name'))
                    if member.tag == 'property':
                        self.assertIn(f'readonly {member.get("type")} {member.get("name")};', part)
            self.assertEqual(set(described.split(', ')), members, name)
        self.assertEqual(titles, {})
        self.assertEqual(set(re.findall(r'(?m)^\*(org\.pinbroker1\.\w+)\*$', section(text, 'DESCRIPTION'))),
                         set(re.findall('<action id="(.*)"', read('systemd', 'org.pinbroker1.policy'))))

    def test_journal(self):
        text = section(page('pinbrokerd.8'), 'JOURNAL')
        described = terms(text)
        ids = {t for t in described if re.fullmatch('[0-9a-f]{32}', t)}
        self.assertEqual(ids, set(message_ids().values()))
        # of those that could be set only those that are
        sources = ''.join(read(path, name) for path, _, names in os.walk(os.path.join(SOURCE, 'daemon'))
                          for name in names if name.endswith('.c'))
        fields = {key for key, member in re.findall(r't, "(\w+)", (?:\(uint64_t\))?f->(\w+)\)', sources)
                  if re.search(rf'(?:\.|fields\.){member} = ', sources)} | {'PINBROKER_CLIENT_UID'}
        self.assertEqual({f for t in described for f in re.findall(r'\b([A-Z_]+)=', t)}, fields)

    def test_options(self):
        for name, program in (('pinbrokerd.8', DAEMON), ('pinbrokerctl.1', CTL)):
            option = r'(?<![\w-])--?[a-z][a-z-]*'
            described = ' '.join(terms(section(page(name), 'OPTIONS')))
            self.assertEqual(set(re.findall(option, described)),
                             set(re.findall(option, said([program, '--help']))), name)

    def test_commands(self):
        described = terms(section(page('pinbrokerctl.1'), 'COMMANDS'))
        self.assertEqual({t.split(' ')[0] for t in described},
                         set(re.findall(r'(?m)^  ([a-z]+)\b', said([CTL, '--help']))))


class Configuration(Case):
    def test_defaults(self):
        """Every key is described with its default, which the daemon takes without a complaint."""
        text, lines, keys = page('pinbroker.conf.5'), [], {}
        for name in re.findall(r'(?m)^# \[(\w+)\] SECTION$', text):
            lines.append(f'[{name}]')
            for key, description in terms(section(text, f'[{name}] SECTION')).items():
                default = re.search(r'Default: \*(.*)\*\.', description).group(1)
                keys[key.rstrip('=')] = default
                lines.append(key + default)
        shipped = re.findall(r'(?m)^#(\w+)=(.*)$', read('pinbroker.conf'))
        self.assertEqual(keys, dict(shipped))
        self.write(self.config, '\n'.join(lines) + '\n')
        daemon = self.start()
        self.expect_end(daemon)
        self.assertNotIn(self.config, daemon.text())

        # and those that are described wrongly would be complained of, with file and line
        self.write(self.config, '\n'.join(re.sub('=.*', '=', line) for line in lines) + '\n')
        daemon = self.start()
        self.expect_end(daemon)
        for number, line in enumerate(lines, 1):
            if '=' in line:
                self.assertIn(f'{self.config}:{number}: "" is no value for {line.split("=")[0]}=; the '
                              'line is ignored.', daemon.text())


class Example:
    """The commands of one example, run where they find the broker. What it shows of their output must
    come; "…" stands for anything."""

    def __init__(self, case, text):
        self.case, self.output, self.background = case, '', []
        self.expected = [line for line in text.splitlines() if not re.match(r'[$#] ', line)]
        self.commands = re.findall(r'(?m)^[$#] (.*)$', text)

    def run(self, env):
        for command in self.commands:
            if command.endswith(' &'):
                self.start('exec ' + command[:-2], env)
                continue
            result = subprocess.run(['bash', '-ec', command], cwd=self.case.dir, env=env, timeout=WAIT,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, encoding='utf-8', check=False)
            self.case.assertEqual(result.returncode, 0, f'{command}: {result.stdout}')
            self.output += result.stdout
        self.output += ''.join(process.finish() for process in self.background)
        for line in self.expected:
            self.case.assertRegex(self.output, '(?m)^' + re.escape(line).replace('…', '.*') + '$')

    def start(self, command, env):
        """Returns when it says the first thing."""
        process = Background(command, env, self.case.dir)
        self.case.addCleanup(process.close)
        self.background.insert(0, process)
        self.case.assertTrue(process.first, command)


class Background:
    def __init__(self, command, env, directory):
        # not what of the sanitizers is said when it is killed
        self.process = subprocess.Popen(['bash', '-c', command], cwd=directory, env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, encoding='utf-8')
        self.first = self.process.stdout.readline()

    def finish(self):
        """What it has said, when it has been asked to end."""
        self.process.terminate()
        rest = self.process.communicate(timeout=WAIT)[0]
        return self.first + rest

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@unittest.skipUnless(os.getuid() == 0, 'needs root to mount')
class Examples(Case):
    def setUp(self):
        super().setUp()
        self.mount = os.path.join(self.dir, 'mount')
        os.mkdir(self.mount)
        subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', self.mount], check=True)
        self.addCleanup(subprocess.run, ['umount', '-l', self.mount], stderr=subprocess.DEVNULL, check=False)

    def environment(self):
        programs = os.path.join(self.dir, 'programs')
        os.mkdir(programs)
        for program in (CTL, DAEMON):
            os.symlink(program, os.path.join(programs, os.path.basename(program)))
        return dict(os.environ, PINBROKER_SOCKET=self.path, PINBROKER_BUS=self.address,
                    DBUS_SYSTEM_BUS_ADDRESS=self.address, PATH=programs + ':' + os.environ['PATH'])

    def examples(self, name):
        for text in literals(section(page(name), 'EXAMPLES')):
            for there, here in (('/dev/shm', self.dir), ('/tmp/pb', self.dir + '/pb'),
                                ('/mnt', self.mount)):
                text = text.replace(there, here)
            yield Example(self, text)

    def run_examples(self, name):
        """One after the other, with what those before have made, each with a broker of its own, whose identifiers
        begin at 1. What they cut off is there again.
        """
        env = self.environment()
        os.unlink(self.file)
        self.start_bus()
        for example in self.examples(name):
            if set(example.commands) & set(NOT_RUN):
                continue
            if os.path.exists(self.file):
                os.truncate(self.file, SIZE)
            daemon = self.start()
            daemon.wait_for_log('On the bus as')
            example.run(env)
            self.expect_end(daemon)
            os.unlink(self.path + '.ids')

    def test_pinbrokerctl(self):
        self.run_examples('pinbrokerctl.1')

    def test_pinbrokerd(self):
        self.run_examples('pinbrokerd.8')

    def test_bus(self):
        self.run_examples('org.pinbroker1.5')

    def test_configurations(self):
        """Those of pinbroker.conf(5) are taken without a complaint."""
        for text in literals(section(page('pinbroker.conf.5'), 'EXAMPLES')):
            self.write(self.config, text)
            daemon = self.start()
            self.expect_end(daemon)
            self.assertNotIn(self.config, daemon.text())

    def test_tour(self):
        """The commands of the README as they stand there, after those that set the stage."""
        tour = re.search(r'(?ms)^## A tour.*?(?=^## )', read('README.md')).group()
        commands = re.findall(r'(?m)^    # (.*)$', tour.replace('/dev/shm', self.mount))
        self.assertEqual([c.split()[0] for c in commands[:4]],
                         ['dbus-run-session', 'export', 'export', 'pinbrokerd'])
        env = self.environment()
        self.write(self.config, '[Revocation]\nRevokeGraceSec=2\n')
        self.start_bus()
        daemon = self.start()
        daemon.wait_for_log('On the bus as')
        waiting = []
        for command in commands[4:]:
            if command.startswith('pinbrokerctl hold'):
                self.assertRegex(self.begin(command, env).stdout.readline(), '^holding ')
            elif command.endswith('&'):
                n_broken = daemon.text().count(' broken')
                waiting.append(self.begin(command, env))
                daemon.wait_for_log(rf'(?s)( broken.*){{{n_broken + 1}}}')
            else:
                if 'list revocations' in command:
                    self.assertEqual([w.wait(WAIT) for w in waiting], [0])
                result = subprocess.run(['bash', '-ec', command], cwd=self.dir, env=env, timeout=WAIT,
                                        stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8',
                                        check=False)
                self.assertEqual((result.returncode, result.stderr), (0, ''), command)
        self.expect_end(daemon)

    def begin(self, command, env):
        process = subprocess.Popen(['bash', '-c', command.rstrip('& ')], cwd=self.dir, env=env,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   encoding='utf-8')
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_not_run(self):
        """What is on the list is in a page still."""
        commands = [c for name in ('pinbrokerctl.1', 'pinbrokerd.8') for e in self.examples(name)
                    for c in e.commands]
        self.assertEqual(set(NOT_RUN) - set(commands), set())

    def test_library(self):
        """The program of libpinbroker(3), which the page has word for word."""
        text = rendered('libpinbroker.3')[0].replace('’', "'")
        self.assertIn(read('man', 'example.c').expandtabs(4),
                      re.sub('(?m)^ {11}', '', text[text.index('\nEXAMPLE\n'):]))
        daemon = self.start()
        program = self.spawn([EXAMPLE, self.file], env={'PINBROKER_SOCKET': self.path,
                                                        'PINBROKER_BUS': self.address})
        self.assertEqual(program.process.stdout.readline(), f'pin 4 of {self.file}\n')
        _, result = self.truncate()
        self.truncated(result)
        # once more if it was known for whom before it had let go
        self.assertRegex(program.process.stdout.read(),
                         f'^({re.escape(self.file)} is wanted: (modify|truncate)\n)+$')
        self.assertEqual((program.wait(), program.text()), (0, ''))
        self.assertEqual(os.stat(self.file).st_size, PAGE)
        self.expect_end(daemon)


class Catalog(Case):
    def entries(self):
        return dict(re.findall(r'(?ms)^-- ([0-9a-f]{32})\n(.*?)(?=^-- |\Z)',
                               read('systemd', 'pinbroker.catalog')))

    @unittest.skipUnless(shutil.which('journalctl'), 'no journalctl')
    def test_compiled(self):
        for directory in ('/usr/lib/systemd/catalog', '/var/lib/systemd/catalog'):
            os.makedirs(self.dir + directory)
        shutil.copy(os.path.join(SOURCE, 'systemd', 'pinbroker.catalog'),
                    self.dir + '/usr/lib/systemd/catalog')
        journalctl = ['journalctl', '--root', self.dir]
        subprocess.run(journalctl + ['--update-catalog'], check=True, timeout=WAIT)
        listed = re.findall(r'(?m)^([0-9a-f]{32}) pinbroker: \S', said(journalctl + ['--list-catalog']))
        self.assertEqual(sorted(listed), sorted(message_ids().values()))
        for number, text in self.entries().items():
            head, body = text.split('\n\n', 1)
            self.assertEqual([line.split(':')[0] for line in head.splitlines()],
                             ['Subject', 'Defined-By', 'Support', 'Documentation'], number)
            self.assertTrue(body.strip(), number)

    def held(self, *arguments):
        """Somebody with pins; returns when he has them."""
        holder = Background(shlex.join(['exec', CTL, '--socket', self.path, 'hold', *arguments,
                                        self.file]).replace("'exec'", 'exec'),
                            dict(os.environ, PINBROKER_BUS=self.address), self.dir)
        self.addCleanup(holder.close)
        self.assertIn('holding', holder.first)

    def logged(self, what):
        return 'MESSAGE_ID=' + message_ids()['MESSAGE_' + what]

    def exposed(self):
        """A reader is admitted, and somebody truncates."""
        self.write(self.config, '[Files]\nReaders=admit\n')
        daemon = self.start()
        self.held('--access', 'write', '--on-revoke', 'ignore')
        with open(self.file, 'rb'):
            daemon.wait_for_log(self.logged('LEASE_EXPOSED'))
            os.truncate(self.file, PAGE)
            daemon.wait_for_log(self.logged('REVOKE_ENDED'))
        self.expect_end(daemon)
        self.write(self.config, '')
        return daemon.text()

    def settled(self):
        """A lease that settles, a truncate that is waited for, and nonsense."""
        daemon = self.start()
        self.set_lease_break_time(1)
        # it is not known who waits before it has been looked for, nor if he does not wait any more by then
        self.held('--access', 'write', '--on-revoke', 'ignore')
        daemon.wait_for_log(self.logged('LEASE_SETTLED'))
        self.set_lease_break_time(45)
        _, result = self.truncate()
        daemon.wait_for_log(self.logged('REVOKE_BLAMED'))
        self.truncated(result)
        connection = Connection(self.path)
        connection.send_bytes(b'nonsense\0')
        self.assertIsNone(connection.receive())
        connection.close()
        daemon.wait_for_log(self.logged('BAD_INPUT'))
        self.expect_end(daemon)
        return daemon.text()

    def orphaned(self):
        """Pins of somebody who is dead, on several files, whose context somebody else has."""
        daemon = self.start()
        event = os.eventfd(0)
        self.addCleanup(os.close, event)
        pid = os.fork()
        if pid == 0:
            connection = Connection(self.path)
            connection.call('org.pinbroker.Hello')
            context = connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0}, [event])['context']
            for name in ('one', 'two'):
                file = open_file(connection, self.make_file(name))['file']
                connection.call('org.pinbroker.Pin', {'file': file, 'context': context, 'access': 'write',
                                                      'ranges': [{'offset': 0, 'length': PAGE}]})
            os._exit(0)
        self.addCleanup(end_child, pid)
        os.waitpid(pid, 0)
        daemon.wait_for_log('still held by process')
        self.expect_end(daemon)
        return daemon.text()

    def restarted(self):
        """One that was killed, and the next."""
        daemon = self.start()
        self.connect().call('org.pinbroker.Hello')
        self.expect_end(daemon, -signal.SIGKILL, signal.SIGKILL)
        daemon = self.start()
        daemon.wait_for_log(self.logged('STATE_RESTORED'))
        self.expect_end(daemon)
        return daemon.text()

    def tampered(self):
        """A client chooses another signal for breaks of a lease that it shares."""
        daemon = self.start()
        connection = self.connect()
        connection.call('org.pinbroker.Hello')
        path = self.make_file('shared')
        open_file(connection, path)
        fcntl.fcntl(connection.fds[0], 10, signal.SIGUSR1)  # F_SETSIG
        with contextlib.suppress(BlockingIOError):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        daemon.wait_for_log(self.logged('LEASE_TAMPERED'))
        self.expect_end(daemon)
        return daemon.text()

    @unittest.skipUnless(os.getuid() == 0, 'needs root for lease-break-time')
    def test_fields(self):
        """What an entry speaks of is set, whenever the daemon says it."""
        text = self.exposed() + self.settled() + self.orphaned() + self.restarted()
        text += self.tampered()
        found = re.findall(r'\[MESSAGE_ID=([0-9a-f]{32}) ?([^\]\n]*)\]$', text, re.M)
        self.assertEqual({number for number, _ in found}, set(message_ids().values()), text)
        entries = self.entries()
        for number, fields in found:
            for field in re.findall('@([A-Z_]+)@', entries[number]):
                self.assertIn(field + '=', fields, number)
        # and not all have all: some revocations are of several files
        self.assertTrue(any('PINBROKER_PATH=' not in fields for _, fields in found))


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
