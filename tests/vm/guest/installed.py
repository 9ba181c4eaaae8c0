# SPDX-License-Identifier: LGPL-2.1-or-later
"""The installed daemon in its units, holders in units of their own, and what can be seen of them."""
import contextlib
import itertools
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys

os.environ.setdefault('PINBROKERD', '/usr/sbin/pinbrokerd')
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../integration'))

SERVICE, SOCKET = 'pinbrokerd.service', 'pinbrokerd.socket'
ADDRESS = '/run/pinbroker/org.pinbroker'
NAME, ROOT, MANAGER = 'org.pinbroker1', '/org/pinbroker1', 'org.pinbroker1.Manager'
TESTER = 1500
TIMEOUT = 60  # seconds, for any event: the machine is emulated
SECOND = 10 ** 6
KERNEL = tuple(map(int, re.match(r'(\d+)\.(\d+)', platform.release()).groups()))


def run(*argv, **options):
    return subprocess.run([str(arg) for arg in argv], capture_output=True, encoding='utf-8',
                          timeout=2 * TIMEOUT, **{'check': False, **options})


def output(*argv):
    result = run(*argv)
    if result.returncode != 0:
        raise AssertionError(f'{argv}: {result.returncode} {result.stdout}{result.stderr}')
    return result.stdout


def show(unit, name):
    return output('systemctl', 'show', '--value', '-p', name, unit).strip()


def daemon_pid():
    return int(show(SERVICE, 'MainPID'))


def busctl(*argv, **options):
    return run('busctl', '--json=short', *argv, **options)


def call(method, signature='', *args):
    """What a method of the Manager returns."""
    return json.loads(output('busctl', '--json=short', 'call', NAME, ROOT, MANAGER, method,
                             *([signature] if signature else []), *args))['data']


def properties(path, interface):
    answer = output('busctl', '--json=short', 'call', NAME, path, 'org.freedesktop.DBus.Properties',
                    'GetAll', 's', interface)
    return {name: value['data'] for name, value in json.loads(answer)['data'][0].items()}


def leases(path):
    """Of a file in /proc/locks: (ACTIVE or BREAKING, READ or WRITE, pid)."""
    inode = str(os.stat(path).st_ino)
    with open('/proc/locks', encoding='ascii') as f:
        fields = [line.split() for line in f]
    return [(f[2], f[3], int(f[4])) for f in fields
            if f[1] == 'LEASE' and f[5].split(':')[-1] == inode]


class Lines:
    """JSON, a line each, from a process that goes on."""

    def __init__(self, *argv):
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        bufsize=0)

    def read(self):
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            raise AssertionError(f'{self.process.args}: nothing in {TIMEOUT} s')
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f'{self.process.args}: ended with {self.process.wait()}')
        return json.loads(line)

    def wait(self):
        return self.process.wait(TIMEOUT)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Program:
    """A process that does what it is told, line by line, and says what becomes of it; with its children."""

    def __init__(self, test, *argv):
        self.said = b''
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                        start_new_session=True)
        self.pid = self.process.pid
        test.addCleanup(self.end)

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, command, result=0):
        self.process.stdin.write(command.encode() + b'\n')
        self.expect(f'{command} {result}')

    def expect(self, text):
        """Waits for that line, and forgets those up to it."""
        lines, text = [], text.encode()
        while not lines or not lines[-1].startswith(text):
            while b'\n' not in self.said:
                ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
                data = os.read(self.process.stdout.fileno(), 4096) if ready else b''
                if not data:
                    raise AssertionError(f'{lines + [self.said]}, not {text}')
                self.said += data
            line, self.said = self.said.split(b'\n', 1)
            lines.append(line)


class Holder(Lines):
    """pinbrokerctl hold; its events are what it says."""
    numbers = itertools.count(1)

    def __init__(self, path, *options, user='root'):
        self.unit = f'holder-{next(self.numbers)}.service'
        super().__init__('systemd-run', '--quiet', '--collect', '--pipe', '--wait',
                         '--unit', self.unit, '--uid', user, 'pinbrokerctl', '--json=short',
                         'hold', '--access', 'write', *options, path)
        self.pin = self.expect('holding')['pin']
        self.pid = int(show(self.unit, 'MainPID'))

    def expect(self, event):
        said = self.read()
        if said['event'] != event:
            raise AssertionError(f'{said}, not {event}')
        return said

    def expect_release(self):
        """Past what it says of why."""
        while True:
            said = self.read()
            if said['event'] == 'released':
                return said

    def close(self):
        if self.process.poll() is None:
            run('systemctl', 'kill', '--signal=KILL', self.unit)
            self.process.wait(TIMEOUT)
        super().close()


def journal(message_id, **fields):
    """The next entry with that MESSAGE_ID and these fields, once it is there."""
    lines = Lines('journalctl', '--follow', '--no-tail', '--boot', '--output=json',
                  f'_SYSTEMD_UNIT={SERVICE}', f'MESSAGE_ID={message_id}',
                  *(f'{name}={value}' for name, value in fields.items()))
    try:
        return lines.read()
    finally:
        lines.close()
