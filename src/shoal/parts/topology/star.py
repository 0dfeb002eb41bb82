"""The star: all talk to one peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Star(GraphTopology):
    """`hub` hears everybody, everybody hears the hub alone; mixing as on any graph.

    For a server that aggregates and sends its parameters down, use the exchange `star` instead:
    here the leaves keep most of their own value, so lambda_2 = 1 - 1 / peers. The padded `sources`
    are [peers, peers - 1].

    >>> Star(4, hub=2).neighbors(2), Star(4, hub=2).neighbors(0)
    ((0, 1, 3), (2,))
    """

    peers: int
    hub: int = 0
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 9},
        {"peers": 9, "hub": 8, "mixing": "uniform"},
        {"peers": 9, "hub": 3, "mixing": "max_degree"},
        {"peers": 1},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.hub < self.peers:
            raise UsageError(f"Star: hub={self.hub}; need a peer from 0 to {self.peers - 1}")

    def arcs(self, period: int) -> NDArray[np.int64]:
        leaves = np.arange(self.peers, dtype=np.int64)
        return both_ways(np.stack((leaves, np.full_like(leaves, self.hub)), axis=1))
