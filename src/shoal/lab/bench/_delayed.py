"""Calls over links with delay: both peers on real sockets, and a process between them that waits.

Every connection goes through a relay that hands on what it reads a fixed time later, in order. With
that time much longer than the work, a caller with c calls in flight makes c calls per round trip.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter, time_ns
from typing import Any

from shoal.base.limits import DEFAULT
from shoal.engine.live import LiveSettings, control
from shoal.engine.live.driver import Driver
from shoal.wire.frame import agreement
from shoal.wire.message import message
from shoal.world.network import Network

_LATE_S = 300.0


@message
class Asked:
    text: bytes


@message
class Answered:
    number: int


@message
class Over:
    pass


@dataclass(frozen=True)
class InFlight:
    """Peer 0 keeps so many calls to peer 1 in flight, each of them `calls` times."""

    window: int
    calls: int

    async def run(self, peer: Any) -> None:
        if peer.id:
            await self._answer(peer)
            return
        asked = Asked(bytes(128))

        async def ask(calls: int) -> None:
            for _ in range(calls):
                await peer.request(1, asked, deadline=_LATE_S)

        await ask(1)
        begin = perf_counter()
        async with peer.tasks() as group:
            for _ in range(self.window):
                group.start(ask(self.calls))
        peer.record("rate", self.window * self.calls / (perf_counter() - begin))
        await peer.send(1, Over())

    async def _answer(self, peer: Any) -> None:
        async def answer(envelope: Any) -> Answered:
            return Answered(1)

        peer.serve(Asked, answer)
        await peer.recv(Over, deadline=_LATE_S)


class _Side(asyncio.Protocol):
    """One end of a relayed connection; what it reads goes to the other end later."""

    def __init__(self, delay_s: float) -> None:
        self.other: _Side | None = None
        self.transport: Any = None
        self._delay_s = delay_s
        self._late: deque[tuple[float, bytes]] = deque()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._late.append((loop.time() + self._delay_s, data))
        if len(self._late) == 1:
            loop.call_at(self._late[0][0], self._hand_on)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            asyncio.get_running_loop().call_later(self._delay_s, self.other.transport.close)

    def _hand_on(self) -> None:
        loop = asyncio.get_running_loop()
        if self.other is None or self.other.transport is None:
            loop.call_later(0.001, self._hand_on)  # Its connection is still being made.
            return
        while self._late and self._late[0][0] <= loop.time():
            self.other.transport.write(self._late.popleft()[1])
        if self._late:
            loop.call_at(self._late[0][0], self._hand_on)


def _relay(pipe: Connection, delay_s: float) -> None:
    """Listens for each of the addresses that it is told, and says where."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        connecting = set()

        def caller(target: control.Address) -> _Side:
            near, far = _Side(delay_s), _Side(delay_s)
            near.other, far.other = far, near
            connecting.add(loop.create_task(loop.create_connection(lambda: far, *target)))
            return near

        servers = [
            await loop.create_server(lambda t=target: caller(t), "127.0.0.1", 0)
            for target in pipe.recv()
        ]
        pipe.send([server.sockets[0].getsockname()[:2] for server in servers])
        await asyncio.to_thread(pipe.recv)
        for server in servers:
            server.close()

    asyncio.run(main())


def rate(round_trip_s: float, window: int, calls: int) -> float:
    """Calls per second, encrypted, with so many in flight over so long a way."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    relay = context.Process(target=_relay, args=(theirs, round_trip_s / 2), daemon=True)
    relay.start()
    try:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(_measure(pipe, InFlight(window, calls)))
    finally:
        pipe.send(None)
        relay.join(5.0)
        relay.kill()


async def _measure(pipe: Connection, program: InFlight) -> float:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[control.Ready] = loop.create_future()
    ended: list[control.Done] = []
    failed: list[BaseException] = []

    def report(what: control.Report) -> None:
        match what:
            case control.Ready():
                ready.set_result(what)
            case control.Done():
                ended.append(what)
            case control.Failed(error):
                failed.append(error)
                loop.call_soon(driver.control, control.Stop())
            case control.Idle(idle) if idle:
                loop.call_soon(driver.control, control.Stop())
            case _:
                pass

    plan = control.Plan(
        control.ByPeer((program,) * 2), Network(2), 0, LiveSettings(horizon_s=_LATE_S), DEFAULT,
        (0, 1), lead=True, observed=False, counted=False,
    )  # fmt: skip
    driver = Driver(plan, report, loop)
    running = loop.create_task(driver.run())
    said = await ready
    peers = sorted(said.addresses)
    pipe.send([said.addresses[peer] for peer in peers])
    addresses = dict(zip(peers, await asyncio.to_thread(pipe.recv), strict=True))
    digest = agreement(b"delayed", said.schemas)
    driver.control(control.Start(addresses, digest, time_ns(), said.keys))
    await running
    if failed:
        raise failed[0]
    return next(row.value for row in ended[0].run.rows if row.name == "rate")
