"""Exponential graphs: neighbours at distances 1, 2, 4, 8, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.parts.topology.base import GraphTopology, Mixing, check_settings, circulant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Exponential(GraphTopology):
    """Peer i talks to i ± 2^k for every k with 2^k < peers: few neighbours, a large gap.

    Undirected by default; for a power of two, weights are 1 / (2 log2 peers). `directed`: peer i
    sends to i + 2^k only, weights 1 / (1 + ceil(log2 peers)). `one_peer`: in round r peer i sends
    to i + 2^(r mod ceil(log2 peers)) alone, weights 1/2; for a power of two, log2(peers) rounds
    give the exact average (Assran et al. 2019, section 3; Ying et al. 2021, lemma 1: not so for any
    other number of peers). One-way graphs are doubly stochastic but not symmetric.

    >>> Exponential(16).neighbors(0)
    (1, 2, 4, 8, 12, 14, 15)
    >>> [Exponential(16, one_peer=True).neighbors(0, round) for round in range(5)]
    [(1,), (2,), (4,), (8,), (1,)]
    """

    peers: int
    directed: bool = False
    one_peer: bool = False

    mixing: ClassVar[Mixing] = "metropolis"
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 32},
        {"peers": 11},
        {"peers": 32, "directed": True},
        {"peers": 32, "one_peer": True},
        {"peers": 11, "one_peer": True},
        {"peers": 2, "one_peer": True},
        {"peers": 1, "one_peer": True},
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def distances(self) -> tuple[int, ...]:
        """1, 2, 4, ... below `peers`."""
        return tuple(1 << k for k in range((self.peers - 1).bit_length()))

    @property
    def symmetric(self) -> bool:
        return not (self.directed or self.one_peer) or self.peers <= 2

    @property
    def time_varying(self) -> bool:
        return self.one_peer and self.peers > 2

    def period(self, round: int) -> int:
        return round % max(1, len(self.distances)) if self.one_peer else 0

    def arcs(self, period: int) -> NDArray[np.int64]:
        if self.one_peer:
            return circulant(self.peers, self.distances[period : period + 1])
        if self.directed:
            return circulant(self.peers, self.distances)
        return circulant(self.peers, (*self.distances, *(-d for d in self.distances)))
