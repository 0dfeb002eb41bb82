"""The receiving end of connections: a greeting, then frames, in fair turns."""

from __future__ import annotations

import socket
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

from shoal.base.errors import DecodeError, HandshakeError, MessageTooLarge
from shoal.engine.live.calling import reset
from shoal.engine.live.introduction import MAGIC
from shoal.wire import codec
from shoal.wire.frame import GREETING_BYTES, Greeting, pack_answer
from shoal.wire.handshake import Handshake
from shoal.wire.inflow import Inflow, Receiver
from shoal.wire.session import Session, feed, memory

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

# One turn's longest: a peer that floods this one makes the others wait so long, and not longer.
_TURN_S = 0.0002
# Reads of one turn while chunks come: bytes that are only put in their place, for nobody to handle.
_READS = 4
_STALL_BYTES_PER_S = 1024


class Inlet:
    """What one caller's incarnation sends to this peer, over all of its connections."""

    def __init__(self, transport: Transport, source: int, life: int) -> None:
        self.life = life
        self.flow = Inflow(transport.limits)
        self.lanes: dict[int, Incoming] = {}
        self._transport = transport
        self._source = source
        self._alone_s = 0.0

    def close(self) -> None:
        """Drop every connection, and what is partly here."""
        for incoming in list(self.lanes.values()):
            incoming.close(abrupt=True)
        self.flow.clear()

    def left(self, lane: int) -> None:
        """A connection is closed; the caller has some time to call again."""
        del self.lanes[lane]
        self._alone_s = self._transport.pool.attention.now_s

    def sweep(self, now_s: float) -> bool:
        """Cut off who is silent or too slow; True when there is nothing left to look after."""
        for incoming in list(self.lanes.values()):
            incoming.sweep(now_s, self.flow.partial > 0)
        if self.lanes or now_s - self._alone_s < self._transport.settings.handshake_s:
            return False
        if lost := self.flow.clear():
            self._transport.owner.lost("cut", lost)
        return True


