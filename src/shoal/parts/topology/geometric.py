"""Random geometric graphs: peers on a plane talk within a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from scipy.spatial import KDTree
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings, connected
from shoal.tensor import keyed as stacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometric(GraphTopology):
    """Peers at random places in the unit square; those within `radius` hear each other.

    Radio and proximity networks. Drawn again by key until connected, which is typical once
    pi radius^2 peers > ln(peers) (Gupta and Kumar 1998); well below, the first use raises
    UsageError. Gaps are as small as a grid's: news crosses 1 / radius hops.

    >>> Geometric(30, radius=0.4).positions().shape
    torch.Size([30, 2])
    """

    peers: int
    radius: float
    seed: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 30, "radius": 0.4},
        {"peers": 30, "radius": 0.35, "seed": 2, "mixing": "uniform"},
        {"peers": 30, "radius": 0.35, "seed": 2, "mixing": "max_degree"},
        {"peers": 6, "radius": 1.5},
        {"peers": 1, "radius": 0.1},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0.0 < self.radius < math.inf:
            raise UsageError(f"Geometric: radius={self.radius}; need > 0 (the square has side 1)")

    def positions(self) -> Tensor:
        """Where the peers are, float64 [peers, 2] in the unit square."""
        return _places(self.peers, self.seed, _placed(self)[1])

    def arcs(self, period: int) -> NDArray[np.int64]:
        return _placed(self)[0]


@lru_cache(maxsize=16)
def _placed(graph: Geometric) -> tuple[NDArray[np.int64], int]:
    def draw(attempt: int) -> NDArray[np.int64]:
        tree = KDTree(_places(graph.peers, graph.seed, attempt).numpy())
        return both_ways(tree.query_pairs(graph.radius, output_type="ndarray").astype("int64"))

    typical = math.sqrt(math.log(graph.peers) / (math.pi * graph.peers))
    failure = (
        f"Geometric: peers={graph.peers} within radius={graph.radius}, where connected graphs "
        f"become typical at {typical:.3g} (raise the radius)"
    )
    return connected(draw, graph.peers, failure)


def _places(peers: int, seed: int, attempt: int) -> Tensor:
    key = stacked.key_of(seed, "geometric", attempt)
    rows = torch.arange(peers, device=key.device).unsqueeze(-1)
    return stacked.uniform(key, rows, torch.arange(2, device=key.device))
