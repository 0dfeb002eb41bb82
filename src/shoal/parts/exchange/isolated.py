"""No exchange: every peer learns alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.exchange import Hop
from shoal.tensor.types import Mask


@dataclass(frozen=True)
class Isolated:
    """Nobody hears anybody: the local-only arm that any cooperation has to beat.

    >>> Isolated(3).hops(0, seed=1)[0].sources.shape
    torch.Size([3, 0])
    """

    peers: int

    examples: ClassVar[tuple[dict[str, object], ...]] = ({"peers": 4}, {"peers": 1})

    def __post_init__(self) -> None:
        if self.peers < 1:
            raise UsageError(f"Isolated: peers={self.peers}; need at least 1 (raise it)")

    @property
    def hub(self) -> None:
        """Nobody."""
        return None

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: everybody works."""
        return torch.ones(self.peers, dtype=torch.bool, device="cpu")

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """One wave without sources; shared, must not be written."""
        return _hops(self.peers)


@lru_cache(maxsize=8)
def _hops(peers: int) -> tuple[Hop, ...]:
    nobody = torch.zeros(peers, 0, dtype=torch.int64, device="cpu")
    weights = torch.zeros_like(nobody, dtype=torch.float64)
    return (Hop(nobody, weights, weights.new_ones(peers)),)
