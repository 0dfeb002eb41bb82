"""The lines of one peer: to relays, through them, left with others, and opened from both sides.

A peer that reserved somewhere cannot be called. So it keeps a connection to its relay, on which the
relay rings; and it leaves a line with everybody whom it calls, for the answers. Where a line leads,
the transport dials a port of this machine (`Transport.detours`), behind which the line begins.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shoal.base.errors import HandshakeError
from shoal.engine.live import introduction
from shoal.engine.live.control import Address
from shoal.engine.live.datagrams import Passage
from shoal.engine.live.introduction import ANSWER, CALL, ERRORS, LINE, RESERVE, Called, Ring
from shoal.engine.live.line import DETOUR_BYTES, PIECE_BYTES, Line, Pipe, piped, tuned
from shoal.engine.live.punch import Punch
from shoal.engine.live.switchboard import Switchboard
from shoal.kernel.paths import RelayLimits
from shoal.kernel.waits import Wait

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

_AGAIN_S = 0.2
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_LEAVES = 3
_MOST_RINGS = 64
_MOST_BEGUN = 256
# Of one peer: the one in use, and some that have not ended yet.
_MOST_OF_ONE = 8


class Lines:
    """What a transport reaches otherwise than by calling an address."""

    def __init__(self, transport: Transport) -> None:
        self.board: Switchboard | None = None
        """how this peer serves others as a relay, if it does"""
        self._transport = transport
        self._lines: dict[int, Line] = {}
        self._relays: dict[int, int] = {}
        self._reserved: set[int] = set()
        self._left: set[int] = set()
        self._opening: dict[int, asyncio.Task[Line | None]] = {}
        self._doors: dict[int, socket.socket] = {}
        self._servers: dict[int, asyncio.Server] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._served: dict[int, int] = {}
        self._rings = 0
        self._begun = 0

    def close(self) -> None:
        """End everything: a crash, or the end of the run."""
        for task in (*self._tasks, *self._opening.values()):
            task.cancel()
        for line in self._lines.values():
            line.close()
        for server in self._servers.values():
            server.close()
        for door in self._doors.values():
            door.close()
        if self.board is not None:
            self.board.close()
            self.board = None
        for known in (self._lines, self._relays, self._opening, self._doors, self._servers):
            known.clear()
        self._reserved.clear()
        self._left.clear()
        self._transport.detours.clear()

    async def ended(self) -> None:
        """After `close`: nothing of it is left in the loop."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Connections that were cut are closed in the next turns.
        for _ in range(3):
            await asyncio.sleep(0)

    # What a program asks for.

    def serve(self, limits: RelayLimits) -> None:
        self.board = Switchboard(self._transport.loop, limits, self._transport.settings.handshake_s)

    def reserve(self, relay: int) -> Wait:
        wait = Wait(self._transport.owner.ready)
        self._start(self._stay(relay, wait))
        return wait

    def through(self, to: int, relay: int) -> None:
        self._relays[to] = relay
        self._detour(to)

    def direct(self, to: int) -> bool:
        line = self._lines.get(to)
        return line is not None and line.alive and line.direct

    def punch(self, to: int, port: int, place: Address, passage: Passage | None = None) -> Wait:
        """passage: of the datagrams of this port, if a connection may go over them."""
        wait = Wait(self._transport.owner.ready)
        punch = Punch(self._transport, to, port, wait, passage)
        # Only a connection over this passage takes it.
        taken = passage is None and "quic" in self._transport.settings.carriers
        self._start(self._punched(punch, place, taken and self.direct(to)))
        return wait

    def called(self, to: int) -> None:
        """The transport is about to call this peer: it must be able to answer."""
        if self._reserved and to not in self._transport.detours and to not in self._left:
            self._left.add(to)
            self._start(self._leave(to))

    # Callers, from the listener.

    def take(self, connection: socket.socket, begun: bytes) -> None:
        """A connection that begins as a line does; these bytes of it were read already."""
        if self._begun >= _MOST_BEGUN:
            connection.close()
            return
        self._begun += 1
        self._start(self._hear(connection, begun))

    async def _hear(self, connection: socket.socket, begun: bytes) -> None:
        pipe = await piped(tuned(connection))
        try:
            try:
                async with asyncio.timeout(self._transport.settings.handshake_s):
                    called = await introduction.called(self._transport, pipe, begun)
            finally:
                self._begun -= 1
            await self._decide(called)
        except ERRORS as error:
            self._transport.owner.closed(self._transport.peer, f"refused a line: {error}")
            pipe[1].transport.abort()
        except BaseException:
            pipe[1].transport.abort()
            raise

    async def _decide(self, called: Called) -> None:
        what, source, board = called.intro.what, called.intro.source, self.board
        if what == LINE:
            served = self._served.get(source, 0)
            await called.answer(served < _MOST_OF_ONE)
            if served >= _MOST_OF_ONE:
                raise HandshakeError("refused", f"peer {source} has {served} lines here")
            self._served[source] = served + 1
            try:
                await self._run(source, Line(called.pipe, source, True, self._inlet))
            finally:
                self._served[source] -= 1
        elif board is None:
            raise HandshakeError("refused", f"peer {source} wants {what!r} of who is no relay")
        elif what == RESERVE:
            if not board.has_room(source):
                await called.answer(False)
                raise HandshakeError("refused", f"no room for a reservation of peer {source}")
            # Known before it is told so: it may be called at once.
            guest = board.enter(source, called.pipe)
            self._detour(source)
            await called.answer(True)
            await board.stay(guest)
        elif what == CALL:
            pipe = await board.ring(source, called.intro.about)
            await called.answer(pipe is not None)
            if pipe is None:
                raise HandshakeError("refused", f"no call to peer {called.intro.about}")
            await board.connect((source, called.intro.about), called.pipe, pipe)
        elif what == ANSWER:
            if not board.answered(source, called.intro.about, called.pipe):
                raise HandshakeError("refused", f"peer {source} answers no call")
            await called.answer(True)

    # Lines.

    async def _run(self, to: int, line: Line) -> None:
        """Use the line until it ends, unless there is a better one: then only serve it."""
        earlier = self._lines.get(to)
        if earlier is not None and not earlier.gives_way(line):
            line.retire()
            await line.run()
            return
        self._lines[to] = line
        self._detour(to)
        if earlier is not None:
            earlier.retire()
        try:
            await line.run()
        finally:
            line.close()
            if self._lines.get(to) is line:
                del self._lines[to]
                if to not in self._relays and not (self.board and self.board.has(to)):
                    self._undetour(to)

    def _detour(self, to: int) -> None:
        """Have the transport dial this machine instead of the peer, and call anew."""
        transport = self._transport
        if to not in self._doors:
            door = self._doors[to] = socket.create_server(("127.0.0.1", 0), backlog=64)
            # For the connections that are accepted.
            door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DETOUR_BYTES)
            transport.detours[to] = door.getsockname()[:2]
            self._start(self._attend(to, door))
        transport.rerouted(to)

    def _undetour(self, to: int) -> None:
        """No line leads there any more, and none can be opened: dial the peer itself."""
        self._transport.detours.pop(to, None)
        if (server := self._servers.pop(to, None)) is not None:
            server.close()
        if (door := self._doors.pop(to, None)) is not None:
            door.close()

    async def _attend(self, to: int, door: socket.socket) -> None:
        async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                line = await self._line_to(to)
            except asyncio.CancelledError:
                writer.transport.abort()
                return
            if line is None:
                writer.transport.abort()
            else:
                line.carry(reader, writer)

        self._servers[to] = await asyncio.start_server(enter, sock=door, limit=DETOUR_BYTES)

    async def _line_to(self, to: int) -> Line | None:
        line = self._lines.get(to)
        if line is not None and line.alive:
            return line
        opening = self._opening.get(to)
        if opening is None:
            opening = self._opening[to] = self._transport.loop.create_task(self._open(to))
            opening.add_done_callback(lambda _: self._opening.pop(to, None))
        return await asyncio.shield(opening)

    async def _open(self, to: int) -> Line | None:
        """A line through a relay, or to who has a reservation here."""
        board, relay = self.board, self._relays.get(to)
        try:
            async with asyncio.timeout(2 * self._transport.settings.handshake_s):
                if board is not None and board.has(to):
                    pipe = await board.ring(self._transport.peer, to)
                    if pipe is None:
                        return None
                    line = Line(pipe, self._transport.peer, True, self._inlet)
                elif relay is not None:
                    pipe = await self._call(relay, CALL, to)
                    await self._introduced(pipe, to)
                    line = Line(pipe, self._transport.peer, False, self._inlet)
                else:
                    return None
        except ERRORS as error:
            self._transport.owner.closed(self._transport.peer, f"has no line to peer {to}: {error}")
            return None
        self._start(self._run(to, line))
        await asyncio.sleep(0)  # It is known before its first stream.
        return line

    async def _introduced(self, pipe: Pipe, to: int) -> None:
        """The caller's introduction at the other end of a relay, or of a connection just opened."""
        try:
            await introduction.call(self._transport, pipe, to, LINE)
        except BaseException:
            pipe[1].transport.abort()
            raise

    async def _call(self, to: int, what: str, about: int = 0) -> Pipe:
        """A connection to a peer that can be called, introduced."""
        host, port = self._transport.book[to]
        reader, writer = await asyncio.open_connection(host, port, limit=PIECE_BYTES)
        tuned(writer.get_extra_info("socket"))
        try:
            await introduction.call(self._transport, (reader, writer), to, what, about)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    async def _inlet(self) -> Pipe:
        """A connection to this peer's own transport, as a caller's would be."""
        host, port = self._transport.listening
        return await asyncio.open_connection(host, port, limit=PIECE_BYTES)

    # As one that cannot be called.

    async def _stay(self, relay: int, wait: Wait) -> None:
        """Hold a reservation, and answer the calls that come over it."""
        pause_s, held = _AGAIN_S, False
        while True:
            try:
                async with asyncio.timeout(self._transport.settings.handshake_s):
                    pipe = await self._call(relay, RESERVE)
            except ERRORS as error:
                if wait.done and not held:
                    return
                if not held:
                    self._transport.owner.closed(
                        self._transport.peer, f"got no reservation at peer {relay}: {error}"
                    )
            else:
                pause_s, held = _PAUSE_S, True
                self._reserved.add(relay)
                self._resolve(wait)
                await self._listen(relay, pipe)
                self._reserved.discard(relay)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _listen(self, relay: int, pipe: Pipe) -> None:
        try:
            while True:
                ring = await introduction.hear(pipe)
                if isinstance(ring, Ring) and self._rings < _MOST_RINGS:
                    self._rings += 1
                    self._start(self._answer(relay, ring))
        except ERRORS:
            return
        finally:
            pipe[1].transport.abort()

    async def _answer(self, relay: int, ring: Ring) -> None:
        pipe: Pipe | None = None
        try:
            async with asyncio.timeout(self._transport.settings.handshake_s):
                pipe = await self._call(relay, ANSWER, ring.call)
                if ring.caller != relay:
                    called = await introduction.called(self._transport, pipe)
                    if called.intro.what != LINE or called.intro.source != ring.caller:
                        raise HandshakeError("peer", f"peer {ring.caller} rang, another came")
                    await called.answer(True)
                    # It has no address either, as far as is known.
                    self._relays.setdefault(ring.caller, relay)
        except ERRORS as error:
            self._transport.owner.closed(
                self._transport.peer, f"did not answer a call through peer {relay}: {error}"
            )
            if pipe is not None:
                pipe[1].transport.abort()
            return
        finally:
            self._rings -= 1
        if ring.caller == relay:
            # It can be called itself; the line is for what it has to say.
            await Line(pipe, relay, True, self._inlet).run()
        else:
            await self._run(ring.caller, Line(pipe, ring.caller, False, self._inlet))

    async def _leave(self, to: int) -> None:
        """Leave a line with a peer that can be called, so that it can answer."""
        try:
            for _ in range(_LEAVES):
                with suppress(*ERRORS):
                    async with asyncio.timeout(self._transport.settings.handshake_s):
                        pipe = await self._call(to, LINE)
                    await Line(pipe, self._transport.peer, True, self._inlet).run()
                await asyncio.sleep(_PAUSE_S)
        finally:
            self._left.discard(to)

    async def _punched(self, punch: Punch, place: Address, stands: bool) -> None:
        if stands:
            self._resolve(punch.wait)
            return
        pipe = await punch.run(place)
        if pipe is not None:
            opener = min(self._transport.peer, punch.to)
            self._start(self._run(punch.to, Line(pipe, opener, True, self._inlet)))
            await asyncio.sleep(0)
            self._resolve(punch.wait)

    # Both.

    def _resolve(self, wait: Wait) -> None:
        wait.resolve(True)
        self._transport.owner.settle()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._transport.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
