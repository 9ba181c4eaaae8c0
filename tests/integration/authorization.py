#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may call org.pinbroker1, and who hears its signals: the installed policies of the bus and of polkit,
with a real polkitd, in a mount namespace with a group and rules of the test's own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from client import WAIT, World, equal, expect
from objects import ROOT, Holder
from sdbus import SIGNAL, Bus, Failed, credentials

POLKITD = '/usr/lib/polkit-1/polkitd'
SYSTEMD = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../systemd')
MANAGER = 'org.pinbroker1.Manager'
DENIED = 'org.freedesktop.DBus.Error.AccessDenied'
CHALLENGE = 'org.freedesktop.DBus.Error.InteractiveAuthorizationRequired'

# The bus and polkit want users that they can look up.
GRANTED, REFUSED, ASKED = 'daemon', 'bin', 'games'
UID = {'daemon': 1, 'bin': 2, 'games': 5, 'nobody': 65534}
GROUP = 54322

BUS = f'''<busconfig><type>system</type><listen>{{}}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/>
<allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
<allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/>
<allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
<allow send_destination="org.freedesktop.DBus"/></policy>
<include>/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
<include>{SYSTEMD}/org.pinbroker1.conf</include></busconfig>'''

RULES = '''
polkit.addRule(function(action, subject) {
	if (action.id.indexOf("org.pinbroker1.") != 0)
		return polkit.Result.NOT_HANDLED;
	if (subject.user == "%s")
		return polkit.Result.YES;
	if (subject.user == "%s" || action.lookup("reason") == "never")
		return polkit.Result.NO;
	if (action.lookup("path") == "/for/everybody" && action.lookup("method") == "RevokePath")
		return polkit.Result.YES;
});
''' % (GRANTED, REFUSED)

# Replaces what the test has its own of, and goes on in a mount namespace of its own.
NAMESPACE = ['unshare', '--mount', 'sh', '-c',
             'mount --bind "$1/group" /etc/group && '
             'mount --bind "$1/actions" /usr/share/polkit-1/actions && '
             'mount --bind "$1/rules" /etc/polkit-1/rules.d && '
             'mount --bind "$1/none" /usr/share/polkit-1/rules.d && shift && exec "$@"', 'sh']

INSPECT = (
    (ROOT, MANAGER, 'ListPins', 'a{sv}tu', 0, 0, 0),
    (ROOT, MANAGER, 'ListFiles', 'a{sv}tu', 0, 0, 0),
    (ROOT, MANAGER, 'ListClients', 'a{sv}tu', 0, 0, 0),
    (ROOT, MANAGER, 'ListContexts', 'a{sv}tu', 0, 0, 0),
    (ROOT, MANAGER, 'ListRevocations', 'a{sv}tu', 0, 0, 0),
    (ROOT, 'org.freedesktop.DBus.Properties', 'Get', 'ss', MANAGER, 'Version'),
    (ROOT, 'org.freedesktop.DBus.Properties', 'GetAll', 's', MANAGER),
    (ROOT, 'org.freedesktop.DBus.Introspectable', 'Introspect'),
    (ROOT + '/file', 'org.freedesktop.DBus.Introspectable', 'Introspect'),
    (ROOT, 'org.freedesktop.DBus.ObjectManager', 'GetManagedObjects'))
REVOKE = (
    (ROOT, MANAGER, 'RevokePins', 'atst', 1, 999, '', 0),
    (ROOT, MANAGER, 'RevokeFile', 'tst', 999, '', 0),
    (ROOT, MANAGER, 'RevokeClient', 'tst', 999, '', 0),
    (ROOT, MANAGER, 'RevokePath', 'sst', '/x', '', 0),
    (ROOT, MANAGER, 'RevokeMount', 'sst', '/x', '', 0),
    (ROOT, MANAGER, 'RevokeDevice', 'sst', 'x', '', 0))


def outcome(bus, call, interactive=False):
    """The error that says that it may not, if it may not, else None."""
    try:
        bus.call(*call, interactive=interactive)
    except Failed as e:
        return e.name if e.name in (DENIED, CHALLENGE) else None
    return None


@contextlib.contextmanager
def connected(world, user, groups=()):
    bus = Bus(world.address, UID[user], groups)
    yield bus
    bus.close()


def test_without_polkit(world):
    with connected(world, GRANTED) as bus:
        for call in INSPECT + REVOKE:
            equal((call[2], outcome(bus, call)), (call[2], DENIED))
        try:
            bus.call(*INSPECT[0])
        except Failed as e:
            expect('polkit is not running' in e.text and 'group pinbroker' in e.text, e.text)
    with connected(world, REFUSED, [GROUP]) as bus:
        for call in INSPECT + REVOKE:
            equal((call[2], outcome(bus, call)), (call[2], None))


@contextlib.contextmanager
def polkitd(world):
    root = Bus(world.address)
    root.match("type='signal',member='NameOwnerChanged',arg0='org.freedesktop.PolicyKit1'")
    process = subprocess.Popen([POLKITD, '--no-debug'], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL,
                               env=dict(os.environ, DBUS_SYSTEM_BUS_ADDRESS=world.address))
    try:
        root.wait(lambda m: m.member == 'NameOwnerChanged' and m.body[2])
        yield process
    finally:
        process.terminate()
        process.wait(WAIT)
        root.wait(lambda m: m.member == 'NameOwnerChanged' and not m.body[2])
        root.close()


