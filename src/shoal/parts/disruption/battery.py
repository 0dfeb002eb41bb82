"""Batteries that run out: every peer has its own last round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.disruption.base import Graph
from shoal.world.faults import Crash, Round


@dataclass(frozen=True)
class Battery:
    """Exponential lifetimes with a mean of `mean_rounds`, drawn by key; the dead stay dead.

    Only those that die before round `rounds` are listed; nobody dies before round 1.

    >>> from shoal.parts.topology.ring import Ring
    >>> all(f.at.round < 30 for f in Battery(mean_rounds=20, rounds=30).faults(Ring(9), seed=0))
    True
    """

    mean_rounds: float
    rounds: int

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"mean_rounds": 20.0, "rounds": 60},)

    def __post_init__(self) -> None:
        if not 0 < self.mean_rounds < math.inf or self.rounds < 1:
            raise UsageError(
                f"Battery: mean_rounds={self.mean_rounds}, rounds={self.rounds}; need a finite "
                "mean above 0 and at least one round"
            )

    def lifetimes(self, graph: Graph, seed: int) -> tuple[int, ...]:
        """The round in which each peer is gone, one per peer."""
        draws = (keyed.uniform(seed, "battery", p) for p in range(graph.peers))
        return tuple(1 + math.floor(-self.mean_rounds * math.log1p(-u)) for u in draws)

    def faults(self, graph: Graph, seed: int) -> tuple[Crash, ...]:
        """One crash for each round in which somebody dies, in order."""
        ends = self.lifetimes(graph, seed)
        return tuple(
            Crash(who=tuple(p for p, end in enumerate(ends) if end == at), at=Round(at))
            for at in sorted({end for end in ends if end < self.rounds})
        )
