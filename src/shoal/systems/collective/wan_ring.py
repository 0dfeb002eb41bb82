"""A ring over a wide area: what each directed link carries, and the order that makes it fast.

All peers but peer 0, which is the master, measure every directed link and reduce in the order that
the master then chooses: the cheapest tour by 1000 / Mbit/s. For comparison they can then reduce in
`draws` orders drawn by key, each beginning at a time of its own.

Prime Intellect 2025 (arXiv 2505.14065), section on topology optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.lab.card import System
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.ring import Ring

HEARTBEAT_S = 1.0
TIMEOUT_S = 8.0
DRAWN = 1 << 40
"""Operation numbers of the drawn rings: the master's count from 1."""


@dataclass(frozen=True)
class WanRing:
    """Measures links with `probe_bytes` and reduces `size` float32 numbers; see the module's text.

    slot_s: how long each drawn ring has; begin_s: when the first of them begins, after all that the
    master leads is over.

    >>> WanRing(draws=8).size
    500000
    """

    size: int = 500_000
    probe_bytes: int = 1 << 20
    draws: int = 0
    begin_s: float = 60.0
    slot_s: float = 20.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.probe_bytes < 1 or self.draws < 0:
            raise UsageError(
                f"wan-ring: size={self.size}, probe_bytes={self.probe_bytes}, draws={self.draws}; "
                "need positive sizes and 0 or more draws"
            )

    async def run(self, peer: Peer) -> None:
        if peer.id == 0:
            await Master(HEARTBEAT_S, TIMEOUT_S).run(peer)
            return
        members = len(peer.roster) - 1
        values = torch.full((self.size,), float(peer.id), device="cpu")
        async with Communicator(
            peer, PeerId(0), ring=Ring(direct_bytes=0), heartbeat_s=HEARTBEAT_S,
            master_timeout_s=4 * TIMEOUT_S, fetch_s=30.0,
        ) as group:  # fmt: skip
            while group.world_size < members:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.5)
            await group.optimize_topology(self.probe_bytes)
            for target, rate in group.rates.items():
                peer.record("bit_per_s", rate, target=str(target))
            known = [rate for rate in group.rates.values() if rate > 0]
            peer.record("throughput_mbit", sum(known) / max(1, len(known)) / 1e6)
            peer.record("place", group.rank)
            begun_s = peer.now()
            await group.all_reduce(values)
            peer.record("chosen_s", peer.now() - begun_s)
        # The values are the sum now, and stay what they are: each drawn ring only reads them.
        ids = [other for other in peer.roster if other != 0]
        for draw in range(self.draws):
            # Everybody draws the same order: the key holds no peer.
            order = _order(ids, draw)
            await peer.sleep_until(self.begin_s + draw * self.slot_s)
            begun_s = peer.now()
            await Ring(stall_s=self.slot_s).reduce(peer, DRAWN + draw, order, values)
            peer.record("drawn_s", peer.now() - begun_s, draw=str(draw))


def _order(ids: list[PeerId], draw: int) -> tuple[int, ...]:
    return tuple(sorted(ids, key=lambda peer: keyed.uniform(0, "order", draw, peer)))


SYSTEM = System(
    name="wan-ring",
    kind="program",
    title="Directed links measured, and a ring in the order that costs least",
    make=WanRing,
    scenario="collective.three_regions",
    uses={"topology": None, "exchange": None, "task": None},
)
