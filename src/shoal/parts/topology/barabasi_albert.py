"""Barabási-Albert graphs: a few hubs, many peers with few neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import networkx

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class BarabasiAlbert(GraphTopology):
    """Each new peer joins `attach` earlier ones, likelier those with many neighbours.

    Connected, (peers - attach) * attach edges, degrees with a power-law tail of exponent 3: what
    grows where newcomers ask well-known peers. The largest degree grows as sqrt(peers), and the
    padded `sources` with it. Source: Barabási and Albert 1999, as in networkx.

    >>> sum(len(BarabasiAlbert(20, attach=3).neighbors(i)) for i in range(20)) // 2
    51
    """

    peers: int
    attach: int = 2
    seed: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 30, "attach": 2},
        {"peers": 30, "attach": 3, "seed": 4, "mixing": "uniform"},
        {"peers": 30, "attach": 1, "mixing": "max_degree"},
        {"peers": 2, "attach": 1},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.attach < self.peers:
            raise UsageError(
                f"BarabasiAlbert: attach={self.attach} with peers={self.peers}; need "
                "1 <= attach < peers (lower attach)"
            )

    def arcs(self, period: int) -> NDArray[np.int64]:
        seed = keyed.fold(0, self.seed, "barabasi_albert")
        return both_ways(networkx.barabasi_albert_graph(self.peers, self.attach, seed=seed).edges())
