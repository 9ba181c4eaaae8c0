#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers whom polkit decides about, with a stand-in for polkit that answers when the test says so: late,
never, or not at all. The daemon waits for none of it (I6), and keeps a bounded number of calls."""

import os
import signal
import subprocess

from client import World, equal, expect
from objects import ROOT
from rules import Holder, ranges
from sdbus import Bus, Failed

NOBODY, DAEMON = 65534, 1  # the bus wants users that it can look up
MANAGER = 'org.pinbroker1.Manager'
ERROR = 'org.freedesktop.DBus.Error.'
POLICY = '''<busconfig><listen>{}</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
</policy></busconfig>'''
GET = (ROOT, 'org.freedesktop.DBus.Properties', 'Get', 'ss', MANAGER, 'Version')
YES, NO, CHALLENGE = (1, 0), (0, 0), (0, 1)
UNFINISHED = 8
MINUTE = 60 * 10 ** 6


class Polkit(Bus):
    """Is asked, and answers when told to."""

    def __init__(self, world):
        super().__init__(world.address)
        self.request_name('org.freedesktop.PolicyKit1')

    def asked(self):
        m = self.wait(lambda m: m.member == 'CheckAuthorization')
        equal((m.path, m.interface), ('/org/freedesktop/PolicyKit1/Authority',
                                      'org.freedesktop.PolicyKit1.Authority'))
        (kind, subject), m.action, m.details, m.flags, _ = m.body
        equal(kind, 'system-bus-name')
        m.subject = subject['name']
        return m

    def decide(self, asked, outcome):
        self.reply(asked, '(bba{ss})', *outcome, 0)


def refused(bus, cookie, name, text=''):
    try:
        answer = bus.answer(cookie)
    except Failed as e:
        equal(e.name, ERROR + name)
        expect(text in e.text, e.text)
        return e.text
    raise AssertionError(f'it was not refused: {answer}')


def expect_served(world):
    """Root is not asked about, and does not wait for others."""
    root = Bus(world.address)
    expect(root.call(*GET)[0])
    root.close()


def test_actions(world, polkit, stranger):
    """What polkit sees, and that everything is asked about."""
    for path, interface, member, *args in (
            (ROOT, MANAGER, 'ListPins', 'a{sv}tu', 0, 0, 0),
            GET,
            (ROOT, 'org.freedesktop.DBus.Properties', 'GetAll', 's', MANAGER),
            (ROOT, 'org.freedesktop.DBus.Introspectable', 'Introspect'),
            (ROOT + '/file', 'org.freedesktop.DBus.Introspectable', 'Introspect'),
            (ROOT, 'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects')):
        for outcome in (NO, CHALLENGE, YES):
            cookie = stranger.send(path, interface, member, *args)
            asked = polkit.asked()
            equal((asked.subject, asked.action, asked.details, asked.flags),
                  (stranger.name, 'org.pinbroker1.inspect', {}, 0))
            polkit.decide(asked, outcome)
            if outcome == YES:
                stranger.answer(cookie)
            elif outcome == NO:
                refused(stranger, cookie, 'AccessDenied', 'polkit')
            else:
                refused(stranger, cookie, 'InteractiveAuthorizationRequired', 'interactive')
    for member, *args, details in (
            ('RevokePins', 'atst', 2, 7, 8, 'why', 0, {'pins': '7 8', 'reason': 'why'}),
            ('RevokePins', 'atst', 0, '', 0, {'pins': '', 'reason': ''}),
            ('RevokeFile', 'tst', 7, 'why', 0, {'file': '7', 'reason': 'why'}),
            ('RevokeClient', 'tst', 2 ** 64 - 1, '', 0, {'client': str(2 ** 64 - 1), 'reason': ''}),
            ('RevokePath', 'sst', '/x', 'why', 0, {'path': '/x', 'reason': 'why'}),
            ('RevokeMount', 'sst', '/x', '', 0, {'path': '/x', 'reason': ''}),
            ('RevokeDevice', 'sst', 'x', '', 0, {'device': 'x', 'reason': ''}),
            ('RevokeDevice', 't', 1, None)):  # its arguments are wrong
        cookie = stranger.send(ROOT, MANAGER, member, *args, interactive=True)
        asked = polkit.asked()
        equal((asked.action, asked.details, asked.flags),
              ('org.pinbroker1.revoke', details and dict(details, method=member) or {}, 1))
        polkit.decide(asked, NO)
        refused(stranger, cookie, 'AccessDenied')
    # nobody is asked about a ping
    stranger.call(ROOT, 'org.freedesktop.DBus.Peer', 'Ping')


def test_late(world, polkit, stranger):
    """Granted when what it is about is gone, or the caller."""
    h = Holder(world)
    file, context = h.open(world.file)['file'], h.context()
    pin = {'file': file, 'context': context, 'access': 'read', 'ranges': ranges((0, 4096))}
    pins = h.call('Pin', pin)['pins']
    revoke = (ROOT, MANAGER, 'RevokePins', 'atst', 1, pins[0], 'late', MINUTE)
    gone = Bus(world.address, NOBODY)
    gone_call, call = gone.send(*revoke), stranger.send(*revoke)
    asked = [polkit.asked(), polkit.asked()]
    expect(gone_call and {a.subject for a in asked} == {gone.name, stranger.name})
    gone.close()
    h.call('Unpin', {'pins': pins})
    for a in asked:
        polkit.decide(a, YES)
    try:
        stranger.answer(call)
        raise AssertionError('what is gone was revoked')
    except Failed as e:
        equal(e.name, 'org.pinbroker1.Error.NoSuchObject')
    expect_served(world)

    # in time, it is done; in another's place it is not
    pins = h.call('Pin', pin)['pins']
    call = stranger.send(ROOT, MANAGER, 'RevokePins', 'atst', 1, pins[0], 'granted', MINUTE)
    polkit.decide(polkit.asked(), YES)
    revocation = stranger.answer(call)[0]
    equal([(r['revocation'], r['conflict']['reason'])
           for r in h.connection.list('org.pinbroker.ListRevocations')][-1], (revocation, 'granted'))
    h.call('Unpin', {'pins': pins})
    h.close()


def test_never(world, polkit, stranger):
    """A polkit that does not answer holds up nobody, and is asked about as many calls of a uid as may
    be unfinished, from however many connections."""
    second = Bus(world.address, NOBODY)
    calls = [(bus, bus.send(*GET)) for _ in range(UNFINISHED // 2) for bus in (stranger, second)]
    asked = [polkit.asked() for _ in calls]
    refused(second, second.send(*GET), 'LimitsExceeded', 'MaxUnfinishedPerUser')
    refused(stranger, stranger.send(*GET), 'LimitsExceeded', 'MaxUnfinishedPerUser')
    other = Bus(world.address, DAEMON)
    cookie = other.send(*GET)
    polkit.decide(polkit.asked(), YES)
    expect(other.answer(cookie))
    other.close()
    expect_served(world)
    # one that is answered makes room for one
    first = asked.pop(0)
    polkit.decide(first, NO)
    call = next(c for c in calls if c[0].name == first.subject)
    calls.remove(call)
    refused(*call, 'AccessDenied')
    calls.append((second, second.send(*GET)))
    asked.append(polkit.asked())
    # they all get their answers at last, and in any order
    for a in reversed(asked):
        polkit.decide(a, YES)
    for bus, cookie in calls:
        expect(bus.answer(cookie))
    second.close()

    # what is long is not kept
    for args in (('RevokePath', 'sst', '/' + 'x' * 70000, '', 0),
                 ('RevokePins', 'as', 900, *['x' * 100] * 900),
                 ('ListPins', 'a{sv}tu', 1, 'x' * 70000, 's', 'x', 0, 0)):
        refused(stranger, stranger.send(ROOT, MANAGER, *args), 'LimitsExceeded', 'too long')
    half = 'x' * 40000
    refused(stranger, stranger.send('/' + half, MANAGER, 'ListPins', 's', half), 'LimitsExceeded')


def test_flood(world, polkit, stranger):
    """Of what is sent without end, most is refused, and nothing is left of it."""
    fds, memory = world.fds(), world.rss_kib()
    for _ in range(20000):
        stranger.send(*GET, answered=False)
    expect_served(world)
    stranger.call(ROOT, 'org.freedesktop.DBus.Peer', 'Ping')  # which has waited for all of them
    for _ in range(UNFINISHED):
        polkit.decide(polkit.asked(), NO)
    cookie = stranger.send(*GET)
    polkit.decide(polkit.asked(), NO)
    refused(stranger, cookie, 'AccessDenied')
    expect(world.fds() <= fds)
    if not os.environ.get('PINBROKER_SANITIZED'):
        expect(world.rss_kib() < memory + 2048, memory, world.rss_kib())


def test_restart(world, polkit, stranger):
    """Who waits when polkit ends is refused; the next one asks the next polkit."""
    cookie = stranger.send(*GET)
    polkit.asked()
    polkit.close()
    refused(stranger, cookie, 'AccessDenied', 'could not be asked')
    refused(stranger, stranger.send(*GET), 'AccessDenied', 'polkit is not running')
    refused(stranger, stranger.send(ROOT, MANAGER, 'RevokeFile', 'tst', 1, '', 0), 'AccessDenied',
            'group pinbroker')
    polkit = Polkit(world)
    cookie = stranger.send(*GET)
    polkit.decide(polkit.asked(), YES)
    expect(stranger.answer(cookie))
    # an answer that is none
    cookie = stranger.send(*GET)
    polkit.reply(polkit.asked(), 's', 'yes')
    refused(stranger, cookie, 'AccessDenied', 'cannot be read')
    # the daemon may end meanwhile
    stranger.send(*GET)
    polkit.asked()


def test_new_bus():
    """A bus that ends while polkit is asked takes the question with it."""
    with World() as world:
        os.chmod(world.dir, 0o755)
        world.start(f'[Limits]\nMaxUnfinishedPerUser={UNFINISHED}\n', policy=POLICY)
        for n in (1, 2):
            polkit, stranger = Polkit(world), Bus(world.address, NOBODY)
            for _ in range(UNFINISHED):
                stranger.send(*GET)
            for _ in range(UNFINISHED):
                polkit.asked()
            world.bus.kill()
            world.bus.wait()
            world.bus.stdout.close()
            world.bus = subprocess.Popen(
                ['dbus-daemon', '--nofork', '--nopidfile', '--print-address=1', '--config-file',
                 os.path.join(world.dir, 'bus.conf')], stdout=subprocess.PIPE)
            expect(world.bus.stdout.readline())
            world.wait_for_log(lambda n=n: sum('On the bus as' in line for line in world.log) > n)
            expect_served(world)
        # nothing is charged any more
        polkit, stranger = Polkit(world), Bus(world.address, NOBODY)
        cookies = [stranger.send(*GET) for _ in range(UNFINISHED)]
        for _ in cookies:
            polkit.decide(polkit.asked(), YES)
        for cookie in cookies:
            expect(stranger.answer(cookie))
        world.stop()


def test_timeout():
    """One that never answers is given up."""
    with World() as world:
        os.chmod(world.dir, 0o755)
        world.start(policy=POLICY, env={'SYSTEMD_BUS_TIMEOUT': '300ms'})
        polkit, stranger = Polkit(world), Bus(world.address, NOBODY)
        cookie = stranger.send(*GET)
        asked = polkit.asked()
        refused(stranger, cookie, 'AccessDenied', 'could not be asked')
        polkit.decide(asked, YES)
        expect_served(world)
        # whoever types a password is given longer
        cookie = stranger.send(*GET, interactive=True)
        asked = polkit.asked()
        expect(stranger.next(1) is None)
        polkit.decide(asked, YES)
        expect(stranger.answer(cookie))
        world.stop()


def main():
    signal.alarm(300)
    with World() as world:
        os.chmod(world.dir, 0o755)
        world.start(f'[Limits]\nMaxUnfinishedPerUser={UNFINISHED}\n', policy=POLICY)
        polkit, stranger = Polkit(world), Bus(world.address, NOBODY)
        for test in (test_actions, test_late, test_never, test_flood, test_restart):
            test(world, polkit, stranger)
            print(f'ok {test.__name__}', flush=True)
        world.stop()
    for test in (test_new_bus, test_timeout):
        test()
        print(f'ok {test.__name__}', flush=True)


if __name__ == '__main__':
    main()
