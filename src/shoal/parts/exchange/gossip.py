"""Gossip: every peer hears its neighbours in a topology."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.exchange import Hop
from shoal.tensor import keyed as stacked
from shoal.tensor.types import Mask
from shoal.world.topology import Topology


@dataclass(frozen=True)
class Gossip:
    """`steps` waves per round over the topology, without a hub.

    steps: waves per round; wave q of round r uses the topology's graph number r * steps + q, so
    that a changing graph moves on with every wave (log2(peers) steps of a one-peer exponential
    graph average exactly in one round). participation: each peer takes part in a round with this
    probability, drawn by key; a peer that does not is heard by nobody and hears nobody, and the
    weight that others gave it goes to their own vectors: the mean is kept on symmetric weights, on
    one-way graphs it drifts. weighted: use the topology's mixing weights; False leaves weights to
    the aggregator, which then may count the amounts of data that parcels carry. own_weight: what
    the own vector counts in place of the topology's number; the others share the rest as before
    (a peer that hears nobody keeps its own).

    >>> from shoal.parts import find
    >>> hop, = Gossip(find("topology", "ring")(4)).hops(0, seed=1)
    >>> hop.sources[0].tolist()
    [1, 3]
    """

    topology: Topology
    steps: int = 1
    participation: float = 1.0
    weighted: bool = True
    own_weight: float | None = None

    # The topology is for the user to add; a part does not know another role's classes.
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {},
        {"steps": 3},
        {"participation": 0.5},
        {"participation": 0.7, "steps": 2, "weighted": False},
        {"own_weight": 0.7, "participation": 0.6},
    )

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(
                f"Gossip: steps={self.steps}; need at least 1 (to exchange nothing use `isolated`)"
            )
        if not 0.0 < self.participation <= 1.0:
            raise UsageError(
                f"Gossip: participation={self.participation}; need a probability above 0, up to 1"
            )

        if self.own_weight is not None and not (self.weighted and 0.0 <= self.own_weight < 1.0):
            raise UsageError(
                f"Gossip: own_weight={self.own_weight}, weighted={self.weighted}; need a share in "
                "[0, 1) of weights that are in use (leave it out for the topology's)"
            )

    @property
    def hub(self) -> None:
        """Nobody: all peers aggregate."""
        return None

    @property
    def peers(self) -> int:
        """How many peers the topology has."""
        return self.topology.peers

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: who takes part in this round."""
        if self.participation == 1.0:
            return torch.ones(self.peers, dtype=torch.bool, device="cpu")
        key = stacked.key_of(seed, "participation", round)
        peers = torch.arange(self.peers, device=key.device)
        return stacked.uniform(key, peers) < self.participation

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """`steps` waves; the tensors are shared between calls and must not be written."""
        # A full round depends on no seed: hand out one copy for all seeds.
        return _hops(self, round, seed if self.participation < 1.0 else 0)


@lru_cache(maxsize=8)
def _hops(gossip: Gossip, round: int, seed: int) -> tuple[Hop, ...]:
    active = gossip.active(round, seed)
    waves = (gossip.topology.sources(round * gossip.steps + q) for q in range(gossip.steps))
    hops = []
    for sources, weights, own in waves:
        if gossip.own_weight is not None:
            others = weights.sum(-1, keepdim=True)
            share = (1.0 - gossip.own_weight) / torch.where(others > 0, others, 1.0)
            weights = weights * share
            own = 1.0 - weights.sum(-1)
        if gossip.participation < 1.0:
            there = (sources >= 0) & active.unsqueeze(-1) & active[sources.clamp_min(0)]
            weights = torch.where(there, weights, 0.0)
            own = 1.0 - weights.sum(-1)
            sources = torch.where(there, sources, -1)
        hops.append(Hop(sources, weights, own) if gossip.weighted else Hop(sources))
    return tuple(hops)