def test_polkit(world):
    with polkitd(world):
        for call in INSPECT + REVOKE:
            with connected(world, GRANTED) as bus:
                equal((call[2], outcome(bus, call)), (call[2], None))
            with connected(world, REFUSED) as bus:
                equal((call[2], outcome(bus, call)), (call[2], DENIED))
                equal((call[2], outcome(bus, call, interactive=True)), (call[2], DENIED))
            with connected(world, REFUSED, [GROUP]) as bus:
                equal((call[2], outcome(bus, call)), (call[2], None))
            # as installed, an administrator's password is wanted, and nobody is there to ask for it
            with connected(world, ASKED) as bus:
                equal((call[2], outcome(bus, call)), (call[2], CHALLENGE))
                equal((call[2], outcome(bus, call, interactive=True)), (call[2], CHALLENGE))
        # a rule can look at what is to be revoked
        with connected(world, ASKED) as bus:
            for path, reason, expected in (('/for/everybody', 'x', None), ('/x', 'x', CHALLENGE),
                                           ('/for/everybody', 'never', DENIED)):
                equal(outcome(bus, (ROOT, MANAGER, 'RevokePath', 'sst', path, reason, 0)), expected)
    # it has ended, and starts anew
    with connected(world, GRANTED) as bus:
        equal(outcome(bus, INSPECT[0]), DENIED)
        with polkitd(world):
            equal(outcome(bus, INSPECT[0]), None)


def test_signals(world):
    """What comes and goes, with its paths, is not for everybody; a notice is for its holder."""
    with contextlib.ExitStack() as stack:
        listeners = {who: stack.enter_context(connected(world, *who)) for who in (
            (GRANTED,), (REFUSED, (GROUP,)))}
        root = Bus(world.address)
        for bus in [root, *listeners.values()]:
            bus.match("type='signal',sender='org.pinbroker1'")
        holder = Holder(world)
        # nobody is told of what comes and goes in a moment
        root.wait(lambda m: m.member == 'InterfacesAdded' and
                  m.body[0] == f'{ROOT}/client/{holder.client}')
        root.call(ROOT, MANAGER, 'RevokePins', 'atst', 1, holder.pins[0], 'x', 10 ** 9)
        root.wait(lambda m: m.member == 'InterfacesAdded' and
                  m.body[0].startswith(f'{ROOT}/revocation/'))
        holder.connection.call('org.pinbroker.Unpin', {'pins': holder.pins})
        root.wait(lambda m: m.member == 'PropertiesChanged')
        holder.connection.close()
        wanted = {'InterfacesAdded', 'InterfacesRemoved', 'PropertiesChanged', 'RevocationStarted',
                  'RevocationEnded'}
        seen = set()
        while not wanted <= seen:
            seen.add(listeners[REFUSED, (GROUP,)].wait(lambda m: m.type == SIGNAL).member)
        # whatever there was for the others has come before this
        bus = listeners[GRANTED,]
        cookie = bus.send('/', 'org.freedesktop.DBus', 'GetId', to='org.freedesktop.DBus')
        m = bus.wait(lambda m: m.cookie == cookie or
                     (m.type == SIGNAL and m.sender != 'org.freedesktop.DBus'))
        expect(m.type != SIGNAL, m.member)
        root.close()


def test_notice(world):
    """Sent to the name of a holder of no standing, with nothing but the connection that he has."""
    bus = Bus(world.address, UID[REFUSED])
    os.chown(world.file, UID[REFUSED], -1)
    with credentials(UID[REFUSED], ()):
        holder = Holder(world, bus.name)
    root = Bus(world.address)
    revocation = root.call(ROOT, MANAGER, 'RevokePins', 'atst', 1, holder.pins[0], 'x', 10 ** 9)[0]
    notice = bus.wait(lambda m: m.type == SIGNAL and m.interface == MANAGER)
    equal((notice.member, notice.body[0], notice.body[3]), ('Revoke', revocation, world.file))
    holder.connection.close()
    root.close()
    bus.close()


def prepare(directory):
    os.chmod(directory, 0o755)
    for name in ('actions', 'rules', 'none'):
        os.mkdir(os.path.join(directory, name))
    shutil.copy(os.path.join(SYSTEMD, 'org.pinbroker1.policy'), directory + '/actions')
    with open('/etc/group', encoding='utf-8') as f:
        groups = [line for line in f if not line.startswith('pinbroker:')]  # where it is installed
    with open(directory + '/group', 'w', encoding='utf-8') as f:
        f.writelines(groups + [f'pinbroker:x:{GROUP}:\n'])
    with open(directory + '/rules/10-test.rules', 'w', encoding='ascii') as f:
        f.write(RULES)


def run():
    with World() as world:
        os.chmod(world.dir, 0o755)
        world.start(policy=BUS)
        for test in (test_without_polkit, test_polkit, test_signals, test_notice):
            test(world)
            print(f'ok {test.__name__}', flush=True)
        world.stop()


def main():
    """Starts itself again in the namespace, with the directory that it is made of."""
    if len(sys.argv) > 1:
        signal.alarm(300)
        try:
            run()
        finally:
            shutil.rmtree(sys.argv[1])
        return
    if not os.path.exists(POLKITD):
        print('polkitd is not installed')
        sys.exit(77)
    directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
    prepare(directory)
    command = NAMESPACE + [directory]
    if subprocess.run(command + ['true'], check=False).returncode != 0:
        shutil.rmtree(directory)
        print('in a chroot that is no mount point nothing can be mounted for the test alone')
        sys.exit(77)
    os.execvp(command[0], command + [sys.executable, __file__, directory])


if __name__ == '__main__':
    main()
