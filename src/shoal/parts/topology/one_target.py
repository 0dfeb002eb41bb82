"""Every round each peer sends to one other: a random one, the next in turn, or always the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, check_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHOICES = ("random", "turns", "ring")


@dataclass(frozen=True)
class OneTarget(GraphTopology):
    """In each round every peer sends to one other peer, and hears those that chose it.

    choice: "random", drawn by key anew in each round, so that a peer hears none, one or several;
    "turns", round robin: in round r peer i sends to the one r + 1 after it, skipping itself, so
    that everybody hears one other, and everybody in turn within peers - 1 rounds; "ring": always
    the one after it. Weights are 1 / (1 + heard). With "random" they keep the mean in expectation
    only.

    >>> [OneTarget(4, choice="turns").neighbors(0, round)[0] for round in range(4)]
    [1, 2, 3, 1]
    """

    peers: int
    choice: str = "random"
    seed: int = 0

    mixing: ClassVar[Mixing] = "uniform"
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 12}, {"peers": 7, "choice": "turns"}, {"peers": 5, "choice": "ring"},
        {"peers": 1}, {"peers": 2, "seed": 3},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.choice not in CHOICES:
            raise UsageError(f"OneTarget: choice={self.choice!r}; need one of {', '.join(CHOICES)}")

    @property
    def time_varying(self) -> bool:
        return self.choice != "ring"

    def period(self, round: int) -> int:
        if self.choice == "random":
            return round
        return round % max(1, self.peers - 1) if self.choice == "turns" else 0

    def arcs(self, period: int) -> NDArray[np.int64]:
        if self.peers == 1:
            return np.zeros((0, 2), np.int64)
        source = np.arange(self.peers, dtype=np.int64)
        step = np.full(self.peers, 1 + period)
        if self.choice == "random":
            random = np.random.default_rng(keyed.fold(0, self.seed, "one_target", period))
            step = random.integers(1, self.peers, self.peers)
        return np.stack((source, (source + step) % self.peers), axis=1)
