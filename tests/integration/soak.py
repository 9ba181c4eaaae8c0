#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""soak.py [SECONDS]: twenty uids do to the broker what they can, all at once, while an honest holder's round trips
and the truncates of another's file are timed. A bare socket's round trips stand beside them: what these take is
the machine's doing, not the broker's. 20 s, in which three times as much is allowed; with 600 for the bounds that
the project promises.
"""

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import struct
import sys
import time

from client import PAGE, SLOWNESS, Connection, Refused, World, expect, is_readable
from limits import linger, send_fds
from world import SIZE, Holder, fork_as, open_file

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 20
PATIENCE = SLOWNESS * (1 if SECONDS >= 300 else 3)
UIDS = 20
FIRST_UID, HONEST_UID = 20000, 30000
PACE = 0.002      # seconds between round trips
ROUND_TRIP_P99, ROUND_TRIP_P9999, TRUNCATE_P99 = 0.020, 0.200, 0.050
LIMITED_TO = {'MaxClientsPerUser': 64, 'MaxFilesPerUser': 64, 'MaxContextsPerUser': 64,
              'MaxPinsPerUser': 20000}
INFO = json.dumps({'method': 'org.varlink.service.GetInfo'}).encode() + b'\0'


# --- the attackers: each function is one round of it, with a connection that says Hello where it has one ---

def flood(path, file):
    """Calls without end, whose replies are read late."""
    with contextlib.closing(Connection(path)) as c:
        c.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                c.socket.send(INFO * 50)
        time.sleep(0.05)


def leave_unread(path, file):
    """Streams that nobody reads."""
    connections = []
    for _ in range(8):
        c = Connection(path)
        connections.append(c)
        for method in ('ListPins', 'ListFiles', 'ListClients', 'ListRevocations'):
            c.send('org.pinbroker.' + method, {}, more=True)
    time.sleep(0.3)
    for c in connections:
        c.close()


def say_little(path, file):
    """Connections that say nothing, and such that say one byte now and then."""
    connections = [Connection(path) for _ in range(32)]
    for byte in INFO[:20]:
        for c in connections[16:]:
            c.send_bytes(bytes([byte]))
        time.sleep(0.01)
    for c in connections:
        c.close()


def send_lingering(path, file):
    """As many descriptors as a message takes, whose close waits."""
    s, other = linger()
    with contextlib.closing(Connection(path)) as c:
        for n in (1, 16, 253):
            send_fds(c.socket, INFO[:-1] if n == 16 else INFO, [s] * n)
        c.socket.sendmsg([b'!'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack('i', s.fileno()))],
                         socket.MSG_OOB)
        s.close()
    other.close()


def keep_lingering(path, file):
    """Contexts whose last close waits."""
    with contextlib.closing(Connection(path)) as c:
        c.call('org.pinbroker.Hello', {'name': 'lingers'})
        pairs = [linger() for _ in range(4)]
        for s, _ in pairs:
            c.call('org.pinbroker.AddContext', {'fileDescriptor': 0}, [s.fileno()])
            s.close()
        time.sleep(0.2)
    for _, other in pairs:
        other.close()


def come_and_go(path, file):
    for _ in range(30):
        with contextlib.closing(Connection(path)) as c:
            c.call('org.pinbroker.Hello', {'name': 'guest'})


def pin(path, file, n):
    c = Connection(path)
    hello = c.call('org.pinbroker.Hello', {'name': 'pins'})
    opened = open_file(c, file)
    event = os.eventfd(0, os.EFD_CLOEXEC)
    context = c.call('org.pinbroker.AddContext', {'fileDescriptor': 0}, [event])['context']
    os.close(event)
    ranges = [{'offset': i % (SIZE // PAGE) * PAGE, 'length': PAGE} for i in range(1024)]
    pins = []
    for _ in range(n):
        pins += c.call('org.pinbroker.Pin', {'file': opened['file'], 'context': context, 'access': 'write',
                                             'ranges': ranges})['pins']
    return c, hello, c.fds, pins


def pin_much(path, file):
    """Thousands of pins in the way of a truncate of one's own."""
    c, _, _, pins = pin(path, file, 8)
    fd = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) if os.path.exists(file) else -1
    if fd >= 0:
        os.close(fd)
    for i in range(0, len(pins), 1000):
        with contextlib.suppress(Refused):
            c.call('org.pinbroker.Unpin', {'pins': pins[i:i + 1000]})
    c.close()


