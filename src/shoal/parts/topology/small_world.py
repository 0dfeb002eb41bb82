"""Small worlds: a ring of close neighbours with some edges sent elsewhere."""

from __future__ import annotations

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
class SmallWorld(GraphTopology):
    """A ring where each peer knows `degree` nearest ones and each edge moves with chance `rewire`.

    rewire 0 is a plain ring lattice, 1 close to a random graph; a few hundredths already give short
    paths while neighbours still know each other. Drawn again by key until connected.
    Source: Watts and Strogatz 1998, as in networkx.

    >>> SmallWorld(10, degree=4, rewire=0.0).neighbors(0)
    (1, 2, 8, 9)
    """

    peers: int
    degree: int = 4
    rewire: float = 0.1
    seed: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 30},
        {"peers": 30, "degree": 6, "rewire": 0.5, "seed": 2, "mixing": "uniform"},
        {"peers": 30, "degree": 4, "rewire": 1.0, "mixing": "max_degree"},
        {"peers": 5, "degree": 4, "rewire": 0.3},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.degree < 2 or self.degree % 2 or self.degree >= self.peers:
            raise UsageError(
                f"SmallWorld: degree={self.degree} with peers={self.peers}; need an even number "
                "from 2 to peers - 1 (half of them on each side)"
            )
        if not 0.0 <= self.rewire <= 1.0:
            raise UsageError(f"SmallWorld: rewire={self.rewire}; need a probability from 0 to 1")

    def arcs(self, period: int) -> NDArray[np.int64]:
        failure = f"SmallWorld: peers={self.peers} of degree={self.degree} (raise the degree)"
        return connected(self._draw, self.peers, failure)[0]

    def _draw(self, attempt: int) -> NDArray[np.int64]:
        seed = keyed.fold(0, self.seed, "small_world", attempt)
        graph = networkx.watts_strogatz_graph(self.peers, self.degree, self.rewire, seed=seed)
        return both_ways(graph.edges())
