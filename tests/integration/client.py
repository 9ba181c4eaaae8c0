#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the broker written from the interface description alone, with nothing but Python's
standard library: the whole life of a pin, and wrong calls of every kind.

Starts a bus and the daemon ($PINBROKERD) itself. Every reply is held to the types in the description.
"""

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

SLOWNESS = int(os.environ.get('PINBROKER_SLOW', '1'))  # times as late as usual something may be
WAIT = 20 if SLOWNESS < 10 else 60  # seconds, for any event
PAGE = mmap.PAGESIZE
PAGES = 4096
SIZE = PAGES * PAGE
PROTOCOL = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'protocol')

# The counters of pins and the lease-break-time are the machine's: one test at a time, also of several
# runs. world.c takes the same. What a test leaves behind does not keep it.
machine_lock = open('/dev/shm/pinbroker-tests.lock', 'ab', buffering=0,
                    opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600))
fcntl.flock(machine_lock, fcntl.LOCK_EX)
os.register_at_fork(after_in_child=machine_lock.close)

LEASE_BREAK_TIME = '/proc/sys/fs/lease-break-time'
original_lease_break_time = None


def write_lease_break_time(seconds):
    with open(LEASE_BREAK_TIME, 'w', encoding='ascii') as f:
        f.write(str(seconds))


def await_end_of_test(lock, test):
    """In a process that has nothing of the test's, and is in no group that is killed with it."""
    os.setsid()
    os.dup2(lock, 0)
    os.dup2(test, 1)
    os.closerange(2, os.sysconf('SC_OPEN_MAX'))
    select.select([1], [], [])
    write_lease_break_time(original_lease_break_time)


def set_lease_break_time(seconds):
    """As before again when the test ends, whatever ends it: the machine's lock is kept until then."""
    global original_lease_break_time  # pylint: disable=global-statement
    if original_lease_break_time is None:
        with open(LEASE_BREAK_TIME, encoding='ascii') as f:
            original_lease_break_time = int(f.read())
        lock, test = os.dup(machine_lock.fileno()), os.pidfd_open(os.getpid())
        ready, end = os.pipe()
        if os.fork() == 0:
            try:
                await_end_of_test(lock, test)
            finally:
                os._exit(0)
        for fd in (lock, test, end):
            os.close(fd)
        os.read(ready, 1)
        os.close(ready)
    write_lease_break_time(seconds)

SERVICE, PINBROKER = 'org.varlink.service', 'org.pinbroker'


def expect(condition, *what):
    if not condition:
        raise AssertionError(*what)


def equal(a, b):
    expect(a == b, f'{a!r} is not {b!r}')


# --- the interface description ---

class Description:
    """The types, methods and errors of one Varlink interface."""

    def __init__(self, name):
        with open(os.path.join(PROTOCOL, name + '.varlink'), encoding='utf-8') as f:
            self.text = f.read()
        self.types, self.methods, self.errors = {}, {}, {}
        self.tokens = re.findall(r'->|\[\]|[A-Za-z][\w.]*|[?(),:]',
                                 re.sub(r'#.*', '', self.text))
        equal(self.take(), 'interface')
        equal(self.take(), name)
        while self.tokens:
            kind, member = self.take(), self.take()
            if kind == 'type':
                self.types[member] = self.fields()
            elif kind == 'error':
                self.errors[member] = self.fields()
            else:
                equal(kind, 'method')
                parameters = self.fields()
                equal(self.take(), '->')
                self.methods[member] = parameters, self.fields()

    def take(self):
        return self.tokens.pop(0)

    def fields(self):
        """A dictionary of types, or for an enumeration the list of its words."""
        fields, words = {}, []
        equal(self.take(), '(')
        while self.tokens[0] != ')':
            if self.tokens[0] == ',':
                self.take()
                continue
            name = self.take()
            if self.tokens[0] == ':':
                self.take()
                fields[name] = self.type()
            else:
                words.append(name)
        self.take()
        return words or fields

    def type(self):
        token = self.take()
        if token in ('?', '[]'):
            return token, self.type()
        return token

    def check(self, value, t):
        """Whether a value is of a type."""
        if isinstance(t, tuple):
            if t[0] == '?':
                return value is None or self.check(value, t[1])
            return isinstance(value, list) and all(self.check(v, t[1]) for v in value)
        if isinstance(t, list):
            return value in t
        if isinstance(t, dict):
            return (isinstance(value, dict) and set(value) <= set(t) and
                    all(self.check(value.get(name), t[name]) for name in t))
        if t == 'int':
            return type(value) is int
        if t in ('bool', 'string'):
            return isinstance(value, {'bool': bool, 'string': str}[t])
        return self.check(value, self.types[t])


