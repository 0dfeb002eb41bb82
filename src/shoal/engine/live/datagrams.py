"""Datagrams on real UDP sockets.

Faults on links act where both sides' peers live in this process; NAT boxes are whatever stands in
the way for real.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.engine.live.line import shared
from shoal.kernel.datagrams import HEADER_BYTES, Datagram, Endpoint, Socket
from shoal.kernel.waits import Wait
from shoal.wire.message import message_key

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver
    from shoal.engine.live.upnp import Ports

_READS = 64
"""Datagrams taken from one socket before the others get their turn."""
_MOST_BYTES = 65536
_ATTEMPTS = 16
_CARRIED = b"ShQu"
"""Before each packet of a connection (`LiveSettings.carriers`); no program sees one."""


class Passage:
    """The packets of one connection over an open socket, to one place and from there.

    take: called with each packet. lost: called when the socket is closed.
    """

    def __init__(self, datagrams: Datagrams, opened: Socket, place: Endpoint) -> None:
        self.place = place
        self.take: Callable[[bytes], None] = lambda data: None
        self.lost: Callable[[], None] = lambda: None
        self.closed = False
        self._opened = opened
        self._datagrams = datagrams

    def send(self, data: bytes) -> None:
        """At once; what the operating system does not take is lost, as on the way."""
        if not self.closed:
            self._datagrams.pass_on(self._opened, _CARRIED + data, self.place)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._datagrams.forget(self._opened, self.place)


def _pair(host: str, port: int) -> tuple[socket.socket, socket.socket | None]:
    """A port for datagrams, and the same one held for connections (`Paths.punch`).

    A port that was asked for is had without the other one, if that is taken.
    """
    for _ in range(_ATTEMPTS):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.setblocking(False)
            udp.bind((host, port))
        except BaseException:
            udp.close()
            raise
        try:
            return udp, shared(host, udp.getsockname()[1])
        except OSError:
            if port:
                return udp, None
            udp.close()
    raise OSError(f"{_ATTEMPTS} free ports were taken for connections")


class Datagrams:
    """The UDP sockets of the peers of one process."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._udp: dict[Socket, socket.socket] = {}
        self._held: dict[Socket, socket.socket] = {}
        self._peers: dict[Endpoint, int] = {}
        self._passages: dict[tuple[Socket, Endpoint], Passage] = {}
        self._carries = "quic" in driver.plan.settings.carriers
        self._ports: Ports | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def passage(self, opened: Socket, place: Endpoint) -> Passage | None:
        """A way for packets of a connection; None while there is one to that place."""
        if opened not in self._udp or (opened, place) in self._passages:
            return None
        made = self._passages[opened, place] = Passage(self, opened, place)
        return made

    def pass_on(self, opened: Socket, data: bytes, to: Endpoint) -> None:
        with suppress(OSError):
            self._udp[opened].sendto(data, to)

    def forget(self, opened: Socket, place: Endpoint) -> None:
        self._passages.pop((opened, place), None)

    def bind(self, opened: Socket, port: int) -> Endpoint:
        """Open a port; it is read from the next turn of the loop on."""
        driver = self._driver
        try:
            udp, held = _pair(driver.plan.settings.host, port)
        except OSError as error:
            raise UsageError(
                f"datagrams.open: port {port} cannot be had: {error} (use port=0)"
            ) from error
        local = Endpoint(*udp.getsockname()[:2])
        self._udp[opened] = udp
        if held is not None:
            self._held[opened] = held
        self._peers[local] = opened.runtime.id
        driver.loop.add_reader(udp, self._read, opened)
        return local

    def emit(self, opened: Socket, data: bytes, to: Endpoint) -> None:
        """Send at once; what the operating system does not take is lost, and counted."""
        driver, source = self._driver, opened.runtime.id
        driver.result.messages_sent += 1
        driver.result.bytes_sent[source] += HEADER_BYTES + len(data)
        kinds = driver.result.bytes_by_kind
        kinds["Datagram"] = kinds.get("Datagram", 0) + HEADER_BYTES + len(data)
        target = self._peers.get(to)
        if target is not None and not driver.delivery.proxy.quiet:
            key = message_key(Datagram.code, (opened.local.port, to.port))
            if reason := driver.delivery.proxy.stopped(source, target, key):
                driver.drop(reason)
                return
        try:
            self._udp[opened].sendto(data, to)
        except OSError:
            driver.drop("lost")

    def map_port(self, opened: Socket) -> Wait:
        """What the router opens for this port, and for connections at the same number (`upnp`)."""
        wait, settings = Wait(opened.runtime.ready), self._driver.plan.settings
        if settings.upnp == "off":
            wait.resolve(None)
            return wait
        if self._ports is None:
            from shoal.engine.live.upnp import Ports  # Its packages are an extra.

            peer = opened.runtime.id
            self._ports = Ports(settings.upnp, lambda what: self._driver.closed(peer, what))
        self._start(self._map(self._ports, opened, wait))
        return wait

    async def _map(self, ports: Ports, opened: Socket, wait: Wait) -> None:
        found = await ports.map(*opened.local)
        if opened.closed:
            await ports.release(opened.local.port)
        wait.resolve(found)
        self._driver.settle()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._driver.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ended(self) -> None:
        """After the last socket was closed: the router has been told so."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._ports is not None:
            await self._ports.close()

    def unbind(self, opened: Socket) -> None:
        for passage in [p for (by, _), p in self._passages.items() if by is opened]:
            passage.lost()
            passage.close()
        udp = self._udp.pop(opened)
        if self._ports is not None:
            self._start(self._ports.release(opened.local.port))
        if (held := self._held.pop(opened, None)) is not None:
            held.close()
        self._peers.pop(opened.local, None)
        self._driver.loop.remove_reader(udp)
        udp.close()

    def _read(self, opened: Socket) -> None:
        driver, udp = self._driver, self._udp[opened]
        for _ in range(_READS):
            if opened.closed:
                return
            try:
                data, source = udp.recvfrom(_MOST_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                # The report of an earlier packet that reached nobody.
                continue
            if self._carries and data.startswith(_CARRIED):
                passage = self._passages.get((opened, Endpoint(*source[:2])))
                if passage is not None:
                    passage.take(data[len(_CARRIED) :])
                continue
            driver.events += 1
            driver.result.messages_delivered += 1
            driver.result.bytes_received[opened.runtime.id] += HEADER_BYTES + len(data)
            opened.arrived(data, Endpoint(*source[:2]))
            driver.settle()
