#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.pinbroker1 as busctl shows it: the objects, their properties and signals, held to the documented
XML, to what the socket lists, and to /proc/locks."""

import json
import os
import re
import signal
import subprocess
from xml.etree import ElementTree

from client import Connection, PAGE, PROTOCOL, WAIT, World, equal, expect, is_readable

ROOT = '/org/pinbroker1'
NULL = 2 ** 64 - 1


class Bus:
    def __init__(self, world):
        self.command = ['busctl', '--address=unix:path=' + os.path.join(world.dir, 'bus'),
                        '--no-pager']

    def run(self, *args):
        # The sanitizers' libraries are the daemon's business.
        return subprocess.run(self.command + list(args), check=True, text=True, timeout=WAIT,
                              stdout=subprocess.PIPE).stdout

    def fails(self, *args):
        r = subprocess.run(self.command + list(args), text=True, timeout=WAIT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        expect(r.returncode != 0, args)
        return r.stderr

    def tree(self):
        return set(self.run('tree', '--list', 'org.pinbroker1').split())

    def properties(self, path, interface):
        out = self.run('--json=short', 'call', 'org.pinbroker1', path,
                       'org.freedesktop.DBus.Properties', 'GetAll', 's', interface)
        return {name: value['data'] for name, value in json.loads(out)['data'][0].items()}

    def managed(self):
        out = self.run('--json=short', 'call', 'org.pinbroker1', ROOT,
                       'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects')
        return json.loads(out)['data'][0]

    def interfaces(self, path):
        text = self.run('--xml-interface', 'introspect', 'org.pinbroker1', path)
        return interfaces_of(ElementTree.fromstring(text))


def shape(element):
    return element.tag, sorted(element.attrib.items()), [shape(child) for child in element]


def interfaces_of(root):
    return {i.get('name'): [shape(member) for member in i] for i in root.iter('interface')
            if i.get('name').startswith('org.pinbroker1.')}


class Holder:
    """Two pins of the world's file, through a context that holds nothing."""

    def __init__(self, world, bus_name=None):
        self.connection = Connection(world.path)
        self.client = self.connection.call('org.pinbroker.Hello', {
            'name': 'holder', 'busName': bus_name})['client']
        fd = os.open(world.file, os.O_PATH | os.O_CLOEXEC)
        self.file = self.connection.call(
            'org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'read'}, [fd])['file']
        for received in self.connection.fds:
            os.close(received)
        os.close(fd)
        fd = os.eventfd(0)
        self.context = self.connection.call('org.pinbroker.AddContext', {'fileDescriptor': 0},
                                            [fd])['context']
        os.close(fd)
        self.pins = self.connection.call('org.pinbroker.Pin', {
            'file': self.file, 'context': self.context, 'access': 'read', 'label': 'two',
            'ranges': [{'offset': 0, 'length': PAGE}, {'offset': 4 * PAGE, 'length': PAGE}],
        })['pins']

    def paths(self):
        file = f'{ROOT}/file/{self.file}'
        return {f'{ROOT}/client/{self.client}', file} | {f'{file}/pin/{pin}' for pin in self.pins}


def expect_same(properties, listed):
    """An object's properties are what the socket lists of it."""
    flat = {}
    for name, value in listed.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    for name, value in properties.items():
        there = flat.pop(name[0].lower() + name[1:], None)
        if there is None:
            expect(value in ('', NULL), name, value)
        else:
            equal((name, value), (name, there))
    equal(flat, {})


def leases_of(pid):
    """The inodes on which a process holds leases."""
    with open('/proc/locks', encoding='ascii') as f:
        return {int(inode) for inode in re.findall(
            rf'LEASE +\S+ +\S+ +{pid} +[0-9a-f]+:[0-9a-f]+:(\d+) ', f.read())}


def test_objects(world, bus):
    empty = {'/org', ROOT, ROOT + '/client', ROOT + '/file', ROOT + '/revocation'}
    equal(bus.tree() - {'/'}, empty)
    equal(leases_of(world.daemon.pid), set())
    holder = Holder(world)
    equal(bus.tree() - {'/'} - empty, holder.paths())
    equal(set(bus.managed()), {p for p in holder.paths() if '/pin/' not in p})
    equal(leases_of(world.daemon.pid), {os.stat(world.file).st_ino})

    file = f'{ROOT}/file/{holder.file}'
    listing = holder.connection.list
    expect_same(bus.properties(f'{ROOT}/client/{holder.client}', 'org.pinbroker1.Client'),
                listing('org.pinbroker.ListClients')[0])
    expect_same(bus.properties(file, 'org.pinbroker1.File'), listing('org.pinbroker.ListFiles')[0])
    for pin in listing('org.pinbroker.ListPins'):
        expect_same(bus.properties(f'{file}/pin/{pin["pin"]}', 'org.pinbroker1.Pin'), pin)
    equal(bus.run('get-property', 'org.pinbroker1', file, 'org.pinbroker1.File', 'Path').strip(),
          f's "{world.file}"')

    # What is not there: no such id, a pin that is another file's, what is no number.
    for path in (f'{ROOT}/client/999', f'{ROOT}/file/999', f'{ROOT}/file/0',
                 f'{ROOT}/file/999/pin/{holder.pins[0]}', f'{file}/pin/999', f'{file}/pin',
                 f'{file}/x', f'{ROOT}/client/{holder.client}x', f'{ROOT}/client/{2 ** 64}'):
        for interface in ('Client', 'File', 'Pin', 'Revocation'):
            expect('nknown' in bus.fails('call', 'org.pinbroker1', path,
                                         'org.freedesktop.DBus.Properties', 'GetAll', 's',
                                         f'org.pinbroker1.{interface}'), path)
    return holder


def test_revocation(world, bus, holder):
    out = bus.run('call', 'org.pinbroker1', ROOT, 'org.pinbroker1.Manager', 'RevokePins', 'atst',
                  '1', str(holder.pins[0]), 'a reason', str(60 * 10 ** 6))
    revocation = int(out.split()[1])
    path = f'{ROOT}/revocation/{revocation}'
    expect(path in bus.tree())
    p = bus.properties(path, 'org.pinbroker1.Revocation')
    expect_same(p, holder.connection.list('org.pinbroker.ListRevocations')[0])
    equal((p['State'], p['Reason'], p['Remaining'], p['EndUSec']), ('notified', 'a reason', 1, NULL))
    holder.connection.call('org.pinbroker.Unpin', {'pins': [holder.pins.pop(0)]})
    p = bus.properties(path, 'org.pinbroker1.Revocation')
    equal((p['State'], p['Proof'], p['Remaining']), ('released', 'claimed', 0))
    expect(p['EndUSec'] >= p['StartUSec'])
    expect(holder.paths() <= bus.tree())
    return path


def test_interfaces_are_documented(world, bus, holder, revocation):
    documented = interfaces_of(ElementTree.parse(os.path.join(PROTOCOL, 'org.pinbroker1.xml')).getroot())
    live = {}
    for path in {ROOT, revocation} | holder.paths():
        live.update(bus.interfaces(path))
    equal(set(live), set(documented))
    for interface, members in live.items():
        equal((interface, members), (interface, documented[interface]))


def await_signals(monitor, member, paths):
    while paths:
        message = json.loads(monitor.stdout.readline())
        if message.get('member') == member:
            paths = paths - {message['payload']['data'][0]}


def test_signals(world, bus):
    monitor = subprocess.Popen(['stdbuf', '-oL'] + bus.command + ['--json=short', 'monitor', 'org.pinbroker1'],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # Not every version says when it listens: then it shows what is sent.
    while not is_readable(monitor.stdout.fileno(), 0.1):
        bus.run('call', 'org.pinbroker1', ROOT, 'org.freedesktop.DBus.Peer', 'Ping')
    holder = Holder(world)
    paths = {path for path in holder.paths() if '/pin/' not in path}
    await_signals(monitor, 'InterfacesAdded', paths)
    holder.connection.call('org.pinbroker.Unpin', {'pins': holder.pins})
    holder.connection.close()
    await_signals(monitor, 'InterfacesRemoved', paths)
    monitor.terminate()
    monitor.wait()
    monitor.stdout.close()


def main():
    signal.alarm(300)
    with World() as world:
        world.start()
        bus = Bus(world)
        holder = test_objects(world, bus)
        revocation = test_revocation(world, bus, holder)
        test_interfaces_are_documented(world, bus, holder, revocation)
        holder.connection.call('org.pinbroker.Unpin', {'pins': holder.pins})
        holder.connection.close()
        test_signals(world, bus)
        world.stop()


if __name__ == '__main__':
    main()