DESCRIPTIONS = {name: Description(name) for name in (SERVICE, PINBROKER)}


# --- a connection ---

class Refused(Exception):
    def __init__(self, error, parameters):
        super().__init__(error, parameters)
        self.error, self.parameters = error, parameters


class Connection:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT)
        self.socket.connect(path)
        self.input = b''
        self.fds = []

    def close(self):
        self.socket.close()

    def send_bytes(self, data, fds=()):
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
        n = self.socket.sendmsg([data], control)
        if n < len(data):  # the answer may be the peer's last, and nothing can be sent any more
            self.socket.sendall(data[n:])

    def send(self, method, parameters=None, fds=(), more=False):
        message = {'method': method}
        if parameters is not None:
            message['parameters'] = parameters
        if more:
            message['more'] = True
        self.send_bytes(json.dumps(message).encode() + b'\0', fds)

    def receive(self):
        """The next message, None at the end of the stream. Its descriptors are in self.fds."""
        self.fds = []
        while b'\0' not in self.input:
            room = socket.CMSG_SPACE(struct.calcsize('i'))
            data, control, flags, _ = self.socket.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
            expect(not flags & socket.MSG_CTRUNC, 'more descriptors than any reply has')
            for level, kind, numbers in control:
                equal((level, kind), (socket.SOL_SOCKET, socket.SCM_RIGHTS))
                self.fds += array.array('i', numbers)
            if not data:
                equal(self.input, b'')
                return None
            self.input += data
        text, self.input = self.input.split(b'\0', 1)
        return json.loads(text)

    def reply(self, method):
        """The parameters of the next reply, and whether more follow."""
        interface, member = method.rsplit('.', 1)
        message = self.receive()
        expect(message is not None, f'{method}: the connection ended')
        expect(set(message) <= {'parameters', 'error', 'continues'}, message)
        parameters = message.get('parameters', {})
        if 'error' in message:
            where, error = message['error'].rsplit('.', 1)
            description = DESCRIPTIONS[where]
            expect(description.check(parameters, description.errors[error]), message)
            raise Refused(message['error'], parameters)
        description = DESCRIPTIONS[interface]
        expect(description.check(parameters, description.methods[member][1]), method, message)
        return parameters, message.get('continues', False)

    def call(self, method, parameters=None, fds=()):
        self.send(method, parameters, fds)
        result, continues = self.reply(method)
        expect(not continues)
        return result

    def list(self, method, parameters=None):
        items, continues = [], True
        self.send(method, parameters, more=True)
        while continues:
            result, continues = self.reply(method)
            items += [item for item in result.values() if item is not None]
        return items

    def refused(self, error, parameters, method, *args, **kwargs):
        """A call that is answered with this error, with these among its parameters."""
        try:
            self.send(method, *args, **kwargs)
            result = self.reply(method)
        except Refused as e:
            equal(e.error, error)
            equal({key: e.parameters.get(key) for key in parameters}, parameters)
        else:
            raise AssertionError(f'{method} was not refused: {result}')


# --- an io_uring, by its system calls ---

class Ring:
    SETUP, REGISTER = 425, 427
    REGISTER_BUFFERS, UNREGISTER_BUFFERS = 0, 1
    libc = ctypes.CDLL(None, use_errno=True)

    def syscall(self, *args):
        r = self.libc.syscall(*args)
        if r < 0:
            e = ctypes.get_errno()
            raise OSError(e, os.strerror(e))
        return r

    def __init__(self):
        parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
        self.fd = self.syscall(ctypes.c_long(self.SETUP), ctypes.c_uint(8), parameters)

    def register(self, address, length):
        iovec = ctypes.create_string_buffer(struct.pack('PN', address, length))
        self.syscall(ctypes.c_long(self.REGISTER), ctypes.c_int(self.fd),
                     ctypes.c_uint(self.REGISTER_BUFFERS), iovec, ctypes.c_uint(1))

    def unregister(self):
        self.syscall(ctypes.c_long(self.REGISTER), ctypes.c_int(self.fd),
                     ctypes.c_uint(self.UNREGISTER_BUFFERS), None, ctypes.c_uint(0))


