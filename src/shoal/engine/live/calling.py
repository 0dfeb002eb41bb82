"""One connection that this peer opened: calls, greets, writes what its lane hands out.

Writes gather the buffers of many frames without joining them, so a tensor goes from its own memory
to the operating system's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from shoal.base.errors import HandshakeError, WireError
from shoal.engine.live.line import DETOUR_BYTES
from shoal.wire.frame import ANSWER_BYTES, Greeting, unpack_answer
from shoal.wire.handshake import Handshake
from shoal.wire.outflow import Lane
from shoal.wire.session import SCRATCH_BYTES, Session, feed, memory

if TYPE_CHECKING:
    from shoal.engine.live.outgoing import Outgoing

# What one turn of the loop may write to one connection, so that the others get their turns.
_TURN_BYTES = 1 << 22
# What the operating system may keep unsent: a heartbeat waits behind that on a slow link.
_UNSENT_BYTES = 1 << 19
_RESET = struct.pack("ii", 1, 0)
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Call:
    """A connection of `outgoing`, from the first packet to its end; then another one is made."""

    def __init__(self, outgoing: Outgoing, number: int) -> None:
        self.lane = Lane(
            outgoing.flow, number, outgoing.transport.settings.connections, outgoing.life
        )
        self.number = number
        self.heard_s = 0.0
        """on the clock of the process's attention"""
        self._outgoing = outgoing
        self._loop = outgoing.transport.loop
        self._answer = b""
        self._handshake: Handshake | None = None
        self._session: Session | None = None
        self.sealed = memoryview(b"")
        """what is sealed and not written"""
        self._place: memoryview | None = None
        self._welcome = False
        self._watched = False
        self._pings = 0
        self._pinged_s = 0.0
        self._pool = outgoing.transport.pool
        self._began_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._socket: socket.socket | None = None

    def begin(self) -> None:
        """Call as soon as the pool allows; may fail at once."""
        self._pool.call(self)

    def start(self) -> None:
        transport, target = self._outgoing.transport, self._outgoing.target
        address = transport.addresses[target]
        try:
            self._socket = sock = socket.socket(_family(address[0]), socket.SOCK_STREAM)
        except OSError as error:
            if error.errno not in NO_DESCRIPTORS:
                raise
            self._pool.again(self)
            self._pool.exhausted()
            return
        self._pool.took()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        if target in transport.detours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DETOUR_BYTES)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self._outgoing.fail("dead")
            self._settle()
            return
        self._began_s = self._pool.attention.now_s
        self._timer = self._loop.call_later(transport.settings.handshake_s, self._late)
        # By number: the loop would write out a socket in full whenever it is not watched yet.
        self._loop.add_writer(sock.fileno(), self._turn(self._connected))

    def close(self) -> None:
        """Forget the connection; what it had of the flow goes back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.settled(self)
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            reset(self._socket)
            self._socket = None
            self._pool.gave()
            self.lane.drop()

    def postpone(self) -> bool:
        """Give the descriptor back and call later, unless the peer has answered."""
        if self._socket is None or self._welcome or self._answer:
            return False
        self.close()
        self._handshake = None
        self._pool.again(self)
        return True

    def bye(self) -> None:
        """Say the last word: the called peer closes when it has heard it."""
        self.lane.bye()
        self._began_s = self._pool.attention.now_s

    def _turn(self, action: Callable[[], None]) -> Callable[[], None]:
        def turn() -> None:
            try:
                action()
            finally:
                self._settle()

        return turn

    def _settle(self) -> None:
        self._outgoing.transport.owner.settle()

    def _late(self) -> None:
        left_s = self._began_s + self._outgoing.transport.settings.handshake_s
        left_s -= self._pool.attention.now_s
        if left_s > 0:
            # This process was behind, so the peer may have answered in time.
            self._timer = self._loop.call_later(left_s, self._late)
            return
        self._timer = None
        self._outgoing.fail("dead", f"peer {self._outgoing.target} did not answer in time")
        self._settle()

    def _connected(self) -> None:
        sock, outgoing = self._socket, self._outgoing
        assert sock is not None
        self._loop.remove_writer(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            outgoing.fail("dead")
            return
        transport = outgoing.transport
        self._handshake = transport.handshake(outgoing.target)
        if self._handshake is not None:
            greeting = self._handshake.begin()
        else:
            greeting = Greeting(transport.peer, outgoing.target, transport.digest).pack()
        try:
            # A fresh socket's buffer takes these few bytes whole.
            sock.send(greeting)
        except OSError:
            outgoing.fail("dead")
            return
        self._loop.add_reader(sock.fileno(), self._turn(self._readable))

    # Reading.

    def _readable(self) -> None:
        outgoing = self._outgoing
        try:
            if self._welcome:
                count = self._read()
            else:
                count = self._hear_answer()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            outgoing.broken(self)
        elif self._welcome:
            self._hear()

    def _shake(self, handshake: Handshake) -> int:
        assert self._socket is not None
        outgoing = self._outgoing
        data = self._socket.recv(handshake.missing)
        try:
            if data and (reply := handshake.receive(data)):
                self._socket.send(reply)
        except HandshakeError as error:
            if error.reason != "refused":
                with suppress(OSError):  # It may be gone; then there is nobody to tell.
                    self._socket.send(handshake.refusal(error))
            outgoing.fail("refused", f"no session with peer {outgoing.target}: {error}")
            return 1
        if handshake.session is not None:
            self._session, self._handshake = handshake.session, None
            self._welcome = True
            outgoing.transport.owner.dirty[outgoing] = None
        return len(data)

    def _hear_answer(self) -> int:
        if self._handshake is not None:
            return self._shake(self._handshake)
        assert self._socket is not None
        data = self._socket.recv(ANSWER_BYTES - len(self._answer))
        self._answer += data
        if len(self._answer) == ANSWER_BYTES:
            try:
                refusal = unpack_answer(self._answer)
            except WireError as error:
                refusal = str(error)
            if refusal:
                outgoing = self._outgoing
                outgoing.fail(
                    "refused", f"peer {outgoing.target} refused the connection: {refusal}"
                )
                return 1
            self._welcome = True
            self._outgoing.transport.owner.dirty[self._outgoing] = None
        return len(data)

    def _read(self) -> int:
        """Bytes from the connection into the lane's cutter; 0 at its end."""
        assert self._socket is not None
        if self._session is not None:
            received, _ = memory()
            count = self._socket.recv_into(self._session.space(received))
            self._session.came(count, received)
            return count
        scratch = self._outgoing.transport.scratch
        count = self._socket.recvmsg_into(self.lane.cutter.space(scratch))[0]
        self.lane.cutter.received(count, scratch)
        return count

    def _hear(self) -> None:
        lane, outgoing = self.lane, self._outgoing
        was_ready, was_answered = lane.ready, lane.pong
        self.heard_s = self._pool.attention.now_s
        try:
            lane.heard()
            while self._session is not None and feed(self._session, lane.cutter, memory()[1]):
                lane.heard()
        except WireError as error:
            outgoing.fail("dead", f"closed the connection to peer {outgoing.target}: {error}")
            return
        if lane.ready and not was_ready:
            assert self._timer is not None
            self._timer.cancel()
            self._timer = None
            self._pool.settled(self)
            outgoing.opened()
            self._pinged_s = self._loop.time()
        if lane.pong > was_answered and lane.pong == self._pings:
            outgoing.transport.owner.round_trip(self._loop.time() - self._pinged_s)
        outgoing.heard()
        if lane.unwanted:
            lane.unwanted = False
            outgoing.retire()

    # Heartbeats.

    def beat(self, now_s: float) -> str:
        """Ping when it is time; why the connection is given up, or nothing."""
        settings = self._outgoing.transport.settings
        if not self.lane.ready or self.lane.closing:
            return ""
        if self._pool.attention.now_s - self.heard_s > settings.dead_after_s:
            return f"heard nothing for {settings.dead_after_s} s"
        if now_s - self._pinged_s >= settings.heartbeat_s:
            self._ping(now_s)
        return ""

    def _ping(self, now_s: float) -> None:
        if self.lane.pong == self._pings or not self._pings:
            # One at a time: a busy peer is not asked again before it has answered.
            self._pings += 1
            self._pinged_s = now_s
            self.lane.ping(self._pings)
            self._outgoing.transport.owner.dirty[self._outgoing] = None

    # Writing.

    def write(self) -> None:
        """Write until the socket is full, the lane empty, or the turn over."""
        sock, lane = self._socket, self.lane
        if sock is None or not self._welcome:
            return
        budget = _TURN_BYTES
        wants = len(self.sealed) > 0 or lane.wants
        try:
            while wants and budget > 0:
                if self._session is not None:
                    budget -= self._write_sealed(sock, self._session)
                    if self.sealed:
                        break  # The socket is full.
                else:
                    written = sock.sendmsg(lane.head())
                    lane.advance(written)
                    budget -= written
                wants = lane.wants
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._outgoing.broken(self)
            return
        if wants != self._watched:
            self._watched = wants
            if wants:
                self._loop.add_writer(sock.fileno(), self._turn(self._writable))
            else:
                self._loop.remove_writer(sock.fileno())
                self._place = None

    def _write_sealed(self, sock: socket.socket, session: Session) -> int:
        """Write the rest of what was sealed, or else seal and write more; how many bytes went."""
        if self.sealed:
            written = sock.send(self.sealed)
            self.sealed = self.sealed[written:]
            return written
        place = memory()[0] if self._place is None else self._place
        sealed, taken = session.seal(self.lane.head(), place)
        # Sealed is as good as written: these bytes come next, whatever the lane gets meanwhile.
        self.lane.advance(taken)
        try:
            written = sock.send(sealed)
        except (BlockingIOError, InterruptedError):
            written = 0
        if written < len(sealed):
            self.sealed = sealed[written:]
            if self._place is None:
                # That memory is shared; whoever fills the socket gets its own until all is out.
                self.sealed = memoryview(bytes(self.sealed))
                self._place = memoryview(bytearray(SCRATCH_BYTES))
        return written

    def _writable(self) -> None:
        self._outgoing.write(self)

    @property
    def overdue(self) -> bool:
        """Whether the called peer should have closed by now."""
        waited_s = self._pool.attention.now_s - self._began_s
        return self.lane.closing and waited_s > self._outgoing.transport.settings.dead_after_s

    @property
    def idle(self) -> bool:
        """Whether nothing wakes it when something is to be written."""
        return self._welcome and not self._watched


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reset(sock: socket.socket) -> None:
    """Close without lingering: what is in the buffers is dropped, and the other side is told."""
    with suppress(OSError):  # Not connected yet: an ordinary close does the same.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
