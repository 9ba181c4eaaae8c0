# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers that export a file with RDMA, and a peer of theirs: what the tests over soft-RoCE share."""
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
import traceback
import unittest

import pyverbs.enums as e
from pyverbs.addr import AHAttr, GID, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR, MW, MWBindInfo
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from installed import ADDRESS, SERVICE, TIMEOUT, output
from client import (PAGE, Connection, Refused, expect_pinned, is_readable, pinned_pages,
                    truncate_in_child)

DEVICE, PORT = 'rxe0', 1
SIZE, OTHER = 256 * PAGE, 5 * PAGE
PAGES = SIZE // PAGE
ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
WRITTEN = b'before'
PB = 'org.pinbroker.'
DROP_IN = '/etc/pinbroker/pinbroker.conf.d/test.conf'
GRACE, SIGNAL_GRACE = 3, 3  # seconds


def configure(signal_grace=SIGNAL_GRACE):
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, 'w', encoding='utf-8') as f:
        f.write(f'[Revocation]\nRevokeGraceSec={GRACE}s\nSignalGraceSec={signal_grace}s\n'
                '[Files]\nReaders=admit\n')
    output('systemctl', 'restart', SERVICE)


def unconfigure():
    os.unlink(DROP_IN)
    output('systemctl', 'restart', SERVICE)


def regions(length=SIZE):
    """Of the whole machine, those that are so long: the pids of their owners, and how long they are."""
    listed = json.loads(output('rdma', '-j', 'resource', 'show', 'mr'))
    return [(r.get('pid'), r['mrlen']) for r in listed if r['mrlen'] == length]


def can_page(end):
    """On demand."""
    try:
        MR(end.pd, PAGE, e.IBV_ACCESS_ON_DEMAND).close()
        return True
    except PyverbsRDMAError:
        return False


def pinned_for(pid):
    """Pages, as RDMA counts them."""
    with open(f'/proc/{pid}/status', encoding='ascii') as f:
        kib = next(int(line.split()[1]) for line in f if line.startswith('VmPin:'))
    return kib * 1024 // PAGE


class End:
    """One end of a connection, and the device that it is on."""

    def __init__(self):
        self.device = Context(name=DEVICE)
        self.pd = PD(self.device)
        self.cq = CQ(self.device, 16)
        capabilities = QPCap(max_send_wr=16, max_recv_wr=16)
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = ACCESS
        self.qp = QP(self.pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq,
                                         cap=capabilities), attributes)
        # the one of an IPv4 address, if there is one
        gids = [self.device.query_gid(PORT, i).gid for i in range(2)]
        self.gid_index = next((i for i, gid in enumerate(gids) if ':ffff:' in gid), 0)
        self.address = [self.qp.qp_num, gids[self.gid_index]]

    def connect(self, address):
        number, gid = address
        route = GlobalRoute(dgid=GID(gid), sgid_index=self.gid_index)
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = ACCESS
        attributes.dest_qp_num = number
        attributes.path_mtu = e.IBV_MTU_1024
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.timeout = 12, 14
        attributes.retry_cnt = attributes.rnr_retry = 7
        attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=PORT)
        self.qp.to_rts(attributes)

    def completion(self):
        while True:
            n, completions = self.cq.poll()
            if n > 0:
                return completions[0].status