def pinned_pages():
    """The long-term pins of the whole machine."""
    try:
        with open('/proc/sys/vm/stat_refresh', 'rb') as f:
            f.read()  # folds the counters of all CPUs
    except OSError as e:
        expect(e.errno == errno.EINVAL, e)  # a counter was below zero for the moment
    with open('/proc/vmstat', encoding='ascii') as f:
        values = dict(line.split() for line in f)
    return int(values['nr_foll_pin_acquired']) - int(values['nr_foll_pin_released'])


def expect_pinned(value, base, pages):
    expect(abs(value - base - pages) <= 8, f'{value - base} pages are pinned, not {pages}')


# --- the daemon and its bus ---

class World:
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.path = os.path.join(self.dir, 'socket')
        self.file = os.path.join(self.dir, 'data')
        self.bus = self.daemon = self.reader = self.address = None
        self.log, self.logged = [], threading.Condition()

    def start(self, settings='', policy=None, wrapper=(), env=None):
        """policy: the bus's whole configuration, with a place for its address."""
        config = os.path.join(self.dir, 'conf')
        with open(config, 'w', encoding='utf-8') as f:
            f.write(settings)
        with open(self.file, 'wb') as f:
            f.write(b'a' * SIZE)
        address = self.address = 'unix:path=' + os.path.join(self.dir, 'bus')
        bus = ['dbus-daemon', '--nofork', '--nopidfile', '--print-address=1']
        if policy:
            bus_config = os.path.join(self.dir, 'bus.conf')
            with open(bus_config, 'w', encoding='utf-8') as f:
                f.write(policy.format(address))
            bus += ['--config-file', bus_config]
        else:
            bus += ['--session', '--address', address]
        self.bus = subprocess.Popen(bus, stdout=subprocess.PIPE)
        expect(self.bus.stdout.readline(), 'the bus does not start')
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.settimeout(WAIT)
        ready.bind(os.path.join(self.dir, 'ready'))
        self.daemon = subprocess.Popen(
            [*wrapper, os.environ['PINBROKERD'], '--socket', self.path, '--bus', address,
             '--config', config],
            stderr=subprocess.PIPE, encoding='utf-8', errors='replace',
            env=dict(os.environ, **env or {}, NOTIFY_SOCKET=os.path.join(self.dir, 'ready')))
        self.reader = threading.Thread(target=self.read_log)
        self.reader.start()
        while b'READY=1' not in ready.recv(4096).split(b'\n'):
            pass
        ready.close()
        self.wait_for_log(lambda: any('On the bus as' in line for line in self.log))

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        equal(self.daemon.wait(WAIT), 0)

    def read_log(self):
        for line in self.daemon.stderr:
            with self.logged:
                self.log.append(line)
                self.logged.notify_all()

    def wait_for_log(self, condition):
        with self.logged:
            expect(self.logged.wait_for(condition, WAIT), 'it was not logged')

    def fds(self):
        return len(os.listdir(f'/proc/{self.daemon.pid}/fd'))

    def rss_kib(self):
        with open(f'/proc/{self.daemon.pid}/status', encoding='ascii') as f:
            return int(re.search(r'^VmRSS:\s*(\d+) kB', f.read(), re.M).group(1))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        for process in (self.daemon, self.bus):
            if process and process.poll() is None:
                process.kill()
                process.wait()
        if self.reader:
            self.reader.join()
            self.daemon.stderr.close()
        if self.bus:
            self.bus.stdout.close()
        if kind:
            sys.stderr.writelines(self.log[-40:])
        shutil.rmtree(self.dir)


def truncate_and_tell(path, size, fd):
    code, begin = 0, time.monotonic()
    try:
        os.truncate(path, size)
    except OSError as e:
        code = e.errno
    took = time.monotonic() - begin
    os.write(fd, struct.pack('idq', code, took, pinned_pages()))


def truncate_in_child(path, size):
    """A process that truncates: its pid, and where its errno, time and the pins then come from."""
    result, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # what it has inherited would count as its own: a context, too
            os.closerange(3, end)
            os.closerange(end + 1, 65536)
            truncate_and_tell(path, size, end)
        finally:
            os._exit(0)  # whatever happens, the tests are the parent's
    os.close(end)
    return pid, result


def is_readable(fd, seconds):
    return bool(select.select([fd], [], [], seconds)[0])


# --- the tests ---

