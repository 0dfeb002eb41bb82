"""The Poisson binomial mechanism: entries as biased coins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.transform._codes import IntegerCodec
from shoal.tensor.keyed import uniform
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class Pbm(IntegerCodec):
    """Each entry becomes the number of heads in levels - 1 tosses of a coin that it biases.

    A head has the chance 1/2 + theta * x / clip. Unbiased within [-clip, clip]; smaller `theta`:
    more privacy and more variance. With theta = 1/2 an extreme entry has one code only, and no
    finite guarantee. What it guarantees is counted by `shoal.parts.privacy.accountant`, for one
    entry.
    Source: Chen, Ozgur and Kairouz 2022 (arXiv 2207.09916).

    >>> Pbm(clip=1.0, levels=3, theta=0.25).pmf(torch.tensor(1.0))
    tensor([0.0625, 0.3750, 0.5625], dtype=torch.float64)
    """

    theta: float = 0.25

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clip": 0.5, "levels": 2, "theta": 0.5},
        {"levels": 256, "theta": 0.1, "clients": 40},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("theta", self.theta, 0 < self.theta <= 0.5, "a number above 0, at most 1/2")

    @property
    def low(self) -> float:
        return -self.step * (self.levels - 1) / 2

    @property
    def step(self) -> float:
        return self.clip / (self.theta * (self.levels - 1))

    def _chance(self, x: Tensor) -> Tensor:
        return (0.5 + x * (self.theta / self.clip)).clamp(0.0, 1.0)

    def draw(self, x: Vector, key: Key) -> Tensor:
        tosses = self.levels - 1
        chance = self._chance(x)
        # Inversion: one draw for all tosses. Of the rarer side, whose odds are at most 1.
        rare = torch.minimum(chance, 1.0 - chance)
        odds = rare / (1.0 - rare)
        draws = uniform(key)
        term = (1.0 - rare) ** tosses
        total = term.clone()
        count = torch.zeros_like(key)
        for done in range(tosses):
            count += draws >= total
            term = term * odds * ((tosses - done) / (done + 1))
            total = total + term
        return torch.where(chance > 0.5, tosses - count, count).to(torch.uint8)

    def log_pmf(self, x: Tensor) -> Tensor:
        chance = self._chance(self.inputs(x)).unsqueeze(-1)
        tosses = self.levels - 1
        heads = torch.arange(self.levels, dtype=torch.float64, device="cpu")
        tails = tosses - heads
        ways = torch.lgamma(torch.tensor(float(self.levels), dtype=torch.float64, device="cpu"))
        ways = ways - torch.lgamma(heads + 1) - torch.lgamma(tails + 1)
        return ways + torch.xlogy(heads, chance) + torch.xlogy(tails, 1.0 - chance)
