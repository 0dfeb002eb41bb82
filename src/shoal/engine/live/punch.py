"""A connection that both sides open at once, so that it passes the boxes of both.

Each side dials from the port that the other one was told, and listens there too (Ford, Srisuresh
and Kegel 2005, section 4): whichever way a connection comes up, one of them is taken by both.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from shoal.engine.live import introduction
from shoal.engine.live.control import Address
from shoal.engine.live.datagrams import Passage
from shoal.engine.live.introduction import ERRORS, LINE
from shoal.engine.live.line import Pipe, piped, shared, tuned
from shoal.kernel.waits import Wait

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

_AGAIN_S = 0.2
_LOOK_S = 0.005


def _dropped(connection: socket.socket | Pipe) -> None:
    if isinstance(connection, tuple):
        connection[1].transport.abort()
    else:
        connection.close()


class Punch:
    """One attempt to reach `to` from a port; it ends when the wait does.

    passage: for a connection over the datagrams of this port, beside those of TCP (`settings`).
    """

    def __init__(
        self, transport: Transport, to: int, port: int, wait: Wait, passage: Passage | None
    ) -> None:
        self.to = to
        self.wait = wait
        self._transport = transport
        self._port = port
        self._passage = passage
        self._carrier: asyncio.Transport | None = None
        self._found: list[socket.socket | Pipe] = []
        self._tries: set[asyncio.Task[None]] = set()
        self._saying_yes = False
        self._agreed: Pipe | None = None

    async def run(self, place: Address) -> Pipe | None:
        """The connection, introduced; None when the time is over."""
        loop, dialling = self._transport.loop, list[asyncio.Task[None]]()
        if "tcp" in self._transport.settings.carriers:
            dialling += [loop.create_task(self._dial(place)), loop.create_task(self._listen())]
        if self._passage is not None:
            dialling.append(loop.create_task(self._pass(self._passage)))
        try:
            while not self.wait.done and self._agreed is None:
                # One that leads nowhere must not keep this from another that does.
                while self._found:
                    task = loop.create_task(self._try(self._found.pop()))
                    self._tries.add(task)
                    task.add_done_callback(self._tries.discard)
                await asyncio.sleep(_LOOK_S)
            return self._agreed
        finally:
            tasks = [*dialling, *self._tries]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for connection in self._found:
                _dropped(connection)
            if self._carrier is not None and (
                self._agreed is None or self._agreed[1].transport is not self._carrier
            ):
                self._carrier.abort()
            elif self._carrier is None and self._passage is not None:
                self._passage.close()

    async def _dial(self, place: Address) -> None:
        """Ask for a connection again and again; a firewall may answer with a refusal."""
        while True:
            with suppress(OSError):
                sock = shared(self._transport.settings.host, self._port)
                try:
                    await self._transport.loop.sock_connect(sock, place)
                except BaseException:
                    sock.close()
                    raise
                self._found.append(sock)
                return
            await asyncio.sleep(_AGAIN_S)

    async def _listen(self) -> None:
        """Take who comes to the port: the other side may be a little earlier."""
        while True:
            with suppress(OSError), shared(self._transport.settings.host, self._port) as sock:
                sock.listen(8)
                while True:
                    self._found.append((await self._transport.loop.sock_accept(sock))[0])
            await asyncio.sleep(_AGAIN_S)

    async def _pass(self, passage: Passage) -> None:
        """QUIC over datagrams: both open their boxes, and the one with the lower id calls."""
        from shoal.engine.live.quic import QuicTransport  # aioquic is an extra.

        caller = self._transport.peer < self.to
        carrier = QuicTransport(self._transport.loop, passage, caller, self._found.append)
        self._carrier = carrier
        while True:
            carrier.open_filter()
            await asyncio.sleep(_AGAIN_S)

    async def _try(self, connection: socket.socket | Pipe) -> None:
        pipe = connection if isinstance(connection, tuple) else await piped(tuned(connection))
        try:
            async with asyncio.timeout(self._transport.settings.handshake_s):
                if await self._is_taken(pipe) and self._agreed is None:
                    self._agreed = pipe
        except ERRORS:
            pass
        finally:
            if self._agreed is not pipe:
                pipe[1].transport.abort()

    async def _is_taken(self, pipe: Pipe) -> bool:
        """Whether the peer that was meant is at the other end, and takes this connection.

        The one with the lower id calls; the other one says yes to one connection only.
        """
        if self._transport.peer < self.to:
            await introduction.call(self._transport, pipe, self.to, LINE)
            return True
        called = await introduction.called(self._transport, pipe)
        good = called.intro.source == self.to and called.intro.what == LINE
        if not good or self._saying_yes:
            return False
        self._saying_yes = True
        try:
            await called.answer(True)
        except BaseException:
            self._saying_yes = False
            raise
        return True
