#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pinbrokerctl says where things are not as usual: names that hold anything, a daemon that does not answer,
one that is not there, and a holder that ignores what it is told.
"""

import fcntl
import glob
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
import unicodedata
import unittest

from client import WAIT
from world import NOBODY, SIZE, Case, end_child

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
TOOL = os.path.join(os.environ['BUILD_ROOT'], 'client', 'pinbrokerctl')
DAEMON = os.environ['PINBROKERD']
# sysexits.h
OK, USAGE, DATAERR, NOINPUT, UNAVAILABLE, OSERR, IOERR, PROTOCOL, NOPERM = 0, 64, 65, 66, 69, 71, 74, 76, 77
# a clear screen, a title, C1 as a byte and as UTF-8, a line, half a character
NASTY = b'a b\x1b[2J\x1b]0;t\x07\x9b\xc2\x9b\x7f\nx\xc3'
# what a terminal may obey
CONTROL = re.compile(rb'[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]')


class Tool(Case):
    def setUp(self):
        super().setUp()
        self.start_bus()
        self.daemon = self.start()
        self.daemon.wait_for_log('On the bus')
        self.env = dict(os.environ, PINBROKER_SOCKET=self.path, PINBROKER_BUS=self.address, LC_ALL='C.UTF-8',
                        PINBROKER_TIMEOUT='1')

    def tool(self, *args, stdout=subprocess.PIPE, before=(), nobody=False, **env):
        """Its exit status, stdout and stderr. before: a command that runs it."""
        user = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []} if nobody else {}
        r = subprocess.run([*before, TOOL, *args], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                           timeout=WAIT, env=self.env | env, check=False, **user)
        return r.returncode, r.stdout, r.stderr

    def expect_failure(self, status, said, *args, **kwargs):
        """That status, one sentence at least on stderr, nothing on stdout."""
        with self.subTest(args):
            r = self.tool(*args, **kwargs)
            self.assertEqual((r[0], r[1] or b''), (status, b''), r[2])
            self.assertRegex(r[2].decode(), said)
            for line in r[2].decode().splitlines():
                self.assertRegex(line, r'[.:]$')
                self.assertNotRegex(line, r'[a-z)] (See|The broker is) ')  # a full stop is missing

    def spawn_tool(self, *args, **kwargs):
        return self.spawn([TOOL, *args], env={k: self.env[k] for k in self.env if k.startswith('PINBROKER_')},
                          **kwargs)

    def expect_harmless(self, *args):
        status, out, err = self.tool(*args)
        for text in (out, err):
            text.decode()  # is UTF-8
            self.assertIsNone(CONTROL.search(text), (args, text))
        return status, out, err


class Messages(Tool):
    def test_names(self):
        """Nothing of a name reaches the terminal as a command, and all output is UTF-8."""
        name = os.path.join(os.fsencode(self.dir), NASTY)
        os.rename(self.file, name)
        holder = self.spawn_tool('hold', '--on-revoke', 'ignore', name)
        self.assertRegex(holder.process.stdout.readline(), r'^holding \S+/a\\040b\\033\[2J\S* pin \d+ ')
        for args in ((b'list',), (b'list', b'files'), (b'map', name), (b'preflight', name), (b'status',),
                     (b'show', b'1', b'2', b'3', b'4', b'5')):
            self.expect_harmless(*args)
            for mode in (b'short', b'pretty'):
                _, out, _ = self.expect_harmless(*args, b'--json=' + mode)
                json.loads(out)
        status, out, _ = self.expect_harmless('map', name)
        self.assertEqual(status, OK)
        self.assertIn(rb'/a b\x1b[2J\x1b]0;t\x07\x9b\xc2\x9b\x7f\x0ax\xc3: file', out)
        for args in ((NASTY,), (b'map', NASTY), (b'preflight', NASTY), (b'hold', NASTY), (b'show', NASTY),
                     (b'revoke', NASTY), (b'revoke', b'--file', NASTY), (b'revoke', b'--mount', NASTY),
                     (b'revoke', b'--device', NASTY), (b'revoke', b'--client', NASTY),
                     (b'revoke', b'--timeout', NASTY, b'1'), (b'list', NASTY), (b'list', b'--file', NASTY),
                     (b'hold', b'--range', NASTY, b'x'), (b'hold', b'--access', NASTY, b'x'),
                     (b'hold', name, b'--', NASTY), (b'--json=' + NASTY, b'list'), (b'--' + NASTY, b'list'),
                     (b'list', b'--' + NASTY), (b'--socket', NASTY, b'list'), (b'--bus', NASTY, b'watch'),
                     (b'watch', NASTY), (b'status', NASTY)):
            with self.subTest(args):
                status, _, err = self.expect_harmless(*args)
                self.assertNotEqual(status, OK)
                self.assertTrue(err)
        self.expect_end(holder)

    def test_show(self):
        status, _, err = self.tool('show', '999', '1000')
        self.assertEqual(status, NOINPUT)
        for number in (b'999', b'1000'):
            self.assertRegex(err, b'There is no object %s. pinbrokerctl list' % number)
        os.chmod(self.dir, 0o755)
        self.expect_failure(NOINPUT, 'There is no object 1, or it is somebody else', 'show', '1', nobody=True)

    def test_ignoring(self):
        """Who ignores what it is told notices that its pins are gone."""
        holder = self.spawn_tool('hold', '--on-revoke', 'ignore', '--access', 'write', self.file)
        self.assertRegex(holder.process.stdout.readline(), '^holding ')
        pid = os.fork()
        if pid == 0:
            subprocess.run([TOOL, 'revoke', '--file', self.file, '--timeout', '0'], env=self.env, check=False)
            os._exit(0)
        self.addCleanup(end_child, pid)
        lines = [holder.process.stdout.readline() for _ in range(2)]
        self.assertRegex(lines[0], r'^revoked .* cause admin ')
        self.assertRegex(lines[1], r'^released .* by force ')
        self.assertEqual(holder.wait(), OK)

    def test_stopped(self):
        """Nobody waits for ever for a daemon that does not answer, and all say what it is."""
        self.daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WNOWAIT)
        failed = []

        def run(*args):
            try:
                status, _, err = self.tool(*args)
            except subprocess.TimeoutExpired:
                status, err = None, b''
            if status != UNAVAILABLE or not re.search(rb'(stopped, or hangs|does not answer).*systemctl status',
                                                      err):
                failed.append((args, status, err))

        threads = [threading.Thread(target=run, args=args) for args in (
            ('status',), ('list',), ('list', 'files'), ('list', 'clients'), ('list', 'contexts'),
            ('list', 'revocations'), ('show', '1'), ('map', self.file), ('hold', self.file),
            ('revoke', '1'), ('revoke', '--client', '1'))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.daemon.kill(signal.SIGCONT)
        self.assertEqual(failed, [])
        self.assertEqual(self.tool('list')[0], OK)

    def test_watch_without_broker(self):
        """Nothing would be seen, which is said, and when that changes."""
        self.expect_end(self.daemon)
        watch = self.spawn_tool('watch')
        watch.wait_for_log('The broker is not on the bus, and nothing is seen until it is. .*systemctl')
        self.daemon = self.start()
        watch.wait_for_log('The broker is on the bus')
        self.expect_end(self.daemon)
        watch.wait_for_log('(?s)(The broker is not on the bus.*){2}')


class Arguments(Tool):
    def test_numbers(self):
        """Of an object: decimal and positive, as they are listed; what is beyond is named as it was given."""
        for number in ('0', '-0', '00', '010', '0x10', '+1', ' 1', '1 ', '1.5', '1e3', '', str(2 ** 63), str(2 ** 64),
                       str(2 ** 64 - 1), '9' * 40, '\uff11', '1\n'):
            for args in (('show',), ('revoke',), ('revoke', '--client'), ('list', '--file'), ('list', '--client')):
                if number[:1] == '-' and not args[-1].startswith('--'):
                    continue  # that is an option
                said = re.escape(number.replace('\n', r'\x0a') or "''")
                self.expect_failure(USAGE, rf'(number|id of a \w+), not (by )?{said}\.', *args, number)
        for kind, option in (('files', '--file'), ('files', '--client'), ('clients', '--client'), ('contexts', '--file'),
                             ('revocations', '--file'), ('revocations', '--client')):
            self.expect_failure(USAGE, f'{kind} are not listed by {option}', 'list', kind, option, '1')
        for number in ('-1', '-0', '+1', '0x', '1s', 'nan', 'inf', '1e10', ' 1'):
            self.expect_failure(USAGE, rf'number of seconds, 1000000000 at most, not {re.escape(number)}\.', 'revoke', '1',
                                '--timeout', number)
        for text in ('', '1', '1:', ':1', '0:0', '-1:1', '1:-1', f'0:{2 ** 63}', f'{2 ** 63 - 1}:1', '0:1:2', '0:1K'):
            said = re.escape(text or "''")
            self.expect_failure(USAGE, rf'OFFSET:LENGTH, in bytes, of one at least, not {said}\.', 'hold', '--range',
                                text, self.file)

    def test_empty(self):
        """What is empty can be seen."""
        for args, status in ((('',), USAGE), (('list', ''), USAGE), (('list', '--json='), USAGE), (('map', ''), NOINPUT),
                             (('preflight', ''), NOINPUT), (('hold', ''), NOINPUT), (('revoke', '--file', ''), NOINPUT),
                             (('revoke', '--mount', ''), NOINPUT), (('revoke', '--device', ''), USAGE),
                             (('hold', '--access', '', self.file), USAGE), (('hold', '--on-revoke', '', '/'), USAGE),
                             (('revoke', '1', '--timeout', ''), USAGE)):
            self.expect_failure(status, "''", *args)
        for option in ('--socket', '--bus'):
            self.expect_failure(USAGE, f'The option {option} needs an argument', 'list', option, '')
        status, out, _ = self.tool('hold', self.file, '--', '')
        self.assertEqual((status, len(out.splitlines())), (NOINPUT, 2))
        self.expect_failure(USAGE, 'no command behind --', 'hold', self.file, '--')
        # a variable that is empty is none
        self.expect_failure(UNAVAILABLE, '/run/pinbroker/org.pinbroker: ', 'list', PINBROKER_SOCKET='',
                            before=('unshare', '-m', 'sh', '-c', 'mount -t tmpfs none /run && exec "$@"', 'sh'))

    def test_devices(self):
        for name in ('/dev/null', '.', '..', 'a/b', '/', b'\xff'):
            self.expect_failure(USAGE, 'name of a device, such as pmem0', 'revoke', '--device', name)
        self.expect_failure(NOINPUT, r"pins on nosuch\b", 'revoke', '--device', 'nosuch')

    def test_paths(self):
        self.expect_failure(NOINPUT, 'Cannot find /no/such: No such file.*list files', 'map', '/no/such')
        self.expect_failure(NOINPUT, 'Cannot find /no/such: No such file or directory.$', 'revoke', '--mount', '/no/such')
        self.expect_failure(NOINPUT, 'Cannot open /x+: File name too long', 'hold', '/' + 'x' * 256)
        self.expect_failure(USAGE, '^[^.]*data is no mount point. What is mounted at /dev/shm ', 'revoke', '--mount',
                            self.file)
        # the broker's refusals name no file by themselves
        self.expect_failure(UNAVAILABLE, 'Cannot open /dev/null: Only regular files', 'hold', '/dev/null')
        self.expect_failure(DATAERR, rf'range of 1 byte from {SIZE} does not lie .* has {SIZE} bytes', 'hold', '--range',
                            f'{SIZE}:1', self.file)

    def test_reason(self):
        """What the bus does not take does not keep pins from being revoked."""
        holder = self.spawn_tool('hold', self.file)
        self.assertRegex(holder.process.stdout.readline(), '^holding ')
        self.assertEqual(self.tool('revoke', '--file', self.file, '--reason', b'\xff \x1b')[0], OK)
        self.assertRegex(holder.process.stdout.readline(), r' reason \?\\040\\033 ')
        self.assertEqual(holder.wait(), OK)


class Output(Tool):
    def test_full(self):
        """What cannot be written is a failure, once; of a command only if it has none of its own."""
        self.assertEqual(self.tool('hold', self.file, '--', 'sh', '-c', 'exit 3')[0], 3)
        for args, status in ((('--help',), IOERR), (('--version',), IOERR), (('list', '--help'), IOERR),
                             (('status',), IOERR), (('list', '--json=short'), IOERR), (('preflight', self.file), IOERR),
                             (('revoke', '--device', 'lo'), IOERR), (('hold', self.file, '--', 'true'), IOERR),
                             (('hold', self.file, '--', 'sh', '-c', 'exit 3'), 3)):
            with open('/dev/full', 'wb') as full:
                self.expect_failure(status, r'\Apinbrokerctl: Cannot write the output: No space left on device\.\n\Z',
                                    *args, stdout=full)

    def test_watching_in_vain(self):
        """Who cannot say what there is does not go on looking."""
        with open('/dev/full', 'wb') as full:
            watch = subprocess.Popen([TOOL, 'watch'], stdout=full, stderr=subprocess.PIPE, env=self.env)
        self.addCleanup(watch.stderr.close)
        self.addCleanup(watch.wait)
        self.addCleanup(watch.kill)
        self.assertRegex(watch.stderr.readline(), b'^Watching')
        with self.spawn_tool('hold', self.file).process as holder:
            self.assertRegex(holder.stdout.readline(), '^holding ')
            self.assertEqual(self.tool('revoke', '--file', self.file)[0], OK)
        self.assertEqual(watch.wait(WAIT), IOERR)
        self.assertRegex(watch.stderr.read(), b'^pinbrokerctl: Cannot write the output: ')

    def test_reader_gone(self):
        """A file is held, and a command runs on, whether anybody reads about it or not; the command itself is told as
        always.
        """
        ready, end = os.pipe()
        script = f'head -c1 <&{ready} >/dev/null; yes; exit 9'
        holder = self.spawn([TOOL, 'hold', self.file, '--', 'bash', '-c', script], env=self.env, pass_fds=[ready])
        os.close(ready)
        end = os.fdopen(end, 'wb')
        self.addCleanup(end.close)
        self.assertRegex(holder.process.stdout.readline(), '^holding ')
        holder.process.stdout.close()
        self.assertEqual(self.tool('revoke', '--file', self.file)[0], OK)
        holder.wait_for_log('Cannot write the output: Broken pipe')
        self.assertIsNone(holder.process.poll())
        end.close()
        # yes was killed by SIGPIPE, and bash went on
        self.assertEqual(holder.wait(), 9)

    def test_closed(self):
        """Nothing else gets the number of a descriptor that people read."""
        shell = ('sh', '-c', 'exec "$@" >&-', 'sh')
        self.expect_failure(IOERR, 'Cannot write the output: Bad file descriptor', 'list', before=shell)
        script = 'test ! -e /proc/$$/fd/1 && readlink /proc/$PPID/fd/1 >&2 && exit 3'
        status, _, err = self.tool('hold', self.file, '--', 'sh', '-c', script, before=shell)
        self.assertEqual((status, err), (3, b'pinbrokerctl: Cannot write the output: Bad file descriptor.\n/dev/null\n'))

    @staticmethod
    def width(line):
        return sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in line)

    def test_widths(self):
        """A table fits into 40 columns and more, whatever the names are, with what it is about; and help into 80."""
        name = os.path.join(self.dir, '\u65e5\u672c' * 30 + ' and more')
        os.rename(self.file, name)
        holder = self.spawn_tool('hold', '--on-revoke', 'ignore', name)
        pin = re.search(r' pin (\d+) ', holder.process.stdout.readline()).group(1)
        self.tool('revoke', pin, '--no-wait', '--timeout', '100', '--reason', 'long ' * 50)
        for columns in (40, 80, 200):
            for kind in ('pins', 'files', 'clients', 'contexts', 'revocations'):
                _, out, _ = self.tool('list', kind, COLUMNS=str(columns))
                lines = out.decode().splitlines()
                self.assertLessEqual(max(map(self.width, lines)), columns, out)
                self.assertEqual(lines[0].split()[0], kind[:-1].upper())
                self.assertEqual('PATH' in lines[0], kind not in ('clients', 'contexts'))
            lines = self.on_terminal(columns, 'list').splitlines()
            self.assertLessEqual(max(map(self.width, lines)), columns, lines)
        for columns in ('0', '-1', 'x', '', '65536', str(2 ** 32), '9' * 30):
            self.assertEqual(self.tool('map', name, COLUMNS=columns), self.tool('map', name), columns)
        for program in (TOOL, DAEMON):
            said = subprocess.run([program, '--help'], capture_output=True, encoding='utf-8', timeout=WAIT, check=True)
            self.assertLessEqual(max(map(len, said.stdout.splitlines())), 79)
        self.assertLessEqual(max(map(len, self.tool('preflight', '/dev/null')[1].decode().splitlines())), 80)
        self.expect_end(holder)

    def on_terminal(self, columns, *args):
        main, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))
        self.tool(*args, '--no-pager', stdout=terminal)
        os.close(terminal)
        with open(main, 'rb', buffering=0) as f:
            return f.read(1 << 16).decode().replace('\r', '')


class Trouble(Tool):
    def test_limits(self):
        """They are named, and no reason to look after the broker."""
        os.chmod(self.dir, 0o755)
        os.chmod(self.file, 0o666)

        def limited(limit):
            return ('bash', '-c', f'ulimit {limit}; exec "$@"', 'bash')

        for args in (('list',), ('status',), ('hold', self.file, '--', 'true')):
            n_failed = 0
            # with fewer a sanitizer does not start
            least = 8 if os.environ.get('PINBROKER_SANITIZED') else 5
            for n in range(least, 100):
                status, _, err = self.tool(*args, before=limited(f'-n {n}'))
                if status == OK:
                    break
                n_failed += 1
                self.assertEqual(status, OSERR, err)
                self.assertRegex(err, rb'\(ulimit -n\)')
                self.assertNotIn(b'systemctl', err)
            self.assertEqual(status, OK)
            if least == 5:
                self.assertGreater(n_failed, 0)
        self.expect_failure(OSERR, r'\(ulimit -l\)', 'hold', self.file, before=limited('-l 0'), nobody=True)
        status, _, err = self.tool('hold', self.file, '--', 'true', before=limited('-u 0'), nobody=True,
                                   ASAN_OPTIONS='detect_leaks=0')  # which it does in a process of its own
        self.assertEqual(status, OSERR)
        self.assertRegex(err, rb'Cannot run true .*\(ulimit -u\)\.\n')
        status, _, err = self.tool('hold', self.file, '--', '/etc/passwd')
        self.assertEqual(status, NOPERM)

    def test_nonsense(self):
        """Somebody else listens there."""
        path = self.path + '-else'
        other = self.listen(path, blocking=True)

        def answer():
            while True:
                connection, _ = other.accept()
                with connection:
                    if connection.recv(4096) == b'end':
                        return
                    connection.sendall(nonsense + b'\0')

        thread = threading.Thread(target=answer)
        thread.start()
        for nonsense in (b'{"parameters":5}', b'{"parameters":{"pin":1,"file":2,"client":3}}'):
            for args in (('list',), ('show', '1'), ('map', self.file), ('hold', self.file)):
                self.expect_failure(PROTOCOL, 'makes no sense', '--socket', path, *args)
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            s.sendall(b'end')
        thread.join()

    def test_no_broker(self):
        """It is said what is not there, and where it was looked for."""
        self.expect_end(self.daemon)
        for args in (('revoke', '1'), ('revoke', '--device', 'lo', '--json=short')):
            self.expect_failure(UNAVAILABLE, r'not on the bus\. See whether .*systemctl status pinbrokerd', *args)
        status, out, _ = self.tool('preflight', self.file)
        self.assertEqual(status, UNAVAILABLE)
        self.assertIn(b'   Broker: not known: no broker was asked\n', out)
        self.daemon = self.start(['--socket', self.path, '--config', self.config, '--bus', self.address + '-none'])
        self.assertIn(b'\n      Bus: org.pinbroker1 is not on it\n', self.tool('status')[1])
        self.assertIn(b'\n      Bus: cannot be asked (unix:path=/none): No such file or directory\n',
                      self.tool('status', '--bus', 'unix:path=/none')[1])

    def test_blind(self):
        """Events come by the bus, and what they are about by the socket."""
        watch = self.spawn_tool('watch', '--socket', '/no/socket')
        watch.wait_for_log('^Watching')
        for number in range(2):
            with self.spawn_tool('hold', self.file).process as holder:
                self.assertRegex(holder.stdout.readline(), '^holding ')
                self.assertEqual(self.tool('revoke', '--file', self.file)[0], OK)
            for what in ('started', 'ended: released'):
                self.assertRegex(watch.process.stdout.readline(), rf' revocation \d+ {what}\n')
            self.assertEqual(watch.text().count('Cannot look up what revocation'), 1, number)

    def test_watching_a_stopped_broker(self):
        self.daemon.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WNOWAIT)
        watch = self.spawn_tool('watch')
        watch.wait_for_log('does not answer, and nothing is seen until it does: .*systemctl')
        self.daemon.kill(signal.SIGCONT)


class Wording(unittest.TestCase):
    def test_plurals(self):
        """A number that may be one stands before no plural."""
        found = []
        for path in glob.glob(SOURCE + '/*/*.c') + glob.glob(SOURCE + '/client/examples/*'):
            if '/tests/' in path:
                continue
            with open(path, encoding='utf-8') as f:
                text = re.sub(r'"\s*(PRI[a-z]\d+)\s*"', r'\1', f.read())
            found += [(os.path.basename(path), m) for m in re.findall(
                r'%(?:[zlh]*[ud]|PRI[iu]64) (?:bytes|pins|files|clients|contexts|descriptors|ranges|calls|times|messages|'
                r'processes|objects|revocations|users|connections|leases|holders)\b', text)]
        self.assertEqual(found, [])


if __name__ == '__main__':
    signal.alarm(300)
    unittest.main(verbosity=2)
