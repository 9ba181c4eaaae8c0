#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""pinbrokerctl: each verb and option, by what it says of this test's own objects, as text and as JSON."""

import contextlib
import json
import mmap
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time

from client import (PAGE, PAGES, SIZE, SLOWNESS, WAIT, World, equal, expect, is_readable,
                    truncate_in_child)
from rules import Holder, mounted, ranges, running

TOOL = os.path.join(os.environ['BUILD_ROOT'], 'client', 'pinbrokerctl')
COMPLETION = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'client',
                          'pinbrokerctl.bash')
OK, USAGE, DATAERR, NOINPUT, UNAVAILABLE, TEMPFAIL = 0, 64, 65, 66, 69, 75  # sysexits.h
GRACE = 10 if SLOWNESS == 1 else 30  # seconds: longer than half a dozen commands take
VERBS = ('status', 'list', 'show', 'revoke', 'watch', 'map', 'preflight', 'hold')


class Running(subprocess.Popen):
    """Ends with its block, also where that fails."""

    def __exit__(self, *args):
        if args[0]:
            self.kill()
        super().__exit__(*args)


class Tool:
    def __init__(self, world):
        self.env = dict(os.environ, PINBROKER_SOCKET=world.path, LC_ALL='C.UTF-8', COLUMNS='200',
                        PINBROKER_BUS='unix:path=' + os.path.join(world.dir, 'bus'))

    def run(self, *args, status=OK, error='', **env):
        """What it prints; error: a pattern that its stderr has, by default nothing at all."""
        r = subprocess.run([TOOL, *map(str, args)], stdin=subprocess.DEVNULL, timeout=WAIT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
                           env=self.env | env)
        expect(r.returncode == status and re.search(error or r'\A\Z', r.stderr),
               args, r.returncode, r.stdout, r.stderr)
        return r.stdout

    def json(self, *args, **kwargs):
        """The same object on a line and on several."""
        short = self.run('--json=short', *args, **kwargs)
        equal(short.count('\n'), 1)
        value = json.loads(short)
        pretty = self.run(args[0], '--json=pretty', *args[1:], **kwargs)
        expect(pretty.count('\n') > 1 or value in ([], {}), pretty)
        equal(keys(json.loads(pretty)), keys(value))
        return value

    def once(self, *args, **kwargs):
        """For what has consequences."""
        return json.loads(self.run('--json=short', *args, **kwargs))

    def start(self, *args):
        """A tool that goes on; its lines come from its stdout."""
        return Running([TOOL, *map(str, args)], stdin=subprocess.DEVNULL, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env)

    @contextlib.contextmanager
    def hold(self, *args):
        """A process that holds a file, once it does; its first line."""
        with self.start('hold', *args) as process:
            try:
                yield process, process.stdout.readline()
            finally:
                process.terminate()  # upon which it lets go


def keys(value):
    """What a JSON text has, but for times that pass between two calls."""
    if isinstance(value, dict):
        return {k: keys(v) for k, v in value.items()}
    return [keys(v) for v in value] if isinstance(value, list) else type(value)


def fields(line):
    """The numbers and words behind the keys of a line of hold's."""
    words = line.split()
    return dict(zip(words[2::2], words[3::2])) | {'event': words[0], 'path': words[1]}