class Incoming:
    """A connection that somebody opened to this peer: a greeting, then frames."""

    def __init__(self, transport: Transport, connection: socket.socket, host: str) -> None:
        self.source = -1
        self.host = host
        self.used_s = 0.0
        self._pool = transport.pool
        self._pool.took()
        self._transport = transport
        self._loop = transport.loop
        self._socket: socket.socket | None = connection
        self._greeting = b""
        self._begun = False
        self._handshake = transport.handshake()
        self._session: Session | None = None
        self._sealed = bytearray()
        self._receiver = Receiver(transport.limits)
        self._inlet: Inlet | None = None
        self._lane = 0
        self._came_bytes = 0
        self._mark_bytes = 0
        self._heard_bytes = 0
        self._spent_bytes = 0
        self._began_s = self._mark_s = self._heard_s = self._pool.attention.now_s
        self._watched = False
        self._heavy = False
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = self._loop.call_later(transport.settings.handshake_s, self._late)
        self._loop.add_reader(connection.fileno(), self._readable)

    def close(self, abrupt: bool = False) -> None:
        if self._socket is None:
            return
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        if abrupt:
            reset(self._socket)
        else:
            self._socket.close()
        self._socket = None
        self._pool.gave()
        self._pool.forget(self)
        self._transport.strangers.discard(self)
        self._receiver.leave()
        if self._inlet is not None:
            self._inlet.left(self._lane)

    def _was_used(self) -> bool:
        """Whether anything but heartbeats came since the last time somebody asked."""
        earlier, self._spent_bytes = self._spent_bytes, self._receiver.spent
        return earlier != self._spent_bytes

    def retire(self) -> bool:
        """Ask the caller to close it, which it does unless it needs it."""
        if self._inlet is None or self._was_used():
            return False
        self._receiver.leave_please()
        self._write()
        return True

    # Greeting.

    def _late(self) -> None:
        left_s = self._began_s + self._transport.settings.handshake_s
        left_s -= self._pool.attention.now_s
        if left_s > 0:
            # This process was behind, so the caller may have spoken in time.
            self._timer = self._loop.call_later(left_s, self._late)
            return
        if self.source < 0:
            self._refuse("no greeting in time", None if self._handshake is None else b"")
        else:
            self._cut_off("said no hello in time")

    def _readable(self) -> None:
        if self._heavy:
            self._pool.turns.join(self)
        else:
            self.go_on()

    def go_on(self) -> None:
        """One turn: of the greeting, or of frames for a bounded time."""
        if self._socket is None:
            return
        try:
            if self.source < 0:
                self._greet()
            else:
                self._receive()
        finally:
            self._transport.owner.settle()

    def _greet(self) -> None:
        assert self._socket is not None
        handshake = self._handshake
        missing = GREETING_BYTES - len(self._greeting) if handshake is None else handshake.missing
        try:
            data = self._socket.recv(missing)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._transport.owner.lost("greeting", 1)
            self.close()
            return
        if not self._begun and data.startswith(MAGIC):
            self._divert(data)
            return
        self._begun = True
        if handshake is not None:
            self._shake(handshake, data)
            return
        self._greeting += data
        if len(self._greeting) < GREETING_BYTES:
            return
        try:
            greeting = Greeting.unpack(self._greeting)
        except DecodeError as error:
            self._refuse(str(error))
            return
        if refusal := self._objection(greeting):
            self._refuse(refusal)
        else:
            self._welcome(greeting.source)

    def _divert(self, data: bytes) -> None:
        """This caller wants no session, but a line."""
        connection, self._socket = self._socket, None
        assert connection is not None
        self._timer.cancel()
        self._loop.remove_reader(connection.fileno())
        self._pool.gave()
        self._pool.forget(self)
        self._transport.strangers.discard(self)
        self._receiver.leave()
        self._transport.lines.take(connection, data)

    def _shake(self, handshake: Handshake, data: bytes) -> None:
        transport = self._transport
        assert self._socket is not None
        try:
            reply = handshake.receive(data)
            remote = handshake.remote
            if remote is not None and (
                remote.source not in transport.addresses or remote.source == transport.peer
            ):
                raise HandshakeError("peer", f"no peer {remote.source} here")
        except HandshakeError as error:
            if error.reason == "clear":
                told = pack_answer("this peer encrypts and you do not")
            else:
                told = handshake.refusal(error) if error.reason != "refused" else b""
            self._refuse(str(error), told)
            return
        if reply:
            try:
                self._socket.send(reply)
            except OSError:
                self.close()
                return
        if remote is not None:
            self._session = handshake.session
            self.source = remote.source
            transport.seen(remote.source)

    def _objection(self, greeting: Greeting) -> str:
        transport = self._transport
        if greeting.digest != transport.digest:
            return "another run, or other declared messages"
        if greeting.target != transport.peer:
            return f"this is peer {transport.peer}, not {greeting.target}"
        if greeting.source not in transport.addresses or greeting.source == transport.peer:
            return f"no peer {greeting.source} here"
        return ""

    def _refuse(self, why: str, told: bytes | None = None) -> None:
        transport = self._transport
        transport.owner.lost("greeting", 1)
        transport.owner.closed(transport.peer, f"refused a connection: {why}")
        if self._socket is not None:
            with suppress(OSError):  # The caller may be gone; then there is nobody to tell.
                self._socket.send(pack_answer(why) if told is None else told)
                # Closing with bytes unread would throw away the answer as well.
                self._socket.recv(1 << 12)
        self.close()

    def _welcome(self, source: int) -> None:
        assert self._socket is not None
        try:
            self._socket.send(pack_answer())
        except OSError:
            self.close()
            return
        self.source = source
        self._transport.seen(source)

    def _join(self) -> None:
        """The caller said which incarnation it is, and which of its connections this is."""
        transport, hello = self._transport, self._receiver.hello
        assert hello is not None
        lane, life = hello.number, hello.total
        if not lane < hello.part <= 64:
            raise DecodeError(f"hello: connection {lane} of {hello.part}")
        self._timer.cancel()
        transport.strangers.discard(self)
        inlet = transport.incoming.get(self.source)
        if inlet is None or inlet.life != life:
            if inlet is not None:
                inlet.close()
            inlet = transport.incoming[self.source] = Inlet(transport, self.source, life)
        elif (earlier := inlet.lanes.get(lane)) is not None:
            # A peer calls again only when it holds its old connection for dead.
            earlier.close()
        inlet.lanes[lane] = self
        self._inlet, self._lane = inlet, lane
        self._receiver.join(inlet.flow, transport.life)
        self._pool.touch(self)

    # Frames.

    def _receive(self) -> None:
        """What was left of the last turn, then what is here."""
        cutter, end_s = self._receiver.cutter, perf_counter() + _TURN_S
        held, reads = self._heavy and self._held, 0
        self._heavy = False
        try:
            while held or self._read():
                rest, held = held, False
                if not self._take(end_s):
                    break
                if rest:
                    continue  # The rest of a flood: more is here, and belongs to this turn.
                if cutter.inside is None:
                    break  # Most likely that was all: no need to ask.
                reads += 1
                if reads == _READS:
                    self._pause()
                    break
        except (DecodeError, MessageTooLarge) as error:
            transport = self._transport
            too_large = isinstance(error, MessageTooLarge)
            transport.owner.lost("too large" if too_large else "malformed", 1)
            self._cut_off(str(error))
            return
        if self._receiver.unsent or self._sealed:
            self._write()

    @property
    def _held(self) -> bool:
        """Whether there may be a frame in what was read already."""
        session = self._session
        return self._receiver.cutter.fed or (session is not None and session.partial)

    def _cut_off(self, why: str) -> None:
        """Close what this caller sends, and tell why; nothing of it goes on later."""
        transport = self._transport
        transport.owner.closed(
            transport.peer, f"closed the connection of peer {self.source}: {why}"
        )
        if self._inlet is not None:
            self._inlet.close()
        self.close(abrupt=True)

    def _read(self) -> bool:
        """Bytes from the connection to where they are taken apart; False when there are none."""
        transport, cutter, session = self._transport, self._receiver.cutter, self._session
        received, _ = memory()
        assert self._socket is not None
        try:
            if session is not None:
                count = self._socket.recv_into(session.space(received))
            else:
                count = self._socket.recvmsg_into(cutter.space(transport.scratch))[0]
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            count = 0
        if not count:
            if cutter.partial and cutter.inside is None:
                transport.owner.lost("cut", 1)
            self.close()
            return False
        self._came_bytes += count
        if session is not None:
            session.came(count, received)
        else:
            cutter.received(count, transport.scratch)
        return True

    def _take(self, end_s: float) -> bool:
        """Hand on what is complete; False when the turn is over or the connection closed."""
        receiver, transport, session = self._receiver, self._transport, self._session
        owner, peer, limits = transport.owner, transport.peer, transport.limits
        cutter, plain = receiver.cutter, memory()[1]
        while True:
            frame = receiver.next()
            if frame is None:
                if session is not None and feed(session, cutter, plain):
                    continue
                if receiver.hello is not None and self._inlet is None:
                    self._join()
                elif receiver.bye:
                    self._part()
                    return False
                return True
            message, request = codec.decode(frame, limits, cutter.prefix)
            owner.arrived(peer, self.source, message, request, len(frame))
            if self._socket is None:
                return False  # What arrived made this peer crash or close.
            if perf_counter() > end_s:
                self._pause()
                return False

    def _part(self) -> None:
        """The caller said its last word; without other connections there is nothing to keep."""
        self.close()
        inlet, incoming = self._inlet, self._transport.incoming
        if inlet is not None and not inlet.lanes and not inlet.flow.partial:
            incoming.pop(self.source, None)

    def _pause(self) -> None:
        """The turn is used up: the others come first, and then those who wait in line."""
        self._heavy = True
        self._receiver.cutter.hold()
        if self._session is not None:
            self._session.hold()
        if self._held or self._receiver.cutter.inside is not None:
            self._pool.turns.join(self)

    def _write(self) -> None:
        """Answers: credit, receipts, pongs."""
        unsent, sock = self._receiver.unsent, self._socket
        if sock is None:
            return
        if unsent or self._sealed:
            if self._session is not None and not self._sealed:
                # Short: credit, receipts and pongs.
                sealed, taken = self._session.seal((bytes(unsent),), memory()[0])
                del unsent[:taken]
                self._sealed += sealed
            out = unsent if self._session is None else self._sealed
            try:
                del out[: sock.send(out)]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.close()
                return
        if bool(unsent or self._sealed) != self._watched:
            self._watched = not self._watched
            if self._watched:
                self._loop.add_writer(sock.fileno(), self._write)
            else:
                self._loop.remove_writer(sock.fileno())

    def sweep(self, now_s: float, partial: bool) -> None:
        """Cut off a caller that is silent, or that does not go on with what it began."""
        settings, receiver = self._transport.settings, self._receiver
        if self._was_used():
            self._pool.touch(self)
        # Heartbeats are a sign of life, and no progress.
        progress = self._came_bytes - 32 * receiver.heard_pings
        if self._came_bytes != self._heard_bytes:
            self._heard_bytes, self._heard_s = self._came_bytes, now_s
        elif now_s - self._heard_s > settings.dead_after_s:
            self._cut_off(f"silent for {settings.dead_after_s} s")
            return
        # What waits in line here is not the caller's fault.
        begun = (partial or receiver.cutter.partial) and not self._pool.turns.waits(self)
        if not begun or progress - self._mark_bytes >= _STALL_BYTES_PER_S * settings.stall_s:
            self._mark_bytes, self._mark_s = progress, now_s
        elif now_s - self._mark_s > settings.stall_s:
            self._transport.owner.lost("too slow", 1)
            self._cut_off(f"less than {_STALL_BYTES_PER_S} B/s of what it began to send")
