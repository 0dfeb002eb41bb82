"""What a small message waits for on a punched line, in bytes: they hold on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from paths_world import Meet, asked, values, why

from shoal.base.ids import PeerId
from shoal.engine.live import LiveSettings, run_live
from shoal.wire.message import message
from shoal.wire.mux import CHUNK_BYTES
from shoal.world.network import Network

pytestmark = pytest.mark.live

MOST_BYTES = 4 * CHUNK_BYTES
"""A chunk that is on its way, and what the sockets and tasks between two transports hold."""


@message
class Little:
    number: int


@message
class Yes:
    ahead_bytes: int


def came_bytes(peer: Any, source: int) -> int:
    """What peer 2's transport has read from another peer; all live in this process."""
    inlet = peer.host.transports[2].incoming.get(source)
    return 0 if inlet is None else sum(each._came_bytes for each in inlet.lanes.values())


@dataclass(frozen=True)
class Beside(Meet):
    """Peer 1 sends a large tensor, and small messages of another kind while it is on its way."""

    direct: bool = True
    large: int = 1 << 20

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Any) -> None:
        sent_at = dict[int, int]()

        async def hears(envelope: Any) -> Yes:
            return Yes(came_bytes(peer, 1))

        peer.serve(Little, hears)
        if peer.id == 2:
            return
        ended: list[bool] = []

        async def sends() -> None:
            ended.append(await asked(peer, other, 7, self.large, wait_s=self.until_s))

        async with peer.tasks() as group:
            group.start(sends())
            number = 0
            while not ended and peer.now() < self.until_s - 1.0:
                await peer.sleep_until(peer.now() + 0.01)
                number += 1
                sent_at[number] = came_bytes(peer, 1)
                answer = await peer.request(other, Little(number), deadline=self.until_s)
                ahead = answer.ahead_bytes - sent_at[number]
                if 0 < sent_at[number] < 4 * self.large:
                    peer.record("ahead", ahead)
        peer.record("whole", ended == [True])


@pytest.mark.parametrize(("carrier", "large"), [("quic", 1 << 20), ("tcp", 1 << 23)])
def test_a_small_message_waits_for_a_few_chunks_of_a_large_one(carrier: Any, large: int) -> None:
    settings = LiveSettings(horizon_s=50.0, carriers=(carrier,))
    run = run_live(Beside(large=large, until_s=9.0), Network(3), settings=settings)
    assert values(run, "quic") == [float(carrier == "quic")] * 2
    assert values(run, "whole") == [1.0], why(run)
    ahead = values(run, "ahead")
    assert len(ahead) >= 2
    # Each of them would wait for all of the 4 MiB or more, if that had been handed on before.
    assert max(ahead) <= MOST_BYTES < 4 * large, ahead