def test_cycle(world):
    base = pinned_pages()
    connection, watch = Connection(world.path), Connection(world.path)
    hello = connection.call('org.pinbroker.Hello', {'name': 'from the description'})
    client = {'client': hello['client'], 'token': hello['token']}
    expect(hello['client'] > 0 and hello['token'])

    fd = os.open(world.file, os.O_PATH | os.O_CLOEXEC)
    opened = connection.call('org.pinbroker.OpenFile', {'fileDescriptor': 0, 'access': 'write'},
                             [fd])
    os.close(fd)
    equal(opened['fileDescriptor'], 0)
    equal(len(connection.fds), 1)
    fd = connection.fds[0]
    info, stat = opened['info'], os.stat(world.file)
    equal((os.fstat(fd).st_dev, os.fstat(fd).st_ino), (stat.st_dev, stat.st_ino))
    equal((info['path'], info['size'], info['access']), (world.file, SIZE, 'write'))
    equal((info['device'], info['inode']), (stat.st_dev, stat.st_ino))
    equal((info['fileSystem'], info['clients'], info['pins']), ('tmpfs', 1, 0))

    ring = Ring()
    context = connection.call('org.pinbroker.AddContext',
                              {'remoteDescriptor': ring.fd, 'label': 'ring'})
    equal((context['kind'], context['forcible'], context['proof']), ('io_uring', True, 'claimed'))
    memory = mmap.mmap(fd, SIZE)
    view = ctypes.c_char.from_buffer(memory)

    pins = connection.call('org.pinbroker.Pin', {
        'file': opened['file'], 'context': context['context'], 'access': 'write',
        'ranges': [{'offset': 0, 'length': SIZE}]})['pins']
    equal(len(pins), 1)
    ring.register(ctypes.addressof(view), SIZE)
    expect_pinned(pinned_pages(), base, PAGES)
    connection.call('org.pinbroker.Bind', {'pin': pins[0], 'handle': 0})
    listed = connection.list('org.pinbroker.ListPins')
    equal([pin['pin'] for pin in listed], pins)
    equal((listed[0]['state'], listed[0]['handle']), ('bound', 0))
    equal((listed[0]['offset'], listed[0]['length']), (0, SIZE))
    expect(listed[0].get('revocation') is None)

    watch.send('org.pinbroker.Watch', client, more=True)
    pid, result = truncate_in_child(world.file, PAGE)
    notice, continues = watch.reply('org.pinbroker.Watch')
    notice = notice['notice']
    expect(continues)
    equal((notice['client'], notice['file'], notice['pins']),
          (client['client'], opened['file'], pins))
    equal((notice['path'], notice['conflict']['cause']), (world.file, 'modify'))
    expect(notice['deadlineUSec'] > time.monotonic() * 1e6)
    update = watch.reply('org.pinbroker.Watch')[0]['notice']
    equal(update['revocation'], notice['revocation'])
    equal([update['conflict'].get(key) for key in ('cause', 'offset', 'length', 'size', 'pid', 'uid')],
          ['truncate', PAGE, 0, PAGE, pid, os.getuid()])

    # it waits for us alone, and the pins are where they were
    expect(not is_readable(result, 0), 'the truncate did not wait')
    expect_pinned(pinned_pages(), base, PAGES)
    equal(os.stat(world.file).st_size, SIZE)
    deadline = connection.call('org.pinbroker.Extend', {'revocation': notice['revocation'],
                                                        'byUSec': 1000})['deadlineUSec']
    equal(deadline, notice['deadlineUSec'] + 1000)
    equal([r['state'] for r in connection.list('org.pinbroker.ListRevocations')], ['notified'])

    # proof "claimed": deregistration first
    ring.unregister()
    equal(connection.call('org.pinbroker.Unpin', {'pins': pins})['ended'], [])
    expect(is_readable(result, WAIT), 'the truncate does not return')
    code, took, pinned = struct.unpack('idq', os.read(result, 64))
    os.close(result)
    equal(os.waitpid(pid, 0)[1], 0)
    equal(code, 0)
    expect_pinned(pinned, base, 0)
    equal(os.stat(world.file).st_size, PAGE)
    equal(connection.list('org.pinbroker.ListPins'), [])
    equal([(r['revocation'], r['state'], r['remaining'], r['proof'])
           for r in connection.list('org.pinbroker.ListRevocations')],
          [(notice['revocation'], 'released', 0, 'claimed')])

    connection.call('org.pinbroker.RemoveContext', {'context': context['context']})
    connection.call('org.pinbroker.CloseFile', {'file': opened['file']})
    equal(connection.list('org.pinbroker.ListContexts'), [])
    equal([c['pid'] for c in connection.list('org.pinbroker.ListClients')], [os.getpid()])
    del view
    memory.close()
    os.close(fd)
    os.close(ring.fd)
    connection.close()
    watch.close()
    print(f'the truncate waited {took * 1000:.1f} ms')


