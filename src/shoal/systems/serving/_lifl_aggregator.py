"""An aggregator of LIFL: it adds what a key names to what another key names, and keeps nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.base.errors import PeerError
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.parts.serving.shared_object_store import Mapped, arena_of
from shoal.parts.serving.weighted_sum import accumulate
from shoal.systems.serving._lifl_wire import Add, Added

if TYPE_CHECKING:
    from shoal.systems.serving._lifl_bound import Bound


def nothing(token: Tensor) -> Tensor:
    """What takes only time: its cost says how much."""
    return token


async def spend(peer: Peer, seconds: float) -> None:
    """Be busy for so long in virtual time; on a real machine the work itself takes its time."""
    if seconds > 0:
        await peer.compute(
            nothing, torch.zeros(1, device="cpu"), cost=Cost(seconds=seconds), batch="never"
        )


class Aggregator:
    """One aggregator in one incarnation.

    Requests of a gateway are numbered, and one that comes after a later one is refused. So a
    gateway that has an answer to a later request knows that nothing will be written any more for an
    earlier one, however long that was on its way.
    """

    def __init__(self, bound: Bound, peer: Peer) -> None:
        self.costs = bound.costs
        self.peer = peer
        self.mapped = Mapped()
        self._latest: dict[int, int] = {}

    async def live(self) -> None:
        self.peer.serve(Add, self._add)

    def close(self) -> None:
        self.mapped.close()

    async def _add(self, envelope: Envelope[Add]) -> Added:
        add = envelope.message
        arena = arena_of(add.out)
        if add.number <= self._latest.get(arena, 0):
            raise PeerError(f"request {add.number} comes after a later one")
        self._latest[arena] = add.number
        if add.source:
            await spend(self.peer, self.costs.add_s)
            if self._latest[arena] != add.number:
                raise PeerError(f"request {add.number} was overtaken")
            # From here to the end nothing else of this peer runs.
            total, addend = self.mapped.view(add.out), self.mapped.view(add.source)
            accumulate(total, addend, add.factor, add.first)
        return Added(add.number)
