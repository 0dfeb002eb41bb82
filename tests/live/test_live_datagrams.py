"""Datagrams on real UDP sockets: the program text of the virtual network runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from shoal.base.errors import UsageError
from shoal.engine.event import simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.live.join import Joining, join_live
from shoal.kernel.datagrams import Endpoint
from shoal.wire.message import message
from shoal.world.faults import Crash, Partition
from shoal.world.nat import placed
from shoal.world.network import Network
from shoal.world.record import Run

pytestmark = pytest.mark.live


@message
class Here:
    host: str
    port: int


@dataclass(frozen=True)
class Echo:
    """Peer 0 sends every datagram back; the others count their echoes until `until_s`."""

    until_s: float = 1.0
    count: int = 5

    async def run(self, peer: Any) -> None:
        socket = peer.datagrams.open()
        if peer.id == 0:
            for other in peer.roster[1:]:
                await peer.send(other, Here(*socket.local))
            while (found := await socket.recv_from(self.until_s)) is not None:
                await socket.send_to(*found)
            return
        told = await peer.recv(Here, deadline=self.until_s)
        if told is None:
            return
        to = Endpoint(told.message.host, told.message.port)
        for number in range(self.count):
            await socket.send_to(bytes([number]), to)
            found = await socket.recv_from(peer.now() + 0.3)
            if found is not None:
                assert found == (bytes([number]), to)
                peer.record("echo", number)


def echoes(run: Run) -> list[tuple[int, float]]:
    return sorted((row.peer, row.value) for row in run.series("echo"))


@pytest.mark.parametrize("processes", [1, 3])
def test_echoes_come_back_as_on_the_virtual_network(processes: int) -> None:
    settings = LiveSettings(horizon_s=50.0)
    live = run_live(Echo(), Network(3), settings=settings, processes=processes)
    event = simulate(Echo(), Network(3))
    assert echoes(live) == echoes(event) == [(p, float(n)) for p in (1, 2) for n in range(5)]
    assert live.bytes_by_kind["Datagram"] == event.bytes_by_kind["Datagram"] == 20 * 29
    assert live.messages_sent == live.messages_delivered


@dataclass(frozen=True)
class Twice:
    async def run(self, peer: Any) -> None:
        socket = peer.datagrams.open(peer.store.get("port") or 0)
        if peer.store.get("port") is None:
            peer.record("first", socket.local.port)
        with pytest.raises(UsageError, match="cannot be had"):
            peer.datagrams.open(socket.local.port)
        peer.record("opened", socket.local.port)
        await socket.recv_from(1.0)


def test_a_crash_closes_the_port() -> None:
    faults = (Crash(who=(0,), at=0.2, until=0.4),)
    run = run_live(Twice(), Network(1, faults=faults), settings=LiveSettings(horizon_s=50.0))
    assert len(run.series("opened")) == 2
    assert run.finished


def test_a_partition_stops_them() -> None:
    faults = (Partition(who=(0,), at=0.0, until=30.0),)
    run = run_live(Direct(), Network(2, faults=faults), settings=LiveSettings(horizon_s=50.0))
    assert run.dropped["partition"] == 3
    assert not run.series("heard")


_places: dict[int, Endpoint] = {}


@dataclass(frozen=True)
class Direct:
    """Both peers live in this process, so they can tell each other's ports in memory."""

    async def run(self, peer: Any) -> None:
        socket = peer.datagrams.open()
        _places[peer.id] = socket.local
        await peer.sleep_until(0.1)
        if peer.id == 1:
            for _ in range(3):
                await socket.send_to(b"x", _places[0])
        elif await socket.recv_from(0.5) is not None:
            peer.record("heard", 1)


def test_nat_boxes_are_refused_on_real_sockets() -> None:
    network = Network(2, nats=placed({"symmetric": 1}))
    with pytest.raises(UsageError, match="1 NAT boxes"):
        run_live(Echo(), network)
    with pytest.raises(UsageError, match="1 NAT boxes"):
        join_live(Echo(), network, Joining())
