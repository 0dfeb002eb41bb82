"""Erdős-Rényi graphs: every pair is joined with the same probability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import networkx

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings, connected

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ErdosRenyi(GraphTopology):
    """G(peers, p), drawn again by key until it is connected; give `p` or `mean_degree`.

    Connected graphs become typical at p = ln(peers) / peers; well below that, no draw is, and the
    first use raises UsageError. Source: Gilbert 1959; sampler of Batagelj and Brandes 2005 as in
    networkx.

    >>> ErdosRenyi(50, mean_degree=8.0).p_edge
    0.16326530612244897
    """

    peers: int
    p: float | None = None
    mean_degree: float | None = None
    seed: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 30, "p": 0.2},
        {"peers": 40, "mean_degree": 6.0, "seed": 3, "mixing": "uniform"},
        {"peers": 40, "mean_degree": 6.0, "seed": 3, "mixing": "max_degree"},
        {"peers": 5, "p": 1.0},
        {"peers": 1, "p": 0.5},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.p is None) == (self.mean_degree is None):
            raise UsageError(
                f"ErdosRenyi: p={self.p} and mean_degree={self.mean_degree}; need exactly one"
            )
        if not 0.0 <= self.p_edge <= 1.0:
            raise UsageError(
                f"ErdosRenyi: p={self.p}, mean_degree={self.mean_degree} make an edge probability "
                f"of {self.p_edge}; need 0 to 1 (mean_degree at most peers - 1)"
            )
        if self.p_edge == 0.0 and self.peers > 1:
            raise UsageError(
                f"ErdosRenyi: probability 0 cannot connect peers={self.peers} (raise p)"
            )

    @property
    def p_edge(self) -> float:
        """Probability that a pair is joined."""
        if self.mean_degree is not None:
            return self.mean_degree / max(1, self.peers - 1)
        return float(self.p or 0.0)

    def arcs(self, period: int) -> NDArray[np.int64]:
        typical = math.log(self.peers) / self.peers
        failure = (
            f"ErdosRenyi: peers={self.peers} with edge probability {self.p_edge:.3g}, where "
            f"connected graphs become typical at {typical:.3g} (raise p)"
        )
        return connected(self._draw, self.peers, failure)[0]

    def _draw(self, attempt: int) -> NDArray[np.int64]:
        seed = keyed.fold(0, self.seed, "erdos_renyi", attempt)
        graph = networkx.fast_gnp_random_graph(self.peers, self.p_edge, seed=seed)
        return both_ways(graph.edges())
