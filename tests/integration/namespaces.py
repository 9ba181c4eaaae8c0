#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon and its clients in different namespaces of processes and of time: what works, and what says why not."""

import os
import re
import signal
import subprocess
import time

from client import PAGE, WAIT, World, equal, expect
from rules import Holder
from tool import TOOL, Tool, fields


def test_pid_namespace():
    """A client that the daemon cannot see is refused, and told; one in the same namespace, or below, is not."""
    with World() as world:
        world.start(wrapper=['unshare', '--pid', '--fork', '--kill-child', '--mount-proc'])
        tool = Tool(world)
        holder = ['hold', '--range', f'0:{PAGE}', world.file]
        tool.run(*holder, status=77, error='pid namespace')
        with open(f'/proc/{world.daemon.pid}/task/{world.daemon.pid}/children', encoding='ascii') as f:
            daemon = f.read().split()[0]
        for below in ([], ['unshare', '--pid', '--fork', '--mount-proc']):
            out = subprocess.run(['nsenter', '--target', daemon, '--pid', '--mount', *below, TOOL, *holder,
                                  '--', 'true'], env=tool.env, timeout=WAIT, check=True,
                                 stdout=subprocess.PIPE, encoding='utf-8').stdout
            expect(out.startswith('holding '), out)
        os.kill(int(daemon), signal.SIGTERM)
        equal(world.daemon.wait(WAIT), 0)


def test_other_proc():
    """Processes would be taken for others."""
    r = subprocess.run(['unshare', '--pid', '--fork', os.environ['PINBROKERD'], '--socket', '/nonexistent/s'],
                       stderr=subprocess.PIPE, encoding='utf-8', timeout=WAIT, check=False)
    equal(r.returncode, 71)
    expect('/proc is not there, or is that of another pid namespace' in r.stderr, r.stderr)


def test_time_namespace():
    """Deadlines are told as the client's own clock has them."""
    with World() as world:
        world.start('[Revocation]\nRevokeGraceSec=5s\n')
        tool = Tool(world)
        command = ['unshare', '--time', '--monotonic', '100000', '--fork', TOOL, 'hold', '--range',
                   f'0:{PAGE}', world.file]
        for bus in (tool.env['PINBROKER_BUS'], 'unix:path=/nowhere'):
            with subprocess.Popen(command, env=tool.env | {'PINBROKER_BUS': bus},
                                  stdout=subprocess.PIPE, encoding='utf-8') as process:
                pin = fields(process.stdout.readline())['pin']
                tool.run('revoke', pin)
                left = float(re.search(r' left (\S+) ', process.stdout.readline())[1])
                expect(3 < left <= 5, left)
                equal(process.wait(WAIT), 0)
        # for those who speak the protocol themselves
        holder, now = Holder(world), time.monotonic() * 1e6
        hello = holder.call('Hello', {'name': None})
        expect(now <= hello['nowUSec'] <= time.monotonic() * 1e6, hello)
        holder.close()
        world.stop()


def main():
    signal.alarm(120)
    for test in (test_pid_namespace, test_other_proc, test_time_namespace):
        test()
        print(f'ok {test.__name__}', flush=True)


if __name__ == '__main__':
    main()
