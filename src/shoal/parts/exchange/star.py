"""The star: a hub hears its clients and sends its parameters down to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.exchange import Hop
from shoal.tensor import keyed as stacked
from shoal.tensor.types import Mask


@dataclass(frozen=True)
class Star:
    """One hub aggregates for all: federated averaging's pattern.

    sample: how many clients take part in a round, drawn uniformly without replacement by key; None
    = all. hub_works: whether the hub is a client too (its own row counts in rounds in which it is
    active); False makes it a pure server. Weights are left to the aggregator, which may count the
    amounts of data that parcels carry. whole_first: in round 0 everybody takes part, for methods
    that must hear of each client once. Breaks with the hub: while it is down nothing moves.
    Source: McMahan et al. 2017, algorithm 1.

    >>> star = Star(5, hub=1, sample=2)
    >>> star.active(round=0, seed=3).sum().item()
    2
    >>> Star(4, hub=1).hops(0, seed=3)[0].sources.tolist()
    [[0, 2, 3]]
    """

    peers: int
    hub: int = 0
    sample: int | None = None
    hub_works: bool = True
    whole_first: bool = False

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 6},
        {"peers": 6, "hub": 5, "sample": 3},
        {"peers": 6, "hub": 2, "sample": 5, "hub_works": False},
        {"peers": 6, "sample": 2, "whole_first": True},
        {"peers": 2, "sample": 1},
        {"peers": 1},
    )

    def __post_init__(self) -> None:
        if self.peers < 1:
            raise UsageError(f"Star: peers={self.peers}; need at least 1 (raise it)")
        if not 0 <= self.hub < self.peers:
            raise UsageError(f"Star: hub={self.hub}; need a peer from 0 to {self.peers - 1}")
        if self.clients < 1:
            raise UsageError("Star: peers=1 and a hub that does not work; need a client (add one)")
        if self.sample is not None and not 1 <= self.sample <= self.clients:
            raise UsageError(
                f"Star: sample={self.sample} of {self.clients} clients; need 1 to all of them"
            )

    @property
    def clients(self) -> int:
        """How many peers may be asked to work."""
        return self.peers if self.hub_works else self.peers - 1

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: who works in this round."""
        peers = torch.arange(self.peers, device="cpu")
        works = torch.ones_like(peers, dtype=torch.bool)
        works[self.hub] = self.hub_works
        if self.sample is None or (self.whole_first and round == 0):
            return works
        draws = stacked.uniform(stacked.key_of(seed, "sample", round), peers)
        order = torch.argsort(torch.where(works, draws, 2.0), stable=True)
        return torch.zeros_like(works).scatter_(0, order[: self.sample], True)

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """One wave in which the hub hears the active clients; shared, must not be written."""
        # Without sampling all rounds and seeds are alike: hand out one copy.
        return _hops(self, *((0, 0) if self.sample is None else (round, seed)))


@lru_cache(maxsize=8)
def _hops(star: Star, round: int, seed: int) -> tuple[Hop, ...]:
    active = star.active(round, seed)
    active[star.hub] = False
    heard = active.nonzero().squeeze(-1)
    # The same width whether or not the hub itself was drawn, so that shapes do not change by round.
    most = star.clients if star.whole_first and round == 0 else star.sample or star.clients
    width = min(most, star.peers - 1)
    sources = heard.new_full((1, width), -1)
    sources[0, : len(heard)] = heard
    return (Hop(sources, receivers=heard.new_tensor([star.hub])),)
