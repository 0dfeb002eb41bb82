"""Every round each peer hears some others drawn at random, as from a peer sampling service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, check_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RandomPeers(GraphTopology):
    """In each round every peer hears `degree` others, drawn by key without replacement.

    One-way: whom a peer hears says nothing of who hears it, so weights 1 / (1 + degree) keep the
    mean in expectation only (columns do not sum to 1). Models mix within a few rounds at any
    number of peers, since what a peer hears in one round is new to those that it heard before.

    >>> graph = RandomPeers(8, degree=2, seed=1)
    >>> [len(row) for row in graph.sources(0)[0].tolist()] == [2] * 8
    True
    """

    peers: int
    degree: int = 3
    seed: int = 0

    mixing: ClassVar[Mixing] = "uniform"
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 12, "degree": 3},
        {"peers": 7, "degree": 6, "seed": 2},
        {"peers": 9, "degree": 1},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.degree < max(2, self.peers):
            raise UsageError(
                f"RandomPeers: degree={self.degree} of {self.peers} peers; need 1 or more, and "
                "fewer than there are peers"
            )

    @property
    def time_varying(self) -> bool:
        return True

    def period(self, round: int) -> int:
        return round

    def arcs(self, period: int) -> NDArray[np.int64]:
        random = np.random.default_rng(keyed.fold(0, self.seed, "random_peers", period))
        targets = np.arange(self.peers)
        # Floyd's sampling: `degree` distinct ones of the others, for all peers at once.
        chosen = np.full((self.peers, self.degree), -1)
        for place, top in enumerate(range(self.peers - 1 - self.degree, self.peers - 1)):
            draw = random.integers(0, top + 1, self.peers)
            taken = (chosen[:, :place] == draw[:, None]).any(-1)
            chosen[:, place] = np.where(taken, top, draw)
        sources = chosen + (chosen >= targets[:, None])
        return np.stack((sources.ravel(), np.repeat(targets, self.degree)), axis=1).astype(np.int64)