def rows(text):
    """Of a table, by title, with the line below it."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [dict(zip(lines[0], line)) for line in lines[1:]]


class Objects:
    """A client of this process with a file, an opaque context and two pins."""

    def __init__(self, world):
        self.holder = Holder(world, 'tester')
        self.client = self.holder.client['client']
        self.file = self.holder.open(world.file)['file']
        self.context = self.holder.context()
        self.pins = self.holder.call('Pin', {
            'file': self.file, 'context': self.context, 'access': 'read', 'label': 'mine',
            'ranges': ranges((0, SIZE // 4), (SIZE // 2, PAGE))})['pins']
        self.holder.call('Bind', {'pin': self.pins[0], 'handle': 7})

    def drop(self):
        self.holder.call('Unpin', {'pins': self.pins})
        self.holder.close()


def test_list(world, tool, o):
    pins = rows(tool.run('list'))
    equal([(p['PIN'], p['CLIENT'], p['FILE'], p['CONTEXT'], p['OFFSET'], p['LENGTH'], p['ACCESS'],
            p['STATE'], p['HANDLE'], p['LABEL'], p['PATH']) for p in pins[:2]],
          [(str(o.pins[0]), str(o.client), str(o.file), str(o.context), '0', '4M', 'read', 'bound',
            '7', 'mine', world.file),
           (str(o.pins[1]), str(o.client), str(o.file), str(o.context), '8M', '4K', 'read',
            'reserved', '-', 'mine', world.file)])
    expect(tool.run('list', 'pins').endswith('\n2 pins listed.\n'))
    equal(tool.run('list', 'pins', '--no-legend').split()[0], str(o.pins[0]))
    pins = tool.json('list', 'pins')
    equal([(p['pin'], p['offset'], p['length'], p['handle'], p['revocation']) for p in pins],
          [(o.pins[0], 0, SIZE // 4, 7, None), (o.pins[1], SIZE // 2, PAGE, None, None)])
    equal(tool.json('list', 'pins', '--file', 999), [])
    equal(tool.run('list', 'pins', '--file', 999), '0 pins listed.\n')
    equal(len(tool.json('list', 'pins', '--file', o.file)), 2)
    equal(len(tool.json('list', 'pins', '--client', o.client)), 2)

    file = tool.json('list', 'files')[0]
    equal((file['file'], file['path'], file['fileSystem'], file['size'], file['inode'],
           file['access'], file['lease'], file['exposed'], file['clients'], file['pins']),
          (o.file, world.file, 'tmpfs', SIZE, os.stat(world.file).st_ino, 'read', 'read', False,
           1, 2))
    equal([file[key] for key in ('kind', 'deviceName', 'namespace', 'region', 'numaNode')],
          ['tmpfs', None, None, None, None])
    file = rows(tool.run('list', 'files'))[0]
    equal((file['FILE'], file['SIZE'], file['LEASE']), (str(o.file), '16M', 'read'))
    client = tool.json('list', 'clients')[0]
    equal((client['client'], client['pid'], client['uid'], client['name'], client['pins'],
           client['pinnedBytes'], client['alive'], client['connected']),
          (o.client, os.getpid(), 0, 'tester', 2, SIZE // 4 + PAGE, True, True))
    expect(f' {os.getpid()} ' in tool.run('list', 'clients'))
    context = tool.json('list', 'contexts', '--client', o.client)[0]
    equal((context['context'], context['kind'], context['forcible'], context['proof'],
           context['pins']), (o.context, 'opaque', False, 'claimed', 2))
    expect(tool.run('list', 'contexts').split('\n')[1].split()[:3] ==
           [str(o.context), str(o.client), 'opaque'])
    equal(tool.json('list', 'revocations'), [])
    for columns in (80, 100):
        for kind in ('pins', 'files', 'clients', 'contexts'):
            text = tool.run('list', kind, COLUMNS=str(columns))
            expect(max(map(len, text.splitlines())) <= columns, text)
    # what is left out first, and what stays
    title = tool.run('list', COLUMNS='80').split('\n')[0].split()
    expect('HANDLE' not in title and 'PATH' in title, title)
    expect('…' in tool.run('list', COLUMNS='80'))


def test_show(world, tool, o):
    shown = tool.json('show', o.pins[1], o.file, o.client, o.context, o.file)
    equal([(s['type'], s[s['type']]) for s in shown],
          [('pin', o.pins[1]), ('file', o.file), ('client', o.client), ('context', o.context)])
    equal((shown[0]['offset'], shown[1]['path'], shown[2]['pid'], shown[3]['kind']),
          (SIZE // 2, world.file, os.getpid(), 'opaque'))
    text = tool.run('show', o.pins[0])
    expect(text.startswith(f'pin {o.pins[0]}\n') and re.search(r'^ +handle: 7$', text, re.M), text)
    text = tool.run('show', o.file, 999, status=NOINPUT, error='no object 999. .*list')
    expect(f'path: {world.file}\n' in text, text)


def test_on_demand(world, tool, o):
    pins = o.holder.call('Pin', {'file': o.file, 'context': o.context, 'access': 'read', 'onDemand': True,
                                 'label': 'mine', 'ranges': ranges((0, SIZE // 8))})['pins']
    equal({p['pin']: p['onDemand'] for p in tool.json('list', 'pins')},
          {o.pins[0]: False, o.pins[1]: False, pins[0]: True})
    equal([p['ON-DEMAND'] for p in rows(tool.run('list', 'pins', COLUMNS='200'))[:3]], ['no', 'no', 'yes'])
    expect(re.search(r'(?m)^ +onDemand: yes$', tool.run('show', pins[0])))
    text = tool.run('map', world.file)
    expect(f' as mine, on demand, pin {pins[0]}\n' in text, text)
    expect(f' as mine, pins {o.pins[0]} {o.pins[1]}\n' in text, text)
    o.holder.call('Unpin', {'pins': pins})


def test_status(world, tool, o):
    s = tool.json('status')
    equal((s['socket'], s['pid'], s['counts']['pins'], s['counts']['pinnedBytes'],
           s['counts']['clients'], s['counts']['files'], s['counts']['contexts'],
           s['counts']['revocations'], s['exposed'], s['revocations']),
          (world.path, world.daemon.pid, 2, SIZE // 4 + PAGE, 1, 1, 1, 0, [], []))
    equal(set(s['features']), {'io_uring', 'af_xdp', 'rdma', 'vfio', 'opaque'})
    equal(s['kernel']['release'], os.uname().release)
    with open('/proc/sys/fs/lease-break-time', encoding='ascii') as f:
        equal(s['kernel']['leaseBreakSec'], int(f.read()))
    expect(s['busName'].startswith(':') and s['counts']['signalQueueOverflows'] == 0, s)
    text = tool.run('status')
    expect(text.startswith(f'pinbrokerd {s["version"]} at {world.path}\n'), text)
    for part in (f'as {s["busName"]}, pid {world.daemon.pid}', os.uname().release,
                 '1 client, 1 file, 1 context, 2 pins, 4100K pinned\n', 'Revocations running: 0'):
        expect(part in text, part, text)
    text = tool.run('status', PINBROKER_BUS='unix:path=/nowhere')
    expect('Bus: cannot be asked (unix:path=/nowhere): No such file' in text, text)


def test_map(world, tool, o):
    lines = tool.run('map', world.file, COLUMNS='64', LC_ALL='C').splitlines()
    expect(f'{world.file}: file {o.file}, 16M on tmpfs, lease read, 2 pins of 1 client' == lines[0],
           lines)
    equal(lines[1], '0' + '16M'.rjust(63))
    expect(re.fullmatch(rf'client {o.client} \(.*pid {os.getpid()}, uid 0\): read of 4100K as mine, '
                        rf'pins {o.pins[0]} {o.pins[1]}', lines[2]), lines[2])
    equal(lines[3], '#' * 16 + '.' * 16 + '+' + '.' * 31)
    expect('a cell is 262144 bytes' in lines[5], lines)
    expect('█' * 16 + '·' * 16 + '▒' + '·' * 31 in tool.run('map', world.file, COLUMNS='64'))
    # wherever it stands, it is the file that counts
    link = os.path.join(world.dir, 'link')
    os.symlink(world.file, link)
    drawn = tool.json('map', link)
    equal((drawn['file']['file'], [p['pin'] for p in drawn['pins']], drawn['clients'][0]['pid']),
          (o.file, o.pins, os.getpid()))
    expect('\x1b' not in tool.run('map', world.file))
    expect('\x1b[32m' in on_terminal(tool, 'map', '--no-pager', world.file))
    expect('\x1b' not in on_terminal(tool, 'map', '--no-pager', world.file, NO_COLOR='1'))
    tool.run('map', '/etc/passwd', status=NOINPUT, error='not open through the broker.*list files')


def on_terminal(tool, *args, **env):
    master, slave = pty.openpty()
    with subprocess.Popen([TOOL, *args], stdin=subprocess.DEVNULL, stdout=slave,
                          env=tool.env | {'TERM': 'xterm'} | env) as process:
        os.close(slave)
        out = b''
        with contextlib.suppress(OSError):  # EIO is its end
            while data := os.read(master, 65536):
                out += data
        equal(process.wait(WAIT), 0)
    os.close(master)
    return out.decode()


def test_pager(tool, o):
    out = on_terminal(tool, 'list', PINBROKER_PAGER='sed s/^/paged:/')
    expect(f'paged: {o.pins[0]}' in re.sub(' +', ' ', out), out)
    expect('paged' not in on_terminal(tool, 'list', '--no-pager', PINBROKER_PAGER='sed s/^/paged:/'))


def test_revoked(world, tool):
    """A revocation as list, show, map, status and watch have it, from its start to its end."""
    with tool.start('watch') as watch, tool.start('watch', '--json=short') as json_watch, \
            tool.hold('--access', 'write', '--on-revoke', 'ignore', world.file) as (holder, line):
        expect('Watching' in watch.stderr.readline())
        pin = fields(line)['pin']
        equal(fields(line)['path'], world.file)
        # Its bus connection is there once it has listed itself as listening.
        wait_for_watchers(world, 2)
        child, result = truncate_in_child(world.file, PAGE)
        equal(fields(holder.stdout.readline())['event'], 'revoked')
        notice = fields(holder.stdout.readline())
        equal((notice['event'], notice['pins'], notice['cause'], notice['size'], notice['pid']),
              ('updated', pin, 'truncate', str(PAGE), str(child)))
        revocation = int(notice['revocation'])
        equal(tool.json('show', pin)[0]['revocation'], revocation)
        status = tool.json('status')
        equal((status['counts']['revocations'], status['revocations'][0]['revocation'],
               status['revocations'][0]['pid'], status['revocations'][0]['state']),
              (1, revocation, child, 'notified'))
        expect('Revocations running: 1\n' in tool.run('status'))
        text = tool.run('list', 'revocations', COLUMNS='80')
        expect(max(map(len, text.splitlines())) <= 80 and ' in ' in text, text)
        expect('endUSec: -\n' in tool.run('show', revocation))
        bar = tool.run('map', world.file, LC_ALL='C', COLUMNS='32').splitlines()[3]
        equal(bar, '!' * 32)
        tool.run('revoke', pin, '--timeout=0')
        equal(os.waitpid(child, 0)[1], 0)
        os.close(result)
        # destroyed by force, it is none any more, though its holder has not let go of it
        equal((tool.json('list'), tool.json('status')['counts']['pins']), ([], 0))
        busctl = subprocess.run(
            ['busctl', '--address=' + tool.env['PINBROKER_BUS'], 'get-property', 'org.pinbroker1',
             '/org/pinbroker1', 'org.pinbroker1.Manager', 'Counts'], check=True, timeout=WAIT,
            stdout=subprocess.PIPE, text=True).stdout
        expect('"pins" 0 ' in busctl, busctl)

        started, ended = watch.stdout.readline(), None
        # who it is, and what he does, may be known by the time that it asks
        expect(re.search(rf' revocation {revocation} started: (modify|truncate to {PAGE} bytes), '
                         rf'{world.file}, 1 pin left, deadline in ', started), started)
        while not ended or f'revocation {revocation} ended' not in ended:
            ended = watch.stdout.readline()
        expect(f': released, wanted by python3 (pid {child})' in ended and 'claimed' in ended, ended)
        events = [json.loads(json_watch.stdout.readline()) for _ in range(4)]
        equal(sorted((e['event'], e['outcome']) for e in events),
              [('ended', 'released')] * 2 + [('started', None)] * 2)
        equal({e['revocation'] for e in events if e['cause'] == 'modify' or e['pid'] == child},
              {revocation})
        watch.terminate()
        json_watch.terminate()
    listed = tool.json('list', 'revocations')
    last = next(r for r in listed if r['revocation'] == revocation)
    equal((last['state'], last['remaining'], last['proof'], last['path']),
          ('released', 0, 'claimed', world.file))
    os.truncate(world.file, SIZE)


def test_same_truth(world, tool):
    """What busctl shows is what pinbrokerctl shows, and what the kernel does."""
    busctl = ['busctl', '--address=' + tool.env['PINBROKER_BUS'], '--json=short']

    def bus(*args):
        return json.loads(subprocess.run(busctl + list(args), check=True, timeout=WAIT,
                                         stdout=subprocess.PIPE).stdout)

    def same(path, interface, shown):
        """Each property has the value that pinbrokerctl shows."""
        names = [name for name in shown if name not in ('type', interface.lower())]
        out = subprocess.run([*busctl, 'get-property', 'org.pinbroker1', path, 'org.pinbroker1.' + interface,
                              *(name[0].upper() + name[1:] for name in names)],
                             check=True, timeout=WAIT, stdout=subprocess.PIPE).stdout
        values = [json.loads(line)['data'] for line in out.splitlines()]
        equal(len(values), len(names))
        for name, value in zip(names, values):
            expect(value == shown[name] or shown[name] is None and value in ('', 2 ** 64 - 1),
                   path, name, value, shown[name])

    monitor = Running([*busctl, 'monitor', 'org.pinbroker1'], stdout=subprocess.PIPE,
                      stderr=subprocess.DEVNULL, text=True)
    with monitor, tool.hold('--on-revoke', 'ignore', world.file) as (holder, line):
        wait_for_monitor(monitor, bus)
        pin = int(fields(line)['pin'])
        child, result = truncate_in_child(world.file, PAGE)
        while fields(holder.stdout.readline()).get('pid') != str(child):
            pass
        shown = tool.json('show', pin)[0]
        file, revocation = shown['file'], shown['revocation']
        root = '/org/pinbroker1'
        same(f'{root}/file/{file}/pin/{pin}', 'Pin', shown)
        same(f'{root}/file/{file}', 'File', tool.json('show', file)[0])
        same(f'{root}/client/{shown["client"]}', 'Client', tool.json('show', shown['client'])[0])
        same(f'{root}/revocation/{revocation}', 'Revocation', tool.json('show', revocation)[0])
        listed = bus('call', 'org.pinbroker1', root, 'org.pinbroker1.Manager', 'ListPins',
                     'a{sv}tu', '0', '0', '0')['data'][0]
        equal([p['pin']['data'] for p in listed], [p['pin'] for p in tool.json('list')])
        with open('/proc/locks', encoding='ascii') as f:
            expect(re.search(rf'LEASE +BREAKING +UNLCK +{world.daemon.pid} \S+:'
                             rf'{os.stat(world.file).st_ino} 0 EOF\n.*-> .* {child} ', f.read()))
        tool.run('revoke', pin, '--timeout=0')
        os.waitpid(child, 0)
        os.close(result)
        seen = set()
        while not {'RevocationStarted', 'RevocationEnded', 'Revoke'} <= seen:
            message = json.loads(monitor.stdout.readline())
            if message.get('payload', {}).get('data', [None])[0] == revocation:
                seen.add(message['member'])
        monitor.terminate()
    os.truncate(world.file, SIZE)


def wait_for_monitor(monitor, bus):
    """Until it has seen something: it does not say in every version when it begins."""
    end = time.monotonic() + WAIT
    while not is_readable(monitor.stdout, 0.1):
        bus('get-property', 'org.pinbroker1', '/org/pinbroker1', 'org.pinbroker1.Manager', 'Version')
        expect(time.monotonic() < end)


def wait_for_watchers(world, n):
    """Until so many listen to the end of revocations on the bus."""
    command = ['busctl', '--address=unix:path=' + os.path.join(world.dir, 'bus'), '--json=short',
               'call', 'org.freedesktop.DBus', '/org/freedesktop/DBus',
               'org.freedesktop.DBus.Debug.Stats', 'GetAllMatchRules']
    end = time.monotonic() + WAIT
    while True:
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=WAIT).stdout
        rules = json.loads(out)['data'][0]
        if sum(any('RevocationEnded' in rule for rule in of) for of in rules.values()) >= n:
            return
        expect(time.monotonic() < end, rules)


def test_revoke(world, tool):
    def held(*args):
        return tool.hold('--range', f'0:{PAGE}', '--range', f'{4 * PAGE}:{PAGE}', *args, world.file)

    with held() as (holder, line):
        first, second = int(fields(line)['pin']), int(fields(holder.stdout.readline())['pin'])
        said = tool.run('revoke', first, '--reason', 'a b', '--timeout', 5)
        expect(re.fullmatch(r'revocation \d+ released: 1 pin of 1 client\n', said), said)
        notice = holder.stdout.readline()
        expect(re.search(rf'^revoked {world.file} pins {first} .*cause admin .*reason a\\040b left '
                         r'[0-5]\.\d+ ', notice), notice)
        equal(fields(holder.stdout.readline())['pin'], str(first))
        o = tool.once('revoke', '--file', world.file)
        equal((o['outcome'], o['remaining'], o['pins'], o['clients']), ('released', [], 1, 1))
        equal(fields(holder.stdout.readline())['pins'], str(second))
        equal(holder.wait(WAIT), 0)
    with held() as (holder, line):
        client = next(c for c in tool.json('list', 'clients') if c['pid'] == holder.pid)['client']
        expect('released' in tool.run('revoke', '--client', client, '--wait'))
        equal(holder.wait(WAIT), 0)
    with held('--on-revoke', 'ignore') as (holder, line):
        begin = time.monotonic()
        expect('started' in tool.run('revoke', fields(line)['pin'], '--no-wait'))
        tool.run('revoke', '--file', world.file, '--timeout', '0.2')
        expect(0.2 <= time.monotonic() - begin < GRACE / 2)
        equal(tool.json('list', 'pins'), [])
        holder.terminate()
    # what is there has nothing pinned: done
    equal(tool.run('revoke', '--device', 'lo'), 'nothing is pinned on lo\n')
    equal(tool.once('revoke', '--device', 'lo'), {'revocation': None, 'outcome': 'released', 'pins': 0,
                                                  'clients': 0, 'remaining': []})
    tool.run('revoke', '--device', 'nothing0', status=NOINPUT, error='nothing0')
    tool.run('revoke', 999999, status=NOINPUT, error='pin.*999999.*list shows')
    tool.run('revoke', '--client', 999999, status=NOINPUT, error='client 999999')
    tool.run('revoke', '--file', '/etc/passwd', status=NOINPUT, error='/etc/passwd')


def test_remaining(world, tool):
    """Its holder has closed the context, but somebody else has it: nothing can be detached, and nobody
    be signalled."""
    h, context_fd = Holder(world, 'closed'), os.eventfd(0)
    context = h.call('AddContext', {'fileDescriptor': 0}, [context_fd])['context']
    with subprocess.Popen(['cat'], stdin=subprocess.PIPE, pass_fds=[context_fd]) as other:
        os.close(context_fd)
        pins = h.call('Pin', {'file': h.open(world.file)['file'], 'context': context,
                              'access': 'read', 'ranges': ranges((0, PAGE))})['pins']
        said = (rf'ended as lost.*:\n  pin {pins[0]} on {world.file}, held by client '
                rf'{h.client["client"]} \(python3, pid {os.getpid()}, uid 0\)')
        tool.run('revoke', pins[0], '--timeout=0', status=TEMPFAIL, error=said)
        o = tool.once('revoke', '--timeout=0', '--file', world.file, status=TEMPFAIL, error='lost')
        equal((o['outcome'], [(p['pin'], p['client'], p['pid'], p['comm'])
                              for p in o['remaining']]),
              ('lost', [(pins[0], h.client['client'], os.getpid(), 'python3')]))
        h.call('Unpin', {'pins': pins})
        h.close()
        other.stdin.close()


def test_mount(world, tool):
    point = os.path.join(world.dir, 'mnt')
    os.mkdir(point)
    subprocess.run(['mount', '-t', 'tmpfs', 'none', point], check=True)
    try:
        path = os.path.join(point, 'data')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
        outside = Holder(world)
        others = outside.call('Pin', {
            'file': outside.open(world.file)['file'], 'context': outside.context(),
            'access': 'read', 'ranges': ranges((0, PAGE))})['pins']
        with tool.hold(path) as (holder, _), open(path, 'rb') as kept:
            said = rf'{point} cannot be unmounted .*:\n  python3 \(pid {os.getpid()}, uid 0\) reads\n'
            expect('released' in tool.run('revoke', '--mount', point + '/', status=TEMPFAIL,
                                          error=said))
            o = tool.once('revoke', '--mount', point, status=TEMPFAIL, error='in use by')
            equal([(u['pid'], u['uid'], u['uses']) for u in o['openers']],
                  [(os.getpid(), 0, ['reads'])])
            mapping = mmap.mmap(kept.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        o = tool.once('revoke', '--mount', point, status=TEMPFAIL, error='maps')
        equal(o['openers'][0]['uses'], ['reads', 'maps'])  # mmap keeps a descriptor
        mapping.close()
        # a client that has it open here, and no descriptor of its own
        idle = Holder(world)
        file = idle.open(path, 'write')['file']
        o = tool.once('revoke', '--mount', point)
        equal(o['openers'], [])
        subprocess.run(['umount', point], check=True)
        subprocess.run(['mount', '-t', 'tmpfs', 'none', point], check=True)
        idle.refused('Revoked', {'revocation': o['revocation'], 'pins': []}, 'Pin', {
            'file': file, 'context': idle.context(), 'access': 'read', 'ranges': ranges((0, PAGE))})
        idle.close()
        equal([p['pin'] for p in tool.json('list', 'pins')], others)
        outside.call('Unpin', {'pins': others})
        outside.close()
        tool.run('revoke', '--mount', world.dir, status=USAGE, error='no mount point.*/dev/shm')
        tool.run('revoke', '--mount', '/no/such', status=NOINPUT, error='/no/such')
    finally:
        subprocess.run(['umount', point], check=True)


def verdicts(o):
    """Of what needs no device: the error of those that are refused, and which were tried."""
    return {(p['mechanism'], p['access']): (p['tried'], p['error'] if p['possible'] is False else 'ok')
            for p in o['pins'] if p['mechanism'] in ('io_uring', 'af_xdp')}


def test_preflight(world, tool):
    expected = {(m, a): (True, 'EFAULT' if a == 'read' else 'ok')
                for m in ('io_uring', 'af_xdp') for a in ('read', 'write')}
    o = tool.json('preflight', world.file)
    equal((o['path'], o['size'], o['inode'], o['fileSystem'], o['mountPoint'], o['backing'],
           o['broker'], o['guard'], o['hazard'], o['openers']),
          (world.file, SIZE, os.stat(world.file).st_ino, 'tmpfs', '/dev/shm', 'tmpfs', None, None,
           None, []))
    equal(verdicts(o), expected)
    equal((o['lease']['read']['possible'], o['lease']['write']['possible'],
           o['lease']['write']['settleUSec']), (True, True, o['lease']['write']['breakUSec']))
    with open(world.file, 'rb'):
        o = tool.json('preflight', world.file)
        equal([(u['pid'], u['comm'], u['uses']) for u in o['openers']],
              [(os.getpid(), 'python3', ['reads'])])
        equal((o['lease']['read']['inTheWay'], o['lease']['write']['inTheWay']), (0, 1))
        text = tool.run('preflight', world.file)
        expect('for reading yes\n' in text and 'for writing not until 1 of the processes' in text,
               text)
        expect(f'\n  python3 (pid {os.getpid()}, uid 0) reads\n' in text, text)
        equal((o['lease']['read']['granted'], o['lease']['write']['granted'], o['kernelHolders']),
              (True, False, ''))
    # on its way in a socket, it is nobody's who could be named
    sender, receiver = socket.socketpair()
    with open(world.file, 'rb+') as f:
        socket.send_fds(sender, [b'x'], [f.fileno()])
    o = tool.json('preflight', world.file)
    equal((o['openers'], o['lease']['read']['granted'], o['lease']['write']['granted']),
          ([], False, False))
    expect('for reading no: the kernel grants none' in tool.run('preflight', world.file))
    sender.close()
    receiver.close()
    # it breaks no lease, and says whose the file is
    with tool.hold(world.file) as (_, line):
        o = tool.json('preflight', world.file)
        equal((o['broker']['lease'], o['broker']['pins']), ('read', 1))
        expect('with 1 pin\n' in tool.run('preflight', world.file))
        equal(tool.json('show', fields(line)['pin'])[0]['revocation'], None)
    with mounted('ext4') as mount:
        path = os.path.join(mount, 'a b')
        with open(path, 'wb') as f:
            f.truncate(SIZE)
        o = tool.json('preflight', path)
        equal((o['fileSystem'], o['mountPoint'], o['backing']), ('ext4', mount, 'page cache'))
        if kernel() >= (6, 5):
            equal(verdicts(o), {cell: (True, 'EFAULT') for cell in expected})
            equal([(p['tried'], p['error']) for p in o['pins']
                   if (p['mechanism'], p['access']) == ('vfio', 'write')], [(False, 'EFAULT')])
            expect('told of every write (tried: EFAULT)' in tool.run('preflight', path))
        expect('msync' in o['hazard'] and 'written back' in tool.run('preflight', path))
        equal(set(os.listdir(mount)), {'a b', 'lost+found'})
        loop = subprocess.run(['losetup', '--show', '--find', path], check=True, encoding='ascii',
                              stdout=subprocess.PIPE).stdout.strip()
        try:
            o = tool.json('preflight', path)
            equal((o['kernelHolders'], o['lease']['read']['granted']), (os.path.basename(loop), False))
            expect(f'\n  the kernel: {os.path.basename(loop)}\n' in tool.run('preflight', path))
        finally:
            subprocess.run(['losetup', '--detach', loop], check=True)
    o = tool.once('preflight', '/dev/null', status=UNAVAILABLE)
    equal((o['backing'], o['lease']['read']['possible'], o['pins'][0]['possible']),
          ('none', False, False))
    expect(o['lease']['read']['reason'], o)
    tool.run('preflight', '/no/such', status=NOINPUT, error='/no/such')
    text = tool.run('preflight', world.file, status=UNAVAILABLE, error='Cannot ask the broker',
                    PINBROKER_SOCKET='/no/socket')
    expect('not known: no broker was asked' in text and 'io_uring fixed buffer' in text, text)


def kernel():
    return tuple(map(int, re.match(r'(\d+)\.(\d+)', os.uname().release).groups()))


def test_hold(world, tool):
    said = tool.run('hold', '--access', 'write', '--range', f'{PAGE}:{2 * PAGE}', world.file, '--',
                    'sh', '-c', 'exit 7', status=7)
    holding, released = map(fields, said.splitlines())
    equal((holding['event'], holding['offset'], holding['length'], holding['access'],
           holding['pages']), ('holding', str(PAGE), str(2 * PAGE), 'write', 'pinned'))
    equal((released['event'], released['pin']), ('released', holding['pin']))
    events = [json.loads(line) for line in
              tool.run('hold', '--json=short', world.file, '--', 'true').splitlines()]
    equal([(e['event'], e['path'], e['pin']) for e in events],
          [('holding', world.file, events[0]['pin']), ('released', world.file, events[0]['pin'])])
    equal((events[0]['length'], events[0]['access']), (PAGES * PAGE, 'read'))
    tool.run('hold', world.file, '--range', f'{SIZE}:1', status=DATAERR, error='Cannot pin')
    tool.run('hold', '/no/such', status=NOINPUT, error='/no/such')
    tool.run('hold', '/dev/shm', status=UNAVAILABLE, error='Only regular files')
    tool.run('hold', world.file, '--', '/no/such', status=NOINPUT, error='Cannot run /no/such')


def test_usage(tool):
    for args, error in (
            ((), 'no command'), (('frob',), 'no command frob'), (('--frob', 'list'), 'frob'),
            (('list', 'frobs'), 'not frobs'), (('list', 'pins', 'files'), 'One kind'),
            (('list', '--file', 'x'), '--file'), (('list', '--client', '0'), '--client'),
            (('list', '--json=frob'), 'short or pretty'), (('show',), 'nothing to show'),
            (('show', 'x'), 'not by x'), (('revoke',), 'nothing to revoke'),
            (('revoke', 'x'), 'not by x'), (('revoke', '1', '--file', '/x'), 'either'),
            (('revoke', '--mount', '/', '--device', 'x'), 'either'),
            (('revoke', '1', '--timeout', 'soon'), '--timeout'), (('watch', 'x'), 'no arguments'),
            (('status', 'x'), 'no arguments'), (('map',), 'one file'), (('preflight',), 'one file'),
            (('hold',), 'no file'), (('hold', '/a', '/b'), 'One file'),
            (('hold', '/a', '--range', '1'), '--range'), (('hold', '/a', '--access', 'x'), '--access'),
            (('hold', '/a', '--on-revoke', 'x'), '--on-revoke')):
        tool.run(*args, status=USAGE, error=f'(?s){error}.*Try pinbrokerctl --help')
    text = tool.run('--help')
    for verb in VERBS:
        expect(re.search(rf'^  {verb}\b', text, re.M), verb)
        equal(tool.run(verb, '--help'), text)
    expect(re.fullmatch(r'pinbrokerctl \d+\.\d+\.\d+\n', tool.run('--version')))


def test_no_broker(tool):
    gone = {'PINBROKER_SOCKET': '/no/socket', 'PINBROKER_BUS': 'unix:path=/no/bus'}
    for args in (('status',), ('list',), ('show', '1'), ('map', '/etc/passwd'),
                 ('hold', '/etc/passwd')):
        tool.run(*args, status=UNAVAILABLE, error='/no/socket', **gone)
    for args in (('revoke', '1'), ('watch',)):
        tool.run(*args, status=UNAVAILABLE, error='/no/bus.*--bus', **gone)
    expect(tool.run('--socket', tool.env['PINBROKER_SOCKET'], 'list', PINBROKER_SOCKET='/no/socket'))
    expect(tool.run('--bus', tool.env['PINBROKER_BUS'], 'revoke', '--device', 'lo',
                    PINBROKER_BUS='unix:path=/no/bus'))


def complete(tool, *words):
    """What bash offers for the last word."""
    script = f'''source {COMPLETION}
        COMP_WORDS=({' '.join(f"'{w}'" for w in words)})
        COMP_CWORD={len(words) - 1}
        COMP_WORDS[0]={TOOL}
        _pinbrokerctl
        printf '%s\\n' "${{COMPREPLY[@]}}"'''
    out = subprocess.run(['bash', '-c', script], check=True, env=tool.env, timeout=WAIT,
                         stdout=subprocess.PIPE, encoding='utf-8').stdout
    return set(out.split())


def test_completion(world, tool, o):
    equal(complete(tool, 'pinbrokerctl', ''), set(VERBS))
    equal(complete(tool, 'pinbrokerctl', '--json', 'short', 'pre'), {'preflight'})
    equal(complete(tool, 'pinbrokerctl', 'list', ''),
          {'pins', 'files', 'clients', 'contexts', 'revocations'})
    equal(complete(tool, 'pinbrokerctl', 'list', '--json', '=', 'p'), {'pretty'})
    equal(complete(tool, 'pinbrokerctl', 'revoke', ''), set(map(str, o.pins)))
    equal(complete(tool, 'pinbrokerctl', 'revoke', '--client', ''), {str(o.client)})
    equal(complete(tool, 'pinbrokerctl', 'list', '--file', ''), {str(o.file)})
    equal(complete(tool, 'pinbrokerctl', 'show', ''),
          {str(i) for i in (*o.pins, o.client, o.file, o.context)})
    equal(complete(tool, 'pinbrokerctl', 'map', world.file[:-1]), {world.file})
    equal(complete(tool, 'pinbrokerctl', 'hold', '--on-revoke', 'i'), {'ignore'})
    # every option of the help, and no other
    in_help = set(re.findall(r'--[a-z][a-z-]*', tool.run('--help')))
    offered = set.union(*(complete(tool, 'pinbrokerctl', verb, '--') for verb in VERBS))
    equal(offered - {'--wait'}, in_help)


def main():
    signal.alarm(550)
    with running(f'[Revocation]\nRevokeGraceSec={GRACE}\n') as world:
        tool, o = Tool(world), Objects(world)
        for test in (test_list, test_show, test_on_demand, test_status, test_map, test_completion):
            test(world, tool, o)
            print(f'ok {test.__name__}', flush=True)
        test_pager(tool, o)
        o.drop()
        for test in (test_revoked, test_same_truth, test_revoke, test_remaining, test_mount,
                     test_preflight, test_hold):
            test(world, tool)
            print(f'ok {test.__name__}', flush=True)
        test_usage(tool)
        test_no_broker(tool)
        print('ok test_usage', flush=True)


if __name__ == '__main__':
    main()
