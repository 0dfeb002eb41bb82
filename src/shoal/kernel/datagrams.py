"""Datagrams: packets to endpoints rather than messages to peers, as NAT traversal needs them.

A datagram may be lost, doubled or reordered, comes from whoever its endpoint says, and has a size
limit. Engines carry it; this file is what a program sees, and the queue of what has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.base.errors import MessageTooLarge, ProgramError, UsageError
from shoal.base.units import FOREVER, to_ns
from shoal.kernel.waits import Wait
from shoal.wire.message import message

if TYPE_CHECKING:
    from shoal.kernel.runtime import Runtime

DATAGRAM_BYTES = 1472
"""Most bytes in one: an Ethernet frame of 1,500 without the headers of IPv4 and UDP."""
HEADER_BYTES = 28
"""IPv4 and UDP headers, which are counted as sent bytes."""
DATAGRAM = -(1 << 62)
"""In place of a request number: this is a datagram, and belongs to a socket."""

_QUEUE_BYTES = 212_992
"""What a socket keeps until it is read: the default of Linux (net.core.rmem_default)."""


class Endpoint(NamedTuple):
    """An address and a port, such as `Endpoint("198.18.0.7", 4001)`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@message(tag=("from_port", "to_port"))
class Datagram:
    """How a simulating engine carries one, between the outer endpoints of both sides."""

    from_host: str
    from_port: int
    to_host: str
    to_port: int
    data: bytes


class _Arrival(Wait):
    """The next datagram of a socket; None at the deadline."""

    __slots__ = ("waits",)

    def __init__(self, waits: deque[_Arrival], runtime: Runtime) -> None:
        super().__init__(runtime.ready)
        self.waits = waits

    def expire(self) -> None:
        if not self.done:
            self.waits.remove(self)
            Wait.expire(self)

    def abandon(self) -> None:
        if not self.done:
            self.waits.remove(self)
            Wait.abandon(self)


class Socket:
    """One open port of one peer; made by `peer.datagrams.open()`.

    local: the endpoint as the peer itself knows it; others may see another one, see
    `shoal.world.nat`.
    """

    def __init__(self, runtime: Runtime, port: int) -> None:
        self.runtime = runtime
        self.closed = False
        self._queue: deque[tuple[bytes, Endpoint]] = deque()
        self._queued = 0
        self._waits: deque[_Arrival] = deque()
        self.local: Endpoint = runtime.host.bind(self, port)

    async def send_to(self, data: bytes, to: Endpoint) -> None:
        """Send once; whether it arrives nobody is told. At most `DATAGRAM_BYTES`."""
        runtime = self.runtime
        if not runtime.alive:
            await Wait(runtime.ready)
        self._check_open()
        if len(data) > DATAGRAM_BYTES:
            raise MessageTooLarge(
                f"send_to: {len(data)} bytes; limit {DATAGRAM_BYTES} (split it over several)"
            )
        runtime.host.emit(self, bytes(data), Endpoint(*to))

    async def recv_from(self, deadline: float) -> tuple[bytes, Endpoint] | None:
        """The oldest datagram and whom it came from, or None at the deadline."""
        runtime = self.runtime
        if not runtime.alive:
            await Wait(runtime.ready)
        self._check_open()
        if self._queue:
            data, source = self._queue.popleft()
            self._queued -= len(data)
            return data, source
        at, now = to_ns(deadline), runtime.host.local_ns(runtime)
        if at <= now:
            runtime.past(now)
            return None
        wait = _Arrival(self._waits, runtime)
        self._waits.append(wait)
        runtime.host.set_timer(runtime, at if at < FOREVER else FOREVER, wait)
        return await wait

    async def map_port(self) -> Endpoint | None:
        """Ask the NAT box for a port that lets everybody in (as UPnP IGD or NAT-PMP do).

        The outer endpoint, good while the socket is open; None where there is no box that gives
        one. No packet is simulated for it. On real sockets a router is asked only where
        `LiveSettings.upnp` says so, for some seconds at most; a box beyond it is not, so what the
        router calls its outer address may not be the one that others see.
        """
        runtime = self.runtime
        if not runtime.alive:
            await Wait(runtime.ready)
        self._check_open()
        return await runtime.host.map_port(self)

    def close(self) -> None:
        """Give the port back; whoever waits for a datagram gets None."""
        if not self.closed:
            self.closed = True
            self.runtime.host.unbind(self)
            self.runtime.datagrams.forget(self)
            self._queue.clear()
            while self._waits:
                self._waits.popleft().resolve(None)

    def arrived(self, data: bytes, source: Endpoint) -> None:
        """Called by the engine. What nobody reads in time is dropped, as by an operating system."""
        if self._waits:
            self._waits.popleft().resolve((data, source))
        elif self._queued + len(data) > _QUEUE_BYTES:
            self.runtime.host.drop("socket full")
        else:
            self._queue.append((data, source))
            self._queued += len(data)

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError(f"socket {self.local}: closed (open another one)")


class Datagrams:
    """`peer.datagrams`: opens sockets; a crash closes all of them."""

    __slots__ = ("_runtime", "_sockets", "arrived")

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sockets: dict[Socket, None] = {}
        self.arrived: Callable[[Any, Runtime], None] | None = None
        """what the engine does with a packet (a `Datagram`, or one of its own) to this peer"""

    def open(self, port: int = 0) -> Socket:
        """A socket on this port, 0 = any free one; UsageError when it is taken."""
        if not 0 <= port < 65536:
            raise UsageError(f"datagrams.open: port={port}; need 0 to 65535 (0 = any free one)")
        if not self._runtime.alive:
            raise ProgramError("datagrams.open: this peer is gone (open sockets while it runs)")
        socket = Socket(self._runtime, port)
        self._sockets[socket] = None
        return socket

    def forget(self, socket: Socket) -> None:
        """The socket was closed."""
        self._sockets.pop(socket, None)

    def close(self) -> None:
        """The peer is gone, and its sockets with it."""
        for socket in list(self._sockets):
            socket.close()

    def deliver(self, packet: Any) -> None:
        """One came to this peer, or to the NAT box before it."""
        if self.arrived is not None:
            self.arrived(packet, self._runtime)
