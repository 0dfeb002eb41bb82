"""A graph that loses peers, and whose others then find new neighbours at two hops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings
from shoal.parts.topology.from_edges import FromEdges

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Rewired(GraphTopology):
    """`edges` until graph number `at_round`; from then on without the peers in `gone`, and a new
    neighbour for each one lost.

    A peer that loses neighbour g links with one of g's other neighbours, whom it could know of as
    long as g lived; which one is drawn by key among those that are left and not its neighbours
    already. Nobody is left at two hops in that direction: nothing is linked. So degrees stay about
    what they were, and what held together by the lost peers alone mostly holds together again, but
    nobody promises it. With one wave a round the number of the graph is that of the round.

    >>> star = ((0, 1), (0, 2), (0, 3))
    >>> graph = Rewired(4, star, gone=(0,), at_round=5, seed=1)
    >>> graph.neighbors(0, 4), graph.neighbors(0, 5), len(graph.neighbors(1, 5)) > 0
    ((1, 2, 3), (), True)
    """

    peers: int
    edges: tuple[tuple[int, int], ...]
    gone: tuple[int, ...] = ()
    at_round: int = 1
    seed: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 6, "edges": ((0, 1), (0, 2), (0, 3), (3, 4), (4, 5)), "gone": (0, 4)},
        {"peers": 4, "edges": ((0, 1), (1, 2), (2, 3)), "gone": (1,), "mixing": "uniform"},
        {"peers": 3, "edges": ((0, 1), (1, 2)), "at_round": 2, "mixing": "max_degree"},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        FromEdges(self.peers, self.edges)  # refuses what is no connected graph
        object.__setattr__(self, "edges", tuple((int(a), int(b)) for a, b in self.edges))
        object.__setattr__(self, "gone", tuple(sorted({int(p) for p in self.gone})))
        if any(not 0 <= p < self.peers for p in self.gone):
            raise UsageError(f"Rewired: gone={self.gone}; need peers from 0 to {self.peers - 1}")
        if self.at_round < 1:
            raise UsageError(
                f"Rewired: at_round={self.at_round}; need 1 or more (a loss is noticed after it)"
            )

    @property
    def time_varying(self) -> bool:
        return bool(self.gone)

    def period(self, round: int) -> int:
        return int(bool(self.gone) and round >= self.at_round)

    def arcs(self, period: int) -> NDArray[np.int64]:
        edges = self.edges if period == 0 else (*self._left(), *sorted(self.found()))
        return both_ways(np.array(edges, dtype=np.int64).reshape(-1, 2))

    def _left(self) -> tuple[tuple[int, int], ...]:
        gone = set(self.gone)
        return tuple((a, b) for a, b in self.edges if a not in gone and b not in gone)

    def found(self) -> set[tuple[int, int]]:
        """The new links, (lower, higher)."""
        near: dict[int, set[int]] = {p: set() for p in range(self.peers)}
        for a, b in self.edges:
            near[a].add(b)
            near[b].add(a)
        gone = set(self.gone)
        links = set()
        for peer in sorted(set(near) - gone):
            for lost in sorted(near[peer] & gone):
                others = near[lost] - gone - near[peer] - {peer}
                if others:
                    chosen = min(
                        others, key=lambda p: keyed.uniform(self.seed, "rewire", peer, lost, p)
                    )
                    links.add((min(peer, chosen), max(peer, chosen)))
        return links
