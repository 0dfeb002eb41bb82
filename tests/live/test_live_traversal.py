"""Traversal over real UDP sockets, where nothing stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.datagrams import Endpoint
from shoal.parts.overlay.relay import Relay
from shoal.parts.overlay.traversal import Traversal
from shoal.wire.message import message
from shoal.world.network import Network

pytestmark = pytest.mark.live


@message
class At:
    host: str
    port: int


@dataclass(frozen=True)
class Meet:
    """Peers 2 and 3 relay; peer 0 calls peer 1."""

    attempts: int
    until_s: float = 4.0

    async def run(self, peer: Any) -> None:
        if peer.id >= 2:
            socket = peer.datagrams.open()
            for other in (0, 1):
                await peer.send(other, At(*socket.local))
            await Relay()(peer, socket, self.until_s)
            return
        places = []
        for source in (2, 3):
            told = await peer.recv(At, source=source, deadline=self.until_s)
            places.append(Endpoint(told.message.host, told.message.port))
        traversal = Traversal(peer, *places, attempts=self.attempts, timeout_s=0.5)
        async with peer.tasks() as group:
            group.start(traversal.run(self.until_s))
            assert await traversal.register()
            peer.record("symmetric", traversal.symmetric)
            await peer.sleep_until(1.5)
            if peer.id == 0:
                path = await traversal.connect(1)
                peer.record("direct", -1 if path is None else path.direct)


@pytest.mark.parametrize("attempts", [0, 3])
def test_peers_meet_over_loopback(attempts: int) -> None:
    run = run_live(Meet(attempts), Network(4), processes=1, settings=LiveSettings(horizon_s=30.0))
    assert [row.value for row in run.series("direct")] == [float(attempts > 0)]
    assert [row.value for row in run.series("symmetric")] == [0.0, 0.0]
