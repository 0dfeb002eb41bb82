"""Whole numbers on evenly spaced levels, as fine as wanted, for sums modulo a power of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.transform._codes import IntegerCodec
from shoal.tensor.keyed import uniform
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class FixedPoint(IntegerCodec):
    """Entries are clipped to [-clip, clip] and rounded at random to one of the two levels next to
    them, such that the mean is the entry; an odd number of levels has one at 0.

    Unbiased within [-clip, clip], off by at most one step, 2 clip / (levels - 1); what is clipped
    is lost. A code takes as many whole bytes as the sum of `clients` codes needs, so that masked
    vectors are packed at the speed of memory. Guarantees no privacy by itself: it is what secure
    aggregation adds up. A vector that is not finite arrives as such.
    Source: Bonawitz et al. 2019 (arXiv 1912.00131).

    >>> codec = FixedPoint(clip=1.0, levels=201)
    >>> payload, _ = codec.encode(torch.tensor([0.5, -7.0]), None, torch.tensor(0))
    >>> codec.decode(payload)
    tensor([ 0.5000, -1.0000])
    >>> FixedPoint(clients=100).width
    24
    """

    clip: float = 4.0
    levels: int = 65535

    fewest: ClassVar[int] = 3
    most: ClassVar[int] = (1 << 24) - 1
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clip": 1.0, "levels": 255, "clients": 40},
        {"clip": 8.0, "levels": 1 << 20},
    )

    @property
    def low(self) -> float:
        return -self.clip

    @property
    def step(self) -> float:
        return 2.0 * self.clip / (self.levels - 1)

    @property
    def width(self) -> int:
        return -(-super().width // 8) * 8

    def draw(self, x: Vector, key: Key) -> Tensor:
        place = (x - self.low) / self.step
        below = place.floor()
        # An entry on a level but for rounding gets that level from either side.
        up = uniform(key) < place - below
        return (below + up).clamp_(0, self.levels - 1).to(self.dtype)

    def log_pmf(self, x: Tensor) -> Tensor:
        return self.pmf(x).log()

    def pmf(self, x: Tensor) -> Tensor:
        place = (self.inputs(x) - self.low) / self.step
        codes = torch.arange(self.levels, dtype=torch.float64, device="cpu")
        return (1.0 - (place.unsqueeze(-1) - codes).abs()).clamp_min(0.0)
