#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may call org.pinbroker1.Manager: root and the group pinbroker, nobody else. The daemon sees an
/etc/group of the test's own."""

import os
import signal
import subprocess
import sys

from admin import Manager
from client import WAIT, World, equal, expect
from objects import ROOT

STRANGER = 65534  # nobody: the bus wants users that it can look up
GROUP = 54322
POLICY = '''<busconfig><listen>{}</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
</policy></busconfig>'''

# Starts what follows with the first argument for /etc/group.
WITH_GROUPS = ['unshare', '--mount', 'sh', '-c',
               'mount --bind "$1" /etc/group && shift && exec "$@"', 'sh']


def test_authorization(world, manager):
    calls = [('ListPins', 'a{sv}tu', 0, 0, 0), ('ListFiles', 'a{sv}tu', 0, 0, 0),
             ('ListClients', 'a{sv}tu', 0, 0, 0), ('ListContexts', 'a{sv}tu', 0, 0, 0),
             ('ListRevocations', 'a{sv}tu', 0, 0, 0), ('RevokePins', 'atst', 1, 1, '', 0),
             ('RevokeFile', 'tst', 1, '', 0), ('RevokeClient', 'tst', 1, '', 0),
             ('RevokePath', 'sst', '/x', '', 0), ('RevokeMount', 'sst', '/x', '', 0),
             ('RevokeDevice', 'sst', 'x', '', 0)]

    def outcome(groups, call):
        r = subprocess.run(manager.command + ['call', 'org.pinbroker1', ROOT,
                                              'org.pinbroker1.Manager', *map(str, call)],
                           user=STRANGER, group=STRANGER, extra_groups=groups, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT)
        return 'refused' if 'Access denied' in r.stderr else r.stderr

    for call in calls:
        equal((call[0], outcome([], call)), (call[0], 'refused'))
        expect(outcome([GROUP], call) != 'refused', call)
    equal(outcome([GROUP], calls[0]), '')


def main():
    signal.alarm(50)
    with World() as world:
        os.chmod(world.dir, 0o755)
        groups = os.path.join(world.dir, 'group')
        with open(groups, 'w', encoding='ascii') as f:
            f.write(f'root:x:0:\npinbroker:x:{GROUP}:\n')
        if subprocess.run(WITH_GROUPS + [groups, 'true'], check=False).returncode != 0:
            sys.exit(77)  # in a chroot whose root is no mount point
        world.start(policy=POLICY, wrapper=WITH_GROUPS + [groups])
        test_authorization(world, Manager(world))
        world.stop()


if __name__ == '__main__':
    main()
