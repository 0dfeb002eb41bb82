"""The randomised quantisation mechanism: privacy from rounding alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.transform._codes import IntegerCodec
from shoal.tensor.keyed import uniform
from shoal.tensor.types import Key, Vector

NEAR = 1e-6
"""Entries this near to a level, as a share of the outermost one, count as on it."""


@dataclass(frozen=True)
class Rqm(IntegerCodec):
    """Each entry is rounded at random to one of two levels out of a random part of all levels.

    `levels` levels lie evenly from -(clip + extension) to clip + extension. For every entry anew
    the outer two are kept and each inner one with chance `keep`; the entry goes to the next kept
    level below or above, such that its mean is the entry itself. Larger `extension` and smaller
    `keep` give more privacy and more variance. Unbiased within [-clip, clip]; clipping is not.

    What it guarantees is counted by `shoal.parts.privacy.accountant`, for one entry: a vector of
    dim entries spends dim times as much in each round. private=False also takes extension = 0 and
    keep = 1, which is stochastic rounding to fixed levels and guarantees nothing.
    A vector that is not finite arrives as such, which tells everybody so.
    Source: Youn et al. 2023 (arXiv 2306.11913).

    >>> codec = Rqm(clip=1.0, levels=3, extension=1.0, keep=0.5)
    >>> codec.pmf(torch.tensor(1.0))
    tensor([0.1250, 0.2500, 0.6250], dtype=torch.float64)
    >>> payload, _ = Rqm().encode(torch.zeros(100), None, torch.tensor(0))
    >>> payload.byte_count()
    51
    """

    extension: float = 1.5
    keep: float = 0.42
    private: bool = True

    fewest: ClassVar[int] = 3
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clip": 0.5, "levels": 5, "extension": 1.0, "keep": 0.2, "clients": 40},
        {"levels": 256, "extension": 0.0, "keep": 1.0, "private": False},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number(
            "extension", self.extension, 0 <= self.extension < math.inf, "a finite number > 0"
        )
        self._number("keep", self.keep, 0 < self.keep <= 1, "a chance above 0 and below 1")
        if self.private and not (self.extension > 0 and self.keep < 1):
            raise UsageError(
                f"rqm: extension={self.extension}, keep={self.keep}; with extension = 0 or "
                "keep = 1 some codes betray the entry (change it, or set private = false)"
            )

    @property
    def reach(self) -> float:
        """The outermost level."""
        return self.clip + self.extension

    @property
    def low(self) -> float:
        return -self.reach

    @property
    def step(self) -> float:
        return 2.0 * self.reach / (self.levels - 1)

    def draw(self, x: Vector, key: Key) -> Tensor:
        last = self.levels - 1
        # As `values` has them, but where the entries are.
        values = self.low + self.step * torch.arange(
            self.levels, dtype=torch.float64, device=x.device
        )
        # Means of decoded vectors often lie on a level but for rounding, and on which side of it
        # must not decide which draws they meet.
        nearest = values[((x - self.low) / self.step).round().to(torch.int64)]
        x = torch.where((x - nearest).abs() <= NEAR * self.reach, nearest, x)
        # An entry on a level has that level below it; on the last one it is the upper end.
        cell = (torch.searchsorted(values, x.contiguous(), right=True) - 1).clamp(0, last - 1)
        lower = (cell - self._skipped(key, 1)).clamp_min(0)
        upper = (cell + 1 + self._skipped(key, 2)).clamp_max(last)
        below, above = values[lower], values[upper]
        up = uniform(key, 3) * (above - below) < x - below
        return torch.where(up, upper, lower).to(torch.uint8)

    def _skipped(self, key: Key, word: int) -> Tensor:
        """How many levels are left out until one is kept: geometric, at most `levels`."""
        if self.keep == 1:
            return torch.zeros_like(key)
        gap = torch.log1p(-uniform(key, word)) / math.log1p(-self.keep)
        return gap.clamp_max(float(self.levels)).to(torch.int64)

    def log_pmf(self, x: Tensor) -> Tensor:
        return self.pmf(x).log()

    def pmf(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        last, values = self.levels - 1, self.values()
        place = torch.arange(self.levels, dtype=torch.float64, device="cpu")
        x = x.unsqueeze(-1)
        cell = (torch.searchsorted(values, x.contiguous(), right=True) - 1).clamp(0, last - 1)
        down, up = cell - place, place - cell - 1
        kept = torch.full_like(values, self.keep)
        kept[0] = kept[last] = 1.0
        # 0 ** 0 is 1: with keep = 1 the two levels around x are certain.
        none = 1.0 - self.keep
        lower = torch.where(down >= 0, kept * none ** down.clamp_min(0.0), 0.0)
        upper = torch.where(up >= 0, kept * none ** up.clamp_min(0.0), 0.0)
        # share[..., i, k]: the chance to go up between lower level i and upper level k.
        gap = (values - values.unsqueeze(-1)).clamp_min(self.step)
        share = ((x.unsqueeze(-1) - values.unsqueeze(-1)) / gap).clamp(0.0, 1.0)
        pair = lower.unsqueeze(-1) * upper.unsqueeze(-2)
        return (pair * share).sum(-2) + (pair * (1.0 - share)).sum(-1)
