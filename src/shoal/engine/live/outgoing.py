"""The sending end of a connection: calls, greets, and writes what is queued.

Writes gather the buffers of many frames without joining them, so a tensor goes from its own memory
to the operating system's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from shoal.base.errors import DecodeError
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.frame import ANSWER_BYTES, Greeting, Outbox, unpack_answer

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

# What one turn of the loop may write to one connection, so that the others get their turns.
_TURN_BYTES = 1 << 22
_RESET = struct.pack("ii", 1, 0)


class Outgoing:
    """The frames for one other peer, over one connection at a time."""

    def __init__(self, transport: Transport, target: int) -> None:
        self.outbox = Outbox()
        self._transport = transport
        self._loop = transport.loop
        self._target = target
        self._socket: socket.socket | None = None
        self._open = False
        self._watched = False
        self._answer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._pause_s = transport.settings.backoff_s
        self._retry_s = 0.0
        self._room: deque[Wait] = deque()
        self._flushed: deque[tuple[int, Wait]] = deque()

    def push(self, frame: list[codec.Buffer]) -> bool:
        """Queue a frame; False while the peer is given a rest after a failure."""
        if self._socket is None and self._loop.time() < self._retry_s:
            return False
        self.outbox.push(frame)
        if self._socket is None:
            self._call()
        elif self._open and not self._watched:
            self._transport.owner.dirty[self] = None
        return True

    def room_wait(self) -> Wait | None:
        if self.outbox.waiting_bytes <= self._transport.limits.queue_bytes:
            return None
        wait = Wait(self._transport.owner.ready)
        self._room.append(wait)
        return wait

    def flush_wait(self) -> Wait | None:
        if not self.outbox.waiting_bytes:
            return None
        wait = Wait(self._transport.owner.ready)
        self._flushed.append((self.outbox.accepted_bytes, wait))
        return wait

    def forgive(self) -> None:
        self._retry_s = 0.0
        self._pause_s = self._transport.settings.backoff_s

    def fail(self, reason: str, why: str = "") -> None:
        """Close, drop what is queued, and leave the peer alone for a while."""
        transport = self._transport
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            reset(self._socket)
            self._socket = None
        self._open = self._watched = False
        self._answer = b""
        self._retry_s = self._loop.time() + self._pause_s
        self._pause_s = min(2 * self._pause_s, transport.settings.backoff_most_s)
        if lost := self.outbox.clear():
            transport.owner.lost(reason, lost)
        if why:
            transport.owner.closed(transport.peer, why)
        self._wake()

    def _call(self) -> None:
        address = self._transport.addresses[self._target]
        self._socket = sock = socket.socket(_family(address[0]), socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self.fail("dead")
            return
        self._timer = self._loop.call_later(self._transport.settings.handshake_s, self._late)
        self._loop.add_writer(sock, self._turn(self._connected))

    def _turn(self, action: Callable[[], None]) -> Callable[[], None]:
        def turn() -> None:
            try:
                action()
            finally:
                self._transport.owner.settle()

        return turn

    def _late(self) -> None:
        self._timer = None
        self.fail("dead", f"peer {self._target} did not answer the greeting in time")
        self._transport.owner.settle()

    def _connected(self) -> None:
        sock = self._socket
        assert sock is not None
        self._loop.remove_writer(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.fail("dead")
            return
        greeting = Greeting(self._transport.peer, self._target, self._transport.digest).pack()
        try:
            # A fresh socket's buffer takes these few bytes whole.
            sock.send(greeting)
        except OSError:
            self.fail("dead")
            return
        self._loop.add_reader(sock, self._turn(self._heard))

    def _heard(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(ANSWER_BYTES - len(self._answer) or 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.fail("dead")
        elif self._open:
            self.fail("dead", f"peer {self._target} spoke on a connection that only listens")
        else:
            self._answer += data
            if len(self._answer) == ANSWER_BYTES:
                self._welcomed()

    def _welcomed(self) -> None:
        try:
            refusal = unpack_answer(self._answer)
        except DecodeError as error:
            refusal = str(error)
        if refusal:
            self.fail("refused", f"peer {self._target} refused the connection: {refusal}")
            return
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        self._open = True
        self._pause_s = self._transport.settings.backoff_s
        self._transport.owner.dirty[self] = None

    def write(self) -> None:
        """Write until the socket is full, the queue empty, or the turn over."""
        sock, outbox = self._socket, self.outbox
        if sock is None or not self._open:
            return
        budget = _TURN_BYTES
        try:
            while outbox.waiting_bytes and budget > 0:
                written = sock.sendmsg(outbox.head())
                outbox.advance(written)
                budget -= written
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.fail("dead")
            return
        if bool(outbox.waiting_bytes) != self._watched:
            self._watched = not self._watched
            if self._watched:
                self._loop.add_writer(sock, self._turn(self.write))
            else:
                self._loop.remove_writer(sock)
        self._wake()

    def _wake(self) -> None:
        outbox, limit = self.outbox, self._transport.limits.queue_bytes
        while self._room and outbox.waiting_bytes <= limit:
            self._room.popleft().resolve(None)
        while self._flushed and self._flushed[0][0] <= outbox.gone_bytes:
            self._flushed.popleft()[1].resolve(None)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reset(sock: socket.socket) -> None:
    """Close without lingering: what is in the buffers is dropped, and the other side is told."""
    with suppress(OSError):  # Not connected yet: an ordinary close does the same.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