def in_process(function):
    """In a process of its own, whatever becomes of that."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            function()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def die_with_pins(path, file):
    """In the middle of it."""
    in_process(lambda: pin(path, file, 2))


def tamper_here(path, file):
    with contextlib.closing(Connection(path)) as c:
        c.call('org.pinbroker.Hello', {'name': 'tampers'})
        open_file(c, file)
        fd = c.fds[0]
        for sig in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGRTMIN, 0):
            fcntl.fcntl(fd, 10, int(sig))  # F_SETSIG
            with contextlib.suppress(OSError):
                os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid() if random.random() < 0.5 else 0)


def tamper(path, file):
    """With the leased description, which whoever may write shares; the signals may hit the one that does it."""
    in_process(lambda: tamper_here(path, file))


def talk_nonsense(path, file):
    for text in (b'\0', b'{}\0', b'{"method":7}\0', b'[' * 10000 + b'\0', os.urandom(5000)):
        with contextlib.closing(Connection(path)) as c:
            c.send_bytes(text)


ATTACKS = [flood, leave_unread, say_little, send_lingering, keep_lingering, come_and_go, pin_much, die_with_pins,
           tamper, talk_nonsense]


def attack(attacks, path, file, end):
    """Rounds done, and refused or ended by the broker."""
    done = ended = 0
    while time.monotonic() < end:
        try:
            random.choice(attacks)(path, file)
            done += 1
        except (Refused, OSError, AssertionError):
            ended += 1
            time.sleep(0.005)
        except ValueError:  # a reply that was cut off
            ended += 1
    return done, ended


# --- whoever is measured ---

def time_each(exchange, end):
    times = []
    while time.monotonic() < end:
        begin = time.monotonic()
        exchange()
        times.append(time.monotonic() - begin)
        time.sleep(PACE)
    return times


def ask(path, end):
    """Round trips of a client that holds pins."""
    file = os.path.join(os.path.dirname(path), 'honest')
    c, _, _, pins = pin(path, file, 1)
    message = json.dumps({'method': 'org.pinbroker.Bind', 'parameters': {'pin': pins[0], 'handle': 0}}).encode()

    def exchange():
        c.socket.sendall(message + b'\0')
        expect(c.socket.recv(4096) == b'{"parameters":{}}\0')

    return time_each(exchange, end)


def echo_back(s):
    while data := s.recv(4096):
        s.sendall(data)


def ping(end):
    """The same between two sockets with nothing in between."""
    a, b = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        a.close()
        with contextlib.suppress(OSError):
            echo_back(b)
        os._exit(0)
    b.close()

    def exchange():
        a.sendall(b'x' * 100)
        a.recv(4096)

    times = time_each(exchange, end)
    a.close()
    os.waitpid(pid, 0)
    return times


def truncate_each(path, end):
    """How long truncates of a file take whose holder lets go as soon as it is told, and pins again."""
    file = os.path.join(os.path.dirname(path), 'truncated')
    ready, go = os.pipe()
    results, result = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        while os.read(ready, 1):
            begin = time.monotonic()
            os.truncate(file, PAGE)
            os.write(result, struct.pack('d', time.monotonic() - begin))
        os._exit(0)
    holder, times = Holder(path, file), []
    while time.monotonic() < end:
        os.write(go, b'!')
        told = holder.notice()['revocation']
        holder.release()
        times.append(struct.unpack('d', os.read(results, 8))[0])
        os.ftruncate(holder.fd, SIZE)
        repin(holder, told)
    os.close(go)
    os.waitpid(pid, 0)
    return times


def repin(holder, told):
    """As soon as the lease is there again, and what was told last has been told to the end."""
    while True:
        try:
            holder.pins = holder.pin()
            break
        except Refused:
            time.sleep(PACE)
    while is_readable(holder.watch.socket, 0) and holder.notice()['revocation'] == told:
        pass


# --- the whole ---

def percentile(times, part):
    return sorted(times)[min(int(len(times) * part), len(times) - 1)]


def show(what, times):
    figures = ', '.join(f'{name} {percentile(times, part) * 1000:.2f}'
                        for name, part in (('p50', 0.5), ('p99', 0.99), ('p99.99', 0.9999), ('max', 1)))
    print(f'{what}: {len(times)} times, ms: {figures}', flush=True)


def make_files(directory):
    for name, uid in [('honest', HONEST_UID), ('truncated', HONEST_UID),
                      *((f'attacker{i}', FIRST_UID + i) for i in range(UIDS))]:
        file = os.path.join(directory, name)
        with open(file, 'wb') as f:
            f.truncate(SIZE)
        os.chown(file, uid, uid)
    os.chmod(directory, 0o755)


def watch_limits(world, end):
    """The most descriptors, and KiB, that the daemon was seen with."""
    fds = rss = 0
    while time.monotonic() < end:
        fds, rss = max(fds, world.fds()), max(rss, world.rss_kib())
        time.sleep(0.2)
    return fds, rss


def soak(world):
    make_files(world.dir)
    end = time.monotonic() + SECONDS
    quiet = world.fds()
    honest = [fork_as(HONEST_UID, lambda f=f: f()) for f in (
        lambda: ask(world.path, end), lambda: ping(end), lambda: truncate_each(world.path, end))]
    attackers = [fork_as(FIRST_UID + i, lambda i=i: attack(
        ATTACKS[i % len(ATTACKS):] + ATTACKS[:i % len(ATTACKS)][:2], world.path,
        os.path.join(world.dir, f'attacker{i}'), end)) for i in range(UIDS)]
    fds, rss = watch_limits(world, end)
    asked, pinged, truncated = (finish(*process) for process in honest)
    rounds = [finish(*process) for process in attackers]
    expect(world.daemon.poll() is None, 'the daemon has ended')
    show('a bare socket pair', pinged)
    show('a round trip', asked)
    show('a truncate', truncated)
    print(f'{sum(done for done, _ in rounds)} rounds of attacks, {sum(ended for _, ended in rounds)} refused or cut '
          f'short; at most {fds} descriptors ({quiet} at first), {rss} KiB; {len(world.log)} lines of log')
    expect(all(done + ended > 0 for done, ended in rounds), rounds)
    for what, times, part, bound in (('round trip', asked, 0.99, ROUND_TRIP_P99),
                                     ('round trip', asked, 0.9999, ROUND_TRIP_P9999),
                                     ('truncate', truncated, 0.99, TRUNCATE_P99)):
        took = percentile(times, part)
        expect(took <= bound * PATIENCE,
               f'{part:.2%} of {what}s: {took * 1000:.1f} ms, {bound * PATIENCE * 1000:.0f} at most')
    expect(len(asked) > 100 and len(truncated) > 10, len(asked), len(truncated))


def finish(pid, result):
    with result:
        answer = json.loads(result.read())
    os.waitpid(pid, 0)
    expect('failure' not in answer, answer.get('failure'))
    return answer['result']


def main():
    with World() as world:
        world.start('[Limits]\n' + ''.join(f'{key}={value}\n' for key, value in LIMITED_TO.items()),
                    wrapper=['nice', '-n', '-10'])  # as the unit has it
        soak(world)
        world.stop()


if __name__ == '__main__':
    main()
