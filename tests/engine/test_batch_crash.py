"""A crash in the middle of a batched computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.engine.event import simulate
from shoal.kernel.peer import Cost, Peer
from shoal.world.faults import Crash
from shoal.world.network import Network


@dataclass(frozen=True)
class Working:
    """One computation each, of equal shape, that ends later the higher the peer's number."""

    async def run(self, peer: Peer) -> None:
        seconds = 1.0 + peer.id
        await peer.compute(torch.sin, torch.ones(3), cost=Cost(seconds=seconds))
        peer.record("done", peer.now())


def test_a_call_that_a_crash_ended_leaves_its_batch() -> None:
    """The batch runs without it when the first call is due; its own time comes after that."""
    network = Network(4, faults=(Crash(who=(2,), at=0.5),))
    run = simulate(Working(), network)
    assert [(row.peer, row.value) for row in run.series("done")] == [(0, 1.0), (1, 2.0), (3, 4.0)]


def test_a_batch_of_cancelled_calls_alone_does_not_run() -> None:
    network = Network(3, faults=(Crash(who=(0, 1, 2), at=0.5),))
    assert simulate(Working(), network).series("done") == []
