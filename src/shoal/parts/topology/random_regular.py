"""Random regular graphs, fixed or drawn anew each round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import networkx
import numpy as np
import torch

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings, connected
from shoal.tensor import keyed as stacked

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RandomRegular(GraphTopology):
    """Every peer hears `degree` others chosen at random; the usual graph of real overlays.

    Close to the best gap of its degree (Friedman 2008: second eigenvalue of the adjacency near
    2 sqrt(degree - 1)), at a cost per round that does not grow with the number of peers. With
    `changing`, every round has a new graph (epidemic learning, De Vos et al. 2023), which mixes
    faster still; a single round's graph may then be disconnected.
    Source of the sampler: Steger and Wormald 1999, as in networkx.

    >>> graph = RandomRegular(20, degree=4, seed=1)
    >>> len(graph.neighbors(7)), graph.neighbors(7) == graph.neighbors(7, round=5)
    (4, True)
    """

    peers: int
    degree: int = 8
    seed: int = 0
    changing: bool = False

    mixing: ClassVar[Mixing] = "metropolis"
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 24, "degree": 4},
        {"peers": 24, "degree": 3, "seed": 5, "changing": True},
        {"peers": 9, "degree": 2},
        {"peers": 6, "degree": 5},
        {"peers": 2, "degree": 1},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.degree < self.peers:
            raise UsageError(
                f"RandomRegular: degree={self.degree} with peers={self.peers}; need "
                "1 <= degree < peers (lower the degree)"
            )
        if self.degree * self.peers % 2:
            raise UsageError(
                f"RandomRegular: degree={self.degree} times peers={self.peers} is odd; every edge "
                "has two ends (make one of them even)"
            )
        if self.degree == 1 and self.peers > 2 and not self.changing:
            raise UsageError(
                f"RandomRegular: degree=1 cannot connect peers={self.peers} (use a degree of at "
                "least 2, or changing=True)"
            )

    @property
    def time_varying(self) -> bool:
        return self.changing

    def period(self, round: int) -> int:
        return round if self.changing else 0

    def arcs(self, period: int) -> NDArray[np.int64]:
        if self.changing:
            return self._draw(period, 0)
        if self.degree == 2:
            # A connected 2-regular graph is one circle, which random draws rarely hit.
            key = stacked.key_of(self.seed, "circle")
            draws = stacked.uniform(key, torch.arange(self.peers, device=key.device))
            order = torch.argsort(draws, stable=True).numpy()
            return both_ways(np.stack((order, np.roll(order, -1)), axis=1))
        failure = f"RandomRegular: peers={self.peers} of degree={self.degree} (raise the degree)"
        return connected(lambda attempt: self._draw(0, attempt), self.peers, failure)[0]

    def _draw(self, period: int, attempt: int) -> NDArray[np.int64]:
        seed = keyed.fold(0, self.seed, "random_regular", period, attempt)
        return both_ways(networkx.random_regular_graph(self.degree, self.peers, seed=seed).edges())
