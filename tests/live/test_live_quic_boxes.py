"""Past boxes that let datagrams meet and no TCP: QUIC carries messages, else the relay does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
from nat_boxes import Behind, Box, Inside, boxes
from traversal_programs import Cross, outcomes

from shoal.engine.live import LiveSettings, run_live
from shoal.world.nat import NatBox
from shoal.world.network import Network

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="needs the whole of 127.0.0.0/8"),
]
RELAYS = ("127.9.0.1", "127.9.0.2")
# Callers have the lower number in one pair and the higher one in the other.
CALLS = {(2, 3): True, (5, 4): True, (6, 7): False}
KINDS = ("port-restricted", "port-restricted", "full cone", "symmetric", "symmetric",
         "port-restricted")  # fmt: skip


@dataclass(frozen=True)
class Boxed:
    program: Cross
    behind: dict[int, Box]

    async def run(self, peer: Any) -> None:
        inside = Behind if peer.id < 2 else Inside
        await self.program.run(inside(peer, self.behind[peer.id]))


@pytest.mark.parametrize("carrier", ["quic", "tcp"])
def test_quic_meets_where_datagrams_do_and_the_relay_takes_the_rest(carrier: Any) -> None:
    behind = {peer: Box(None, host) for peer, host in enumerate(RELAYS)}
    for number, kind in enumerate(KINDS):
        peer = 2 + number
        behind[peer] = Box(NatBox.classic(kind, (peer,)), f"127.9.4.{peer}")
    program = Cross(RELAYS, (tuple(CALLS),), begin_s=2.5, slot_s=5.0)
    settings = LiveSettings(horizon_s=50.0, carriers=(carrier,))
    with boxes(*behind.values()):
        run = run_live(Boxed(program, behind), Network(2 + len(KINDS)), settings=settings)
    found = outcomes(run)
    for (caller, called), meets in CALLS.items():
        assert found["path", caller, str(called)] == meets
        # No TCP passes these boxes, so the same line over TCP never comes up.
        assert found["messages", caller, str(called)] == (meets and carrier == "quic")
        assert found["answered", caller, str(called)] == 1
        assert found["asked back", called, str(caller)] == 1
