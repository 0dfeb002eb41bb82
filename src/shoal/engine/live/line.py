"""One connection between two peers that carries any number of their connections, both ways.

Where a peer cannot be called, somebody else must open the connection: the peer itself, a relay in
between, or both sides at once. What was opened is a line, and what each side would have sent over
connections of its own goes through it: the transport dials a port of this machine instead of the
peer, and on the other side the line dials the transport. So sessions are the same as ever, from one
transport to the other; what is in between carries sealed bytes.

    kind      1 byte: bytes of a stream, its beginning, or its end
    whose     1 byte: whether the sender of this piece began the stream
    number    2 bytes: of the stream, counted by whoever began it
    length    4 bytes: of what follows
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

_HEAD = struct.Struct("<BBHI")
_BYTES, _BEGIN, _END = range(3)
PIECE_BYTES = 1 << 18
"""What is passed on at once; a shorter one costs more, a longer one holds up the others."""
_MOST_STREAMS = 128
# What the operating system may keep unsent: a heartbeat waits behind that on a slow link.
UNSENT_BYTES = 1 << 16
# Of a connection from the transport to the beginning of a line. What has left the transport goes
# before whatever is sent later, and the operating system alone would take some 6 MB.
DETOUR_BYTES = 1 << 15
# A silent connection is asked for a sign of life, which also keeps the mappings of NAT boxes.
_PROBE_AFTER_S = 15
_PROBES = 4
# Lines that both sides opened within this time may have crossed each other.
_CROSSED_S = 10.0

Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def tuned(sock: socket.socket) -> socket.socket:
    """A connection that is kept alive, and found dead in about a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_AFTER_S), ("TCP_KEEPINTVL", _PROBE_AFTER_S),
        ("TCP_KEEPCNT", _PROBES), ("TCP_NOTSENT_LOWAT", UNSENT_BYTES),
    ):  # fmt: skip
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def shared(host: str, port: int) -> socket.socket:
    """A socket bound to a port that others of this process may use as well."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def piped(connection: socket.socket) -> Pipe:
    """A connection as a pair of streams."""
    connection.setblocking(False)
    return await asyncio.open_connection(sock=connection, limit=PIECE_BYTES)


class Line:
    """`run` reads until the end; `carry` takes a local connection through it.

    direct: whether no relay is in between. opener: the peer that opened it, the one with the lower
    id if both did. inlet: opens a connection to this side's transport.
    """

    def __init__(
        self, pipe: Pipe, opener: int, direct: bool, inlet: Callable[[], Awaitable[Pipe]]
    ) -> None:
        self.direct = direct
        self.opener = opener
        self.alive = True
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self._reader, self._writer = pipe
        self._inlet = inlet
        self._turn = asyncio.Lock()
        self._numbers = 0
        self._streams: dict[tuple[bool, int], asyncio.StreamWriter] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._retires_s: float | None = None

    def gives_way(self, other: Line) -> bool:
        """Whether another line to the same peer, that came later, is used from now on.

        When both peers opened one at the same time, both keep to the same one.
        """
        if not self.alive or self.direct != other.direct:
            return not (self.alive and self.direct)
        crossed = self.opener != other.opener and self._loop.time() - self._began_s < _CROSSED_S
        return not crossed or other.opener < self.opener

    async def run(self) -> None:
        """Serve the other side until the connection ends, however it does."""
        try:
            while True:
                head = await self._reader.readexactly(_HEAD.size)
                kind, whose, number, length = _HEAD.unpack(head)
                if kind > _END or length > PIECE_BYTES:
                    return
                key = (not whose, number)
                if kind == _BEGIN:
                    if key in self._streams or len(self._streams) >= _MOST_STREAMS:
                        return
                    try:
                        pipe = await self._inlet()
                    except OSError:
                        await self._say(_END, key, b"")
                        continue
                    self._start(key, *pipe)
                elif kind == _END:
                    if (writer := self._streams.pop(key, None)) is not None:
                        writer.close()
                else:
                    data = await self._reader.readexactly(length)
                    if (writer := self._streams.get(key)) is not None:
                        writer.write(data)
                        # One that does not read holds up the others: they are of the same peer.
                        with suppress(OSError):
                            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            self.close()

    def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection of this side's transport, from now on a stream of the line."""
        if not self.alive or len(self._streams) >= _MOST_STREAMS:
            writer.transport.abort()
            return
        while (True, self._numbers) in self._streams:
            self._numbers = (self._numbers + 1) % (1 << 16)
        key = (True, self._numbers)
        self._numbers = (self._numbers + 1) % (1 << 16)
        self._writer.write(_HEAD.pack(_BEGIN, True, key[1], 0))
        self._start(key, reader, writer)

    def retire(self) -> None:
        """Close when it has no streams; not at once, as the other side may not know yet."""
        if self._retires_s is None:
            self._retires_s = self._loop.time() + _CROSSED_S
            self._loop.call_at(self._retires_s, self._look)

    def close(self) -> None:
        """End all streams, and the connection."""
        if not self.alive:
            return
        self.alive = False
        for pump in self._pumps:
            pump.cancel()
        for writer in (*self._streams.values(), self._writer):
            writer.transport.abort()
        self._streams.clear()

    def _start(
        self, key: tuple[bool, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._streams[key] = writer
        pump = self._loop.create_task(self._pump(key, reader))
        self._pumps.add(pump)
        pump.add_done_callback(self._pumps.discard)

    async def _pump(self, key: tuple[bool, int], reader: asyncio.StreamReader) -> None:
        """What this side says on a stream, piece by piece, in turns with the other streams."""
        with suppress(OSError):
            while data := await reader.read(PIECE_BYTES):
                await self._say(_BYTES, key, data)
        if (writer := self._streams.pop(key, None)) is not None:
            writer.close()
            with suppress(OSError):
                await self._say(_END, key, b"")
        self._look()

    async def _say(self, kind: int, key: tuple[bool, int], data: bytes) -> None:
        async with self._turn:
            self._writer.write(_HEAD.pack(kind, key[0], key[1], len(data)))
            self._writer.write(data)
            await self._writer.drain()

    def _look(self) -> None:
        due = self._retires_s is not None and self._loop.time() >= self._retires_s
        if due and not self._streams:
            self.close()
