# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to a bus, by libsystemd: calls that are not waited for, and every message that comes."""

import contextlib
import ctypes
import os
import select
import time

from client import WAIT, expect

LIB = ctypes.CDLL('libsystemd.so.0')
CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
BASIC = {'y': ctypes.c_uint8, 'b': ctypes.c_int, 'n': ctypes.c_int16, 'q': ctypes.c_uint16,
         'i': ctypes.c_int32, 'u': ctypes.c_uint32, 'x': ctypes.c_int64, 't': ctypes.c_uint64,
         'd': ctypes.c_double, 's': ctypes.c_char_p, 'o': ctypes.c_char_p, 'g': ctypes.c_char_p}


class Failed(Exception):
    """The error that a call was answered with: its name, and what it says."""

    def __init__(self, name, text):
        super().__init__(name, text)
        self.name, self.text = name, text


def check(r):
    if r < 0:
        raise OSError(-r, 'libsystemd')
    return r


def function(name, result=ctypes.c_int):
    f = getattr(LIB, name)
    f.restype = result
    return f


def argument(value):
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    return ctypes.c_uint64(value)  # goes for all integers that are passed in registers


class Message:
    def __init__(self, pointer):
        self.pointer = pointer
        kind = ctypes.c_uint8()
        check(LIB.sd_bus_message_get_type(pointer, ctypes.byref(kind)))
        self.type = kind.value
        self.path, self.interface, self.member, self.sender = map(
            self.get, ('path', 'interface', 'member', 'sender'))
        cookie = ctypes.c_uint64()
        self.cookie = (cookie.value if LIB.sd_bus_message_get_reply_cookie(
            pointer, ctypes.byref(cookie)) >= 0 else None)
        self.interactive = LIB.sd_bus_message_get_allow_interactive_authorization(pointer) > 0
        self.error = None
        if self.type == ERROR:
            class Error(ctypes.Structure):
                _fields_ = [('name', ctypes.c_char_p), ('message', ctypes.c_char_p)]
            get = function('sd_bus_message_get_error', ctypes.POINTER(Error))
            error = get(pointer).contents
            self.error = Failed(error.name.decode(), (error.message or b'').decode())
        self.body = list(self.read())

    def get(self, what):
        value = function('sd_bus_message_get_' + what, ctypes.c_char_p)(self.pointer)
        return value.decode() if value is not None else None

    def read(self):
        kind, contents = ctypes.c_char(), ctypes.c_char_p()
        while check(LIB.sd_bus_message_peek_type(self.pointer, ctypes.byref(kind),
                                                 ctypes.byref(contents))) > 0:
            t = kind.value.decode()
            if t in BASIC:
                value = BASIC[t]()
                check(LIB.sd_bus_message_read_basic(self.pointer, ctypes.c_char(kind.value),
                                                    ctypes.byref(value)))
                yield value.value.decode() if t in 'sog' else value.value
                continue
            inside = contents.value
            check(LIB.sd_bus_message_enter_container(self.pointer, kind, contents))
            items = list(self.read())
            check(LIB.sd_bus_message_exit_container(self.pointer))
            if t == 'v':
                yield items[0]
            elif t == 'a' and inside.startswith(b'{'):
                yield dict(items)
            else:
                yield tuple(items) if t in 're' else items


@contextlib.contextmanager
def credentials(uid, groups):
    """What is connected meanwhile is that user's."""
    own = os.getgroups()
    os.setgroups(groups)
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own)


class Bus:
    def __init__(self, address, uid=None, groups=()):
        self.kept = []
        with contextlib.nullcontext() if uid is None else credentials(uid, groups):
            self.connect(address)

    def connect(self, address):
        self.bus = ctypes.c_void_p()
        check(LIB.sd_bus_new(ctypes.byref(self.bus)))
        check(LIB.sd_bus_set_address(self.bus, argument(address)))
        check(LIB.sd_bus_set_bus_client(self.bus, 1))
        check(LIB.sd_bus_start(self.bus))
        name = ctypes.c_char_p()
        check(LIB.sd_bus_get_unique_name(self.bus, ctypes.byref(name)))
        self.name = name.value.decode()

    def request_name(self, name):
        check(LIB.sd_bus_request_name(self.bus, argument(name), ctypes.c_uint64(0)))

    def match(self, rule):
        check(LIB.sd_bus_add_match(self.bus, None, argument(rule), None, None))

    def send(self, path, interface, member, signature='', *args, to='org.pinbroker1',
             interactive=False, answered=True):
        """Sends a call; its cookie, which the answer will have."""
        m = ctypes.c_void_p()
        check(LIB.sd_bus_message_new_method_call(self.bus, ctypes.byref(m), *map(
            argument, (to, path, interface, member))))
        LIB.sd_bus_message_set_allow_interactive_authorization(m, int(interactive))
        LIB.sd_bus_message_set_expect_reply(m, int(answered))
        if signature:
            check(LIB.sd_bus_message_append(m, argument(signature), *map(argument, args)))
        cookie = ctypes.c_uint64()
        check(LIB.sd_bus_send(self.bus, m, ctypes.byref(cookie)))
        LIB.sd_bus_message_unref(m)
        return cookie.value

    def reply(self, call, signature, *args):
        m = ctypes.c_void_p()
        check(LIB.sd_bus_message_new_method_return(call.pointer, ctypes.byref(m)))
        check(LIB.sd_bus_message_append(m, argument(signature), *map(argument, args)))
        check(LIB.sd_bus_send(self.bus, m, None))
        LIB.sd_bus_message_unref(m)
        check(LIB.sd_bus_flush(self.bus))

    def next(self, seconds=WAIT):
        """The next message, or None if there is none in that time."""
        end = time.monotonic() + seconds
        while True:
            m = ctypes.c_void_p()
            if check(LIB.sd_bus_process(self.bus, ctypes.byref(m))) > 0:
                if m:
                    return Message(m)
                continue
            left = end - time.monotonic()
            if left <= 0:
                return None
            # what could not be sent yet is to be waited for as well
            poll = select.poll()
            poll.register(LIB.sd_bus_get_fd(self.bus), check(LIB.sd_bus_get_events(self.bus)))
            poll.poll(left * 1000)

    def wait(self, condition):
        """The first message that meets it; the others are kept."""
        end = time.monotonic() + WAIT
        for i, message in enumerate(self.kept):
            if condition(message):
                return self.kept.pop(i)
        while True:
            message = self.next(max(end - time.monotonic(), 0))
            expect(message, 'no such message has come')
            if condition(message):
                return message
            self.kept.append(message)

    def answer(self, cookie):
        message = self.wait(lambda m: m.type in (RETURN, ERROR) and m.cookie == cookie)
        if message.error:
            raise message.error
        return message.body

    def call(self, *args, **kwargs):
        return self.answer(self.send(*args, **kwargs))

    def close(self):
        LIB.sd_bus_flush_close_unref.restype = ctypes.c_void_p
        LIB.sd_bus_flush_close_unref(self.bus)
