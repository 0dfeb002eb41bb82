"""Which peers hold data; the others only pass models on."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from shoal.base.errors import UsageError
from shoal.parts.disruption.base import Graph, at_random, by_degree


@dataclass(frozen=True)
class Roles:
    """A share of the peers holds data: at random, on hubs, or on leaves of the graph.

    holders: share of all peers, rounded, at least one. `assign` can force peers in or out, so that
    worlds that differ in where the data are have the same positions otherwise.
    Source: Palmieri et al. 2023, section 4 (arXiv 2310.02986).

    >>> from shoal.parts.topology.star import Star
    >>> Roles(0.25, placement="hub").assign(Star(4), seed=1)
    (0,)
    """

    holders: float = 0.5
    placement: Literal["random", "hub", "leaf"] = "random"

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"holders": 0.2, "placement": "leaf"})

    def __post_init__(self) -> None:
        if not 0 < self.holders <= 1:
            raise UsageError(f"Roles: holders={self.holders}; need a share above 0, up to 1")
        if self.placement not in ("random", "hub", "leaf"):
            raise UsageError(f"Roles: placement={self.placement!r}; need one of random, hub, leaf")

    def assign(
        self, graph: Graph, seed: int, *, include: Collection[int] = (),
        exclude: Collection[int] = (),
    ) -> tuple[int, ...]:  # fmt: skip
        """The holders, ascending: all of `include`, none of `exclude`, the rest by placement."""
        count = max(1, math.floor(self.holders * graph.peers + 0.5))
        forced = sorted(set(include))
        if set(forced) & set(exclude) or len(forced) > count:
            raise UsageError(
                f"Roles: {len(forced)} peers must hold data, {len(set(exclude))} must not, and "
                f"{count} are to hold some (raise holders, or force fewer)"
            )
        pool = [p for p in self._order(graph, seed) if p not in set(forced) | set(exclude)]
        if len(pool) < count - len(forced):
            raise UsageError(
                f"Roles: {count} holders among {len(pool) + len(forced)} peers that may hold data "
                "(lower holders, or exclude fewer)"
            )
        return tuple(sorted(forced + pool[: count - len(forced)]))

    def _order(self, graph: Graph, seed: int) -> list[int]:
        if self.placement == "random":
            return at_random(range(graph.peers), seed, "roles")
        order = by_degree(graph, seed)
        return order if self.placement == "hub" else order[::-1]
