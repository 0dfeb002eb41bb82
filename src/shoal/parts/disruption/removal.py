"""Peers that disappear for good at one round, without a word."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from shoal.base.errors import UsageError
from shoal.parts.disruption.base import Graph, at_random, by_betweenness, by_degree
from shoal.world.faults import Crash, Round

By = Literal["random", "degree", "betweenness", "holders", "relays", "within", "named"]


@dataclass(frozen=True)
class Removal:
    """At `at_round` some peers crash for good: abrupt, messages in flight are lost.

    by: `degree` and `betweenness` take the most central ones; `random`, `holders` (with data) and
    `relays` (without) draw by key; `within` takes all in the disc of `radius` around `center` in a
    graph with positions; `named` takes `who`, such as a trace says. count, or share of all peers,
    rounded, for the first five. everybody: allow to remove all peers, or all that hold data.

    >>> from shoal.parts.topology.star import Star
    >>> Removal(at_round=3, by="degree", count=1).faults(Star(5), seed=0)
    (Crash(who=(0,), at=Round(round=3), until=None, store='kept'),)
    """

    at_round: int = 0
    by: By = "random"
    count: int | None = None
    share: float | None = None
    center: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.0
    who: tuple[int, ...] = ()
    everybody: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"at_round": 2, "by": "degree", "share": 0.3}, {"by": "random", "count": 2},
        {"by": "named", "who": (1, 2)},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise UsageError(f"Removal: by={self.by!r}; need one of {', '.join(get_args(By))}")
        if self.at_round < 0:
            raise UsageError(f"Removal: at_round={self.at_round}; need 0 (from the start) or more")
        if self.by in ("within", "named"):
            if self.count is not None or self.share is not None:
                raise UsageError(f"Removal: by={self.by!r} takes no count or share (drop it)")
            if self.by == "within" and not self.radius > 0:
                raise UsageError(f"Removal: radius={self.radius}; need more than 0")
            return
        if (self.count is None) == (self.share is None):
            raise UsageError(
                f"Removal: count={self.count} and share={self.share}; give one of them"
            )
        if (self.share is not None and not 0 < self.share <= 1) or (
            self.count is not None and self.count < 1
        ):
            raise UsageError(
                f"Removal: count={self.count}, share={self.share}; need a count of 1 or more, or a "
                "share above 0, up to 1"
            )

    def chosen(
        self, graph: Graph, seed: int, holders: Collection[int] | None = None
    ) -> tuple[int, ...]:
        """Who disappears, ascending. holders: who has data; None = not known yet."""
        found = tuple(sorted(self._chosen(graph, seed, holders)))
        if any(not 0 <= p < graph.peers for p in found):
            raise UsageError(f"Removal: who={self.who}; need peers from 0 to {graph.peers - 1}")
        if self.everybody:
            return found
        if len(found) == graph.peers:
            raise UsageError(
                f"Removal: all {graph.peers} peers would disappear (remove fewer, or set "
                "everybody=True)"
            )
        if holders is not None and set(holders) <= set(found):
            raise UsageError(
                f"Removal: all {len(set(holders))} peers with data would disappear (remove fewer, "
                "or set everybody=True)"
            )
        return found

    def faults(
        self, graph: Graph, seed: int, holders: Collection[int] | None = None
    ) -> tuple[Crash, ...]:
        """The disruption as explicit faults; none when nobody is met."""
        who = self.chosen(graph, seed, holders)
        return (Crash(who=who, at=Round(self.at_round)),) if who else ()

    def _chosen(self, graph: Graph, seed: int, holders: Collection[int] | None) -> Collection[int]:
        if self.by == "named":
            return set(self.who)
        if self.by == "within":
            return self._inside(graph)
        order = self._order(graph, seed, holders)
        count = self.count
        if count is None:
            assert self.share is not None
            count = math.floor(self.share * graph.peers + 0.5)
        if count > len(order):
            raise UsageError(
                f"Removal: count={count} of {len(order)} peers that may be removed (lower it)"
            )
        return order[:count]

    def _order(self, graph: Graph, seed: int, holders: Collection[int] | None) -> list[int]:
        if self.by == "degree":
            return by_degree(graph, seed)
        if self.by == "betweenness":
            return by_betweenness(graph, seed)
        pool = range(graph.peers)
        if self.by in ("holders", "relays"):
            if holders is None:
                raise UsageError(f"Removal: by={self.by!r} needs to know who holds data (give it)")
            pool = [p for p in pool if (p in holders) == (self.by == "holders")]
        return at_random(pool, seed, "removal")

    def _inside(self, graph: Graph) -> list[int]:
        positions = getattr(graph, "positions", None)
        if positions is None:
            raise UsageError(
                f"Removal: by='within' needs positions; {type(graph).__name__} has none (use a "
                "geometric graph)"
            )
        center = torch.tensor(self.center, dtype=torch.float64, device="cpu")
        distance = (positions() - center).norm(dim=-1)
        return (distance <= self.radius).nonzero().flatten().tolist()