def test_introspection(world):
    connection = Connection(world.path)
    info = connection.call('org.varlink.service.GetInfo')
    equal(info['product'], 'pinbrokerd')
    expect(all(info[key] for key in ('vendor', 'version', 'url')))
    equal(sorted(info['interfaces']), sorted(DESCRIPTIONS))
    for name, description in DESCRIPTIONS.items():
        text = connection.call('org.varlink.service.GetInterfaceDescription',
                               {'interface': name})['description']
        equal(text, description.text)
    connection.refused('org.varlink.service.InterfaceNotFound', {'interface': 'org.nowhere'},
                       'org.varlink.service.GetInterfaceDescription', {'interface': 'org.nowhere'})
    connection.refused('org.varlink.service.InvalidParameter', {'parameter': 'interface'},
                       'org.varlink.service.GetInterfaceDescription', {})
    connection.close()


class Unknown:
    """Methods that no description has."""
    @staticmethod
    def method(connection, name, error, parameters):
        connection.send(name)
        message = connection.receive()
        equal((message['error'], message['parameters']), (error, parameters))


def test_wrong_calls(world):
    connection = Connection(world.path)

    def invalid(parameter, method, parameters, fds=(), more=False):
        connection.refused('org.varlink.service.InvalidParameter', {'parameter': parameter},
                           'org.pinbroker.' + method, parameters, fds=fds, more=more)

    # nothing but introspection and lists before Hello
    connection.refused('org.pinbroker.NotAllowed', {'cause': 'hello'}, 'org.pinbroker.Unpin',
                       {'pins': []})
    connection.call('org.pinbroker.Hello')
    for name, error, parameters in (
            ('org.pinbroker.Nothing', 'MethodNotFound', {'method': 'Nothing'}),
            ('org.pinbroker.hello', 'MethodNotFound', {'method': 'hello'}),
            ('org.varlink.service.Nothing', 'MethodNotFound', {'method': 'Nothing'}),
            ('org.nowhere.Hello', 'InterfaceNotFound', {'interface': 'org.nowhere'}),
            ('org.pinbroker.Hello.Hello', 'InterfaceNotFound', {'interface': 'org.pinbroker.Hello'}),
            ('Hello', 'InterfaceNotFound', {'interface': 'Hello'}),
            ('', 'InterfaceNotFound', {'interface': ''})):
        Unknown.method(connection, name, SERVICE + '.' + error, parameters)

    invalid('name', 'Hello', {'name': 1})
    invalid('name', 'Hello', {'name': 'x' * 10000})
    invalid('busName', 'Hello', {'busName': 'org.pinbroker1'})
    invalid('elsewhere', 'Hello', {'elsewhere': 1})
    invalid('fileDescriptor', 'OpenFile', {'access': 'read'})
    invalid('fileDescriptor', 'OpenFile', {'fileDescriptor': None, 'access': 'read'})
    invalid('fileDescriptor', 'OpenFile', {'fileDescriptor': '0', 'access': 'read'})
    for index in (0, 1, -1, 2 ** 31, 2 ** 63 - 1):
        invalid('fileDescriptor', 'OpenFile', {'fileDescriptor': index, 'access': 'read'})
    fd = os.open(world.file, os.O_PATH | os.O_CLOEXEC)
    invalid('access', 'OpenFile', {'fileDescriptor': 0, 'access': 'sideways'}, [fd])
    invalid('fileDescriptor', 'OpenFile', {'fileDescriptor': 1, 'access': 'read'}, [fd])
    invalid('fileDescriptor', 'AddContext', {})
    invalid('fileDescriptor', 'AddContext', {'fileDescriptor': 0, 'remoteDescriptor': 0}, [fd])
    invalid('remoteDescriptor', 'AddContext', {'remoteDescriptor': -1})
    invalid('remoteDescriptor', 'AddContext', {'remoteDescriptor': 1000000})
    invalid('pins', 'Unpin', {'pins': 1})
    invalid('pins', 'Unpin', {'pins': ['1']})
    invalid('byUSec', 'Extend', {'revocation': 1, 'byUSec': -1})
    invalid('handle', 'Bind', {'pin': 1, 'handle': 1.5})
    invalid('client', 'ListPins', {'client': True}, more=True)
    os.close(fd)
    for name in ('ListPins', 'ListFiles', 'ListClients', 'ListContexts', 'ListRevocations'):
        connection.refused('org.varlink.service.ExpectedMore', {}, 'org.pinbroker.' + name, {})
        connection.list('org.pinbroker.' + name)
    connection.refused('org.varlink.service.ExpectedMore', {}, 'org.pinbroker.Watch',
                       {'client': 1, 'token': 'x'})
    for method, kind, parameters in (
            ('CloseFile', 'file', {'file': 4711}),
            ('RemoveContext', 'context', {'context': 4711}),
            ('Bind', 'pin', {'pin': 4711, 'handle': 0}),
            ('Extend', 'revocation', {'revocation': 4711, 'byUSec': 1})):
        connection.refused('org.pinbroker.NoSuchObject', {'type': kind, 'id': 4711},
                           'org.pinbroker.' + method, parameters)
    connection.refused('org.pinbroker.NoSuchObject', {'type': 'client'}, 'org.pinbroker.Resume',
                       {'client': 1, 'token': '0' * 32})
    connection.close()


