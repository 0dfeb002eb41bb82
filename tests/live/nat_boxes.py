"""NAT boxes in user space over real UDP sockets, driven by the tables of `shoal.world.nat`.

On loopback nothing makes a packet pass a box. So who is behind one sends to the box and names the
endpoint that it means (as in SOCKS 5, RFC 1928 section 7); the box sends from a real socket of its
own address, one per mapping, and hands in what its table lets in.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any

from shoal.kernel.datagrams import Endpoint
from shoal.world.nat import NatBox, NatTable

_HEAD = struct.Struct("<4sH")
_SOONEST_S = 0.02


def _wrapped(data: bytes, about: Endpoint) -> bytes:
    return _HEAD.pack(socket.inet_aton(about.host), about.port) + data


def _unwrapped(data: bytes) -> tuple[bytes, Endpoint]:
    host, port = _HEAD.unpack_from(data)
    return data[_HEAD.size :], Endpoint(socket.inet_ntoa(host), port)


class Box:
    """One box with an address of its own; box None: everything passes, port by port."""

    def __init__(self, box: NatBox | None, host: str, seed: int = 0) -> None:
        self.host = host
        self.table = None if box is None else NatTable(box, host, seed)
        self.filtered = 0
        self.inner = _bound("127.0.0.1", 0)
        self.place = Endpoint(*self.inner.getsockname())
        self._outer: dict[int, socket.socket] = {}
        self._open: dict[int, Endpoint] = {}
        self.lock = threading.Lock()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.inner, selectors.EVENT_READ, self._leaves)

    def plain(self, port: int, inside: Endpoint) -> Endpoint:
        """Without a table: this port belongs to that inner socket."""
        with self.lock:
            outer = self._at(port)
            endpoint = Endpoint(*outer.getsockname())
            self._outer[endpoint.port] = outer
            self._open[endpoint.port] = inside
        return endpoint

    def opens(self, protocol: str, host: str, port: int, wanted: int) -> int:
        """On request (UPnP): the outer port that lets everybody in to that inner one."""
        if protocol != "UDP" or self.table is None:
            return wanted
        with self.lock:
            mapped = self.table.map_port(Endpoint(host, port))
            assert mapped is not None
            self._at(mapped.port)
        return mapped.port

    def close(self) -> None:
        self.selector.close()
        for each in (self.inner, *self._outer.values()):
            each.close()

    def _at(self, port: int) -> socket.socket:
        """The real socket of an outer port."""
        outer = self._outer.get(port)
        if outer is None:
            outer = self._outer[port] = _bound(self.host, port)
            self.selector.register(outer, selectors.EVENT_READ, self._enters)
        return outer

    def _leaves(self, inner: socket.socket) -> None:
        packet, source = inner.recvfrom(1 << 16)
        data, to = _unwrapped(packet)
        inside = Endpoint(*source)
        if self.table is None:
            port = next(port for port, owner in self._open.items() if owner == inside)
        elif to.host == self.host and not self.table.box.hairpin:
            return
        else:
            port = self.table.outbound(inside, to, monotonic_ns()).port
        self._at(port).sendto(data, to)

    def _enters(self, outer: socket.socket) -> None:
        data, source = outer.recvfrom(1 << 16)
        here = Endpoint(*outer.getsockname())
        if self.table is None:
            inside = self._open.get(here.port)
        else:
            inside = self.table.inbound(here, Endpoint(*source), monotonic_ns())
        if inside is None:
            self.filtered += 1
        else:
            self.inner.sendto(_wrapped(data, Endpoint(*source)), inside)


def _bound(host: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.bind((host, port))
    return made


@contextmanager
def boxes(*made: Box) -> Iterator[None]:
    """The boxes at work, in a thread."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0 if _turn(made) else 0.001):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5.0)
        for box in made:
            box.close()


def _turn(made: tuple[Box, ...]) -> bool:
    busy = False
    for box in made:
        with box.lock:
            for key, _ in box.selector.select(0):
                busy = True
                try:
                    key.data(key.fileobj)
                except BlockingIOError:
                    continue
    return busy


class Behind:
    """A peer as its program sees it, but for its datagrams, which pass a box."""

    def __init__(self, peer: Any, box: Box) -> None:
        self._peer = peer
        self._box = box
        self.datagrams = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)

    def open(self, port: int = 0) -> Boxed:
        return Boxed(self._peer.datagrams.open(), self._box, port)


class Boxed:
    """A socket of which every datagram goes to the box and comes from it."""

    def __init__(self, inner: Any, box: Box, port: int) -> None:
        self._inner = inner
        self._box = box
        self.local = inner.local if box.table is not None else box.plain(port, inner.local)

    async def send_to(self, data: bytes, to: Endpoint) -> None:
        await self._inner.send_to(_wrapped(data, to), self._box.place)

    async def recv_from(self, deadline: float) -> tuple[bytes, Endpoint] | None:
        found = await self._inner.recv_from(deadline)
        return None if found is None else _unwrapped(found[0])

    async def map_port(self) -> Endpoint | None:
        return await self._inner.map_port()

    def close(self) -> None:
        self._inner.close()


class Inside(Behind):
    """As `Behind`, with sockets of the engine's own, so that connections over them pass too."""

    def open(self, port: int = 0) -> Any:
        opened = self._peer.datagrams.open(port)
        sockets = self._peer.host.datagrams._udp
        sockets[opened] = _Wired(sockets[opened], self._box.place)
        return opened


class _Wired:
    """The operating system's socket, behind a box."""

    def __init__(self, udp: socket.socket, place: Endpoint) -> None:
        self._udp = udp
        self._place = place
        self.fileno = udp.fileno
        self.close = udp.close

    def sendto(self, data: bytes, to: Endpoint) -> None:
        self._udp.sendto(_wrapped(data, to), self._place)

    def recvfrom(self, most_bytes: int) -> tuple[bytes, Endpoint]:
        return _unwrapped(self._udp.recvfrom(most_bytes)[0])
