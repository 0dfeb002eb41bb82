"""The receiving end of a connection: a greeting, then frames."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from shoal.base.errors import DecodeError, MessageTooLarge
from shoal.engine.live.outgoing import reset
from shoal.wire import codec
from shoal.wire.frame import GREETING_BYTES, FrameReader, Greeting, pack_answer

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport


class Incoming:
    """A connection that somebody opened to this peer: a greeting, then frames."""

    def __init__(self, transport: Transport, connection: socket.socket) -> None:
        self.source = -1
        self._transport = transport
        self._loop = transport.loop
        self._socket: socket.socket | None = connection
        self._greeting = b""
        self._reader = FrameReader(transport.limits)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timer = self._loop.call_later(transport.settings.handshake_s, self._late)
        self._loop.add_reader(connection, self._readable)

    def close(self, abrupt: bool = False) -> None:
        if self._socket is None:
            return
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        if abrupt:
            reset(self._socket)
        else:
            self._socket.close()
        self._socket = None
        transport = self._transport
        transport.strangers.discard(self)
        if transport.incoming.get(self.source) is self:
            del transport.incoming[self.source]

    def _late(self) -> None:
        self._refuse("no greeting in time")

    def _readable(self) -> None:
        try:
            if self.source < 0:
                self._greet()
            else:
                self._receive()
        finally:
            self._transport.owner.settle()

    def _greet(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(GREETING_BYTES - len(self._greeting))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._transport.owner.lost("greeting", 1)
            self.close()
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

    def _objection(self, greeting: Greeting) -> str:
        transport = self._transport
        if greeting.digest != transport.digest:
            return "another run, or other declared messages"
        if greeting.target != transport.peer:
            return f"this is peer {transport.peer}, not {greeting.target}"
        if greeting.source not in transport.addresses or greeting.source == transport.peer:
            return f"no peer {greeting.source} here"
        return ""

    def _refuse(self, why: str) -> None:
        transport = self._transport
        transport.owner.lost("greeting", 1)
        transport.owner.closed(transport.peer, f"refused a connection: {why}")
        if self._socket is not None:
            with suppress(OSError):  # The caller may be gone; then there is nobody to tell.
                self._socket.send(pack_answer(why))
        self.close()

    def _welcome(self, source: int) -> None:
        transport = self._transport
        assert self._socket is not None
        try:
            self._socket.send(pack_answer())
        except OSError:
            self.close()
            return
        self._timer.cancel()
        transport.strangers.discard(self)
        earlier = transport.incoming.get(source)
        if earlier is not None:
            # A peer calls again only when it holds its old connection for dead.
            earlier.close()
        self.source = source
        transport.incoming[source] = self
        transport.seen(source)

    def _receive(self) -> None:
        transport, reader = self._transport, self._reader
        assert self._socket is not None
        try:
            count = self._socket.recv_into(reader.space(transport.scratch))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            if reader.partial:
                transport.owner.lost("cut", 1)
            self.close()
            return
        owner, peer, limits = transport.owner, transport.peer, transport.limits
        try:
            for frame in reader.received(count, transport.scratch):
                message, request = codec.decode(frame, limits)
                owner.arrived(peer, self.source, message, request, len(frame))
                if self._socket is None:
                    return  # What arrived made this peer crash or close.
        except (DecodeError, MessageTooLarge) as error:
            owner.lost("too large" if isinstance(error, MessageTooLarge) else "malformed", 1)
            owner.closed(peer, f"closed the connection of peer {self.source}: {error}")
            self.close(abrupt=True)