class Server:
    """A process that exports a file to its peer, with a pin at the broker or without; it does what it is
    told, line by line."""

    def __init__(self, path, broker=True, bind=True, uid=0, on_demand=False):
        self.socket, end = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.socket.close()
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                self.on_demand = on_demand
                self.serve(end, path, broker, bind)
                status = 0
            except BaseException:  # pylint: disable=broad-except
                traceback.print_exc()
            finally:
                os._exit(status)
        end.close()
        self.socket.settimeout(TIMEOUT)
        self.lines = self.socket.makefile('rw', encoding='utf-8')
        self.exported = self.reply()

    def reply(self):
        line = self.lines.readline()
        if not line:
            raise AssertionError('the server has ended')
        return json.loads(line)

    def tell(self, command, *arguments):
        self.lines.write(json.dumps([command, *arguments]) + '\n')
        self.lines.flush()
        return self.reply()

    def close(self):
        self.lines.close()
        self.socket.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    # --- in its process ---

    def call(self, method, parameters, fds=()):
        return self.connection.call(PB + method, parameters, fds)

    def serve(self, end, path, broker, bind):
        self.path, self.broker, self.bind = path, broker, bind
        self.end = End()
        self.kept = []
        if broker:
            self.connection, self.watch = Connection(ADDRESS), Connection(ADDRESS)
            hello = self.call('Hello', {'name': 'server'})
            self.watch.socket.settimeout(TIMEOUT)
            self.watch.send(PB + 'Watch', {'client': hello['client'], 'token': hello['token']},
                            more=True)
            self.context = self.call('AddContext', {'fileDescriptor': 0, 'label': 'server'},
                                     [self.end.device.cmd_fd])
        self.answer(end, self.export())

    def answer(self, end, reply):
        """Does what it is told, line by line, until nobody is there any more."""
        lines = end.makefile('rw', encoding='utf-8')
        while True:
            lines.write(json.dumps(reply) + '\n')
            lines.flush()
            line = lines.readline()
            if not line:
                return
            command, *arguments = json.loads(line)
            reply = getattr(self, 'do_' + command)(*arguments)

    def export(self):
        if self.broker:
            fd = os.open(self.path, os.O_PATH)
            self.opened = self.call('OpenFile', {'fileDescriptor': 0, 'access': 'write'}, [fd])
            os.close(fd)
            self.fd = self.connection.fds[0]
        else:
            self.fd = os.open(self.path, os.O_RDWR)
        self.memory = mmap.mmap(self.fd, SIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        if self.broker:
            self.reserve()
        self.do_register()
        return {'address': self.end.address, 'start': self.start, 'rkey': self.region.rkey,
                'context': self.context if self.broker else None}

    def reserve(self):
        self.pins = self.call('Pin', {
            'file': self.opened['file'], 'context': self.context['context'], 'access': 'write',
            'ranges': [{'offset': 0, 'length': SIZE}], 'onDemand': self.on_demand})['pins']

    def do_register(self, access=ACCESS):
        if self.on_demand:
            access |= e.IBV_ACCESS_ON_DEMAND
        self.region = MR(self.end.pd, SIZE, access, address=self.start)
        self.kept.append(self.region)
        if self.broker and self.bind:
            self.call('Bind', {'pin': self.pins[0], 'handle': self.region.handle})
        return self.region.rkey

    def do_connect(self, address):
        self.end.connect(address)

    def do_notice(self):
        return self.watch.reply(PB + 'Watch')[0]['notice']

    def do_release(self):
        """By the book: Unpin, then deregistration."""
        ended = self.call('Unpin', {'pins': self.pins})['ended']
        self.region.close()
        return ended

    def do_unpin(self):
        return self.call('Unpin', {'pins': self.pins})['ended']

    def do_pins(self):
        return self.pins

    def do_reopen(self, size):
        self.call('CloseFile', {'file': self.opened['file']})
        self.memory.close()
        os.close(self.fd)
        with open(self.path, 'r+b') as f:
            f.truncate(size)
        return self.export()

    def do_slip(self):
        """Registers the same memory anew, and tells nobody."""
        self.region.close()
        self.region = MR(self.end.pd, SIZE, ACCESS, address=self.start)
        self.kept.append(self.region)

    def do_register_anew(self):
        """In the place of what there was, and says so."""
        self.region.close()
        return self.do_register()

    def do_pin_pages(self):
        """Beside what it has on demand: what it is refused with, if it is."""
        try:
            self.call('Pin', {'file': self.opened['file'], 'context': self.context['context'],
                              'access': 'write', 'ranges': [{'offset': 0, 'length': PAGE}]})
        except Refused as refused:
            return [refused.error, refused.parameters.get('cause')]
        return None

    def do_read(self, n):
        return self.memory[:n].decode()

    def do_register_others(self, n):
        """Of memory that is nobody else's business."""
        self.memories = mmap.mmap(-1, PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memories))
        self.kept += [MR(self.end.pd, PAGE, e.IBV_ACCESS_LOCAL_WRITE, address=start) for _ in range(n)]

    def do_window(self):
        """Binds a memory window to the region."""
        self.region.close()
        self.do_register(ACCESS | e.IBV_ACCESS_MW_BIND)
        window = MW(self.end.pd, e.IBV_MW_TYPE_2)
        self.kept.append(window)
        wr = SendWR(opcode=e.IBV_WR_BIND_MW)
        info = MWBindInfo(self.region, self.start, PAGE, e.IBV_ACCESS_REMOTE_WRITE)
        wr.set_bind_wr(window, info)
        self.end.qp.post_send(wr)
        return self.end.completion()

    def do_fork(self):
        """A child that has the context too, and nothing to do."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
        return pid

    def do_fork_server(self, address):
        """A child that has the context too, and does what it is told at the other end of that socket."""
        pid = os.fork()
        if pid == 0:
            with socket.socket(socket.AF_UNIX) as end:
                end.connect(address)
                self.answer(end, 'ready')
            os._exit(0)
        return pid

    def do_reuse(self):
        """Deregisters, and registers memory of its own, which gets the handle that is free then."""
        try:
            self.region.close()
            error = 0
        except PyverbsRDMAError as failure:
            error = failure.error_code
        other = MR(self.end.pd, OTHER, e.IBV_ACCESS_LOCAL_WRITE)
        self.kept.append(other)
        return [error, self.region.handle, other.handle]

    def do_export_second(self):
        """The same range by another context of the same device."""
        first, self.end = self.end, End()
        self.kept.append(first)
        self.context = self.call('AddContext', {'fileDescriptor': 0, 'label': 'second'},
                                 [self.end.device.cmd_fd])
        self.reserve()
        return self.do_register()

    def do_device(self):
        return self.end.device.cmd_fd

    def do_close_device(self):
        os.close(self.end.device.cmd_fd)

    def do_ignore_signal(self):
        signal.signal(signal.SIGBUS, signal.SIG_IGN)

    def do_ping(self):
        return 'pong'


class Case(unittest.TestCase):
    def setUp(self):
        directory = tempfile.mkdtemp(prefix='pinbroker-test-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, directory)
        os.chmod(directory, 0o755)
        self.path = os.path.join(directory, 'data')
        with open(self.path, 'wb') as f:
            f.truncate(SIZE)
        self.peer = End()
        self.buffer = MR(self.peer.pd, PAGE, e.IBV_ACCESS_LOCAL_WRITE)
        self.addCleanup(self.wait_until_gone)
        self.base, self.others = pinned_pages(), 0

    def tearDown(self):
        self.buffer.close()
        self.peer.qp.close()
        self.peer.cq.close()
        self.peer.pd.close()
        self.peer.device.close()

    def wait_until_gone(self):
        """No event tells of it."""
        end = time.monotonic() + TIMEOUT
        while regions():
            self.assertLess(time.monotonic(), end, regions())

    def serve(self, **options):
        if options.get('uid'):
            os.chown(self.path, options['uid'], -1)
        server = Server(self.path, **options)
        self.addCleanup(server.close)
        self.peer.connect(server.exported['address'])
        server.tell('connect', self.peer.address)
        self.assertEqual(self.write(server.exported, WRITTEN), e.IBV_WC_SUCCESS)
        self.assertEqual(server.tell('read', len(WRITTEN)), WRITTEN.decode())
        self.expect_regions(server, 1)
        return server

    def pages(self, n):
        """That so many regions pin."""
        return n * PAGES

    def expect_regions(self, server, n, pages=None):
        """So many over the file, and what the kernel says is pinned for them, and for the others."""
        pages = (self.pages(n) if pages is None else pages) + self.others
        self.assertEqual([length for _, length in regions()], n * [SIZE])
        expect_pinned(pinned_pages(), self.base, pages)
        if server:
            self.assertEqual(pinned_for(server.pid), pages)

    def write(self, exported, data, offset=0):
        """The peer's RDMA write to what is exported; its completion's status."""
        self.buffer.write(data, len(data))
        wr = SendWR(opcode=e.IBV_WR_RDMA_WRITE, num_sge=1,
                    sg=[SGE(self.buffer.buf, len(data), self.buffer.lkey)])
        wr.set_wr_rdma(exported['rkey'], exported['start'] + offset)
        self.peer.qp.post_send(wr)
        return self.peer.completion()

    def truncate(self):
        pid, result = truncate_in_child(self.path, PAGE)
        self.addCleanup(os.close, result)
        self.addCleanup(os.waitpid, pid, 0)
        return result

    def truncated(self, result, least=0, pages=0):
        """So many were pinned still when it returned. What is left of the file is what was written there."""
        self.assertTrue(is_readable(result, TIMEOUT), 'the truncate does not return')
        error, seconds, pinned = struct.unpack('idq', os.read(result, 64))
        self.assertEqual(error, 0, os.strerror(error))
        self.assertGreaterEqual(seconds, least)
        expect_pinned(pinned, self.base, pages + self.others)
        with open(self.path, 'rb') as f:
            self.assertEqual(f.read(), WRITTEN.ljust(PAGE, b'\0'))

    def revocations(self):
        """Of this test's file."""
        connection = Connection(ADDRESS)
        try:
            return [r for r in connection.list(PB + 'ListRevocations') if r.get('path') == self.path]
        finally:
            connection.close()

    def revocation(self):
        return self.revocations()[-1]

    def expect_released(self, proof):
        revocation = self.revocation()
        self.assertEqual((revocation['state'], revocation['remaining'], revocation.get('proof')),
                         ('released', 0, proof))

    def expect_forced(self, server):
        """The truncate goes through by force at the end of grace, and the server lives."""
        result = self.truncate()
        self.truncated(result, GRACE * 0.9)
        self.expect_released('provable')
        self.expect_regions(server, 0)

    def expect_signalled(self, server):
        """Nothing but its end helps."""
        result = self.truncate()
        self.truncated(result, GRACE * 0.9)
        status = os.waitpid(server.pid, 0)[1]
        self.assertTrue(os.WIFSIGNALED(status))
        self.assertEqual(os.WTERMSIG(status), signal.SIGBUS)
        self.expect_released('presumed')
        self.expect_regions(None, 0)