def test_pipelined_calls(world):
    """All that were sent at once are answered, in their order."""
    connection = Connection(world.path)
    connection.call('org.pinbroker.Hello')
    calls = [('Extend', {'revocation': 5000 + i, 'byUSec': 1}) for i in range(1000)]
    connection.send_bytes(b''.join(
        json.dumps({'method': 'org.pinbroker.' + method, 'parameters': parameters}).encode() + b'\0'
        for method, parameters in calls))
    equal([connection.receive()['parameters']['id'] for _ in calls],
          [parameters['revocation'] for _, parameters in calls])
    connection.close()


def test_bad_input(world):
    """What is no message ends the connection that it came on, with one line in the log."""
    other = Connection(world.path)
    other.call('org.pinbroker.Hello', {'name': 'other'})
    call = b'{"method":"org.varlink.service.GetInfo"}\0'
    null = os.open('/dev/null', os.O_RDONLY | os.O_CLOEXEC)
    for data, fds in (
            (b'nonsense\0', ()),
            (b'\0', ()),
            (b'{"method":\0', ()),
            (b'[]\0', ()),
            (b'1\0', ()),
            (b'null\0', ()),
            (b'{}\0', ()),
            (b'{"method":1}\0', ()),
            (b'{"method":"org.pinbroker.Hello","parameters":[]}\0', ()),
            (b'{"method":"\xff\xfe"}\0', ()),
            (call[:-1] + b'{}\0', ()),
            (b'{"method":"x","parameters":' + b'{"a":' * 5000 + b'1' + b'}' * 5001 + b'\0', ()),
            (b'{"method":"x","parameters":{"a":[' + b'[],' * 500000 + b'[]]}}\0', ()),
            (b'x' * (32 << 20), ()),  # never ends
            (call, [null] * 200),
            (b'{"method":\0', [null])):
        n_lines = len(world.log)
        bad = Connection(world.path)
        try:
            bad.send_bytes(data, fds)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was not waited for
        try:
            message = bad.receive()
        except ConnectionResetError:
            message = None
        expect(message is None, f'{data[:40]!r} was answered: {message!r}')
        bad.close()
        other.call('org.pinbroker.Unpin', {'pins': []})
        world.wait_for_log(lambda n=n_lines: len(world.log) > n)
        new = world.log[n_lines:]
        expect(len(new) == 1 and f'Process {os.getpid()} ' in new[0], data[:40], new)
    os.close(null)

    # half a message, and then the end: nothing to complain of but the end
    for data in (b'', b'{"method":"org.pinb'):
        half = Connection(world.path)
        half.send_bytes(data or call)
        half.socket.shutdown(socket.SHUT_WR)
        while half.receive():
            pass
        half.close()
    equal([c['name'] for c in other.list('org.pinbroker.ListClients')], ['other'])
    other.close()
    equal(world.daemon.poll(), None)


def main():
    """All tests, or those that the arguments name."""
    signal.alarm(300)
    with World() as world:
        world.start()
        for test in (test_cycle, test_introspection, test_wrong_calls, test_pipelined_calls, test_bad_input):
            if sys.argv[1:] and test.__name__ not in sys.argv[1:]:
                continue
            test(world)
            print(f'ok {test.__name__}', flush=True)
        world.stop()


if __name__ == '__main__':
    main()
