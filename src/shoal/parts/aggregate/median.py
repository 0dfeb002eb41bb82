"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate.base import same_for_all
from shoal.tensor.stack import or_center, ordered_mean, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class Median:
    """The middle value of each coordinate, or the mean of the two middle ones.

    x: [..., k, dim]; weights are ignored, rows that are not finite are absent. Breaks when half of
    the rows are arbitrary; far from the mean when honest rows differ much (kappa does not vanish
    with fewer faults). Source: Yin et al. 2018, definition 1 (arXiv 1803.01498).

    >>> x = torch.tensor([[0.0], [1.0], [9.0]])
    >>> Median()(x, mask=torch.ones(3, dtype=torch.bool))
    tensor([1.])
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    centered: ClassVar[bool] = False

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        return or_center(middle(x, rows), rows.any(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def among(self, x: Stack, heard: Mask) -> Stack:
        """All receivers, without a copy of the rows for each."""
        own = x
        x, good = usable(x, torch.ones_like(x[..., 0], dtype=torch.bool))
        rows = heard.expand(*good.shape, good.shape[-1]) & good.unsqueeze(-2)
        return or_center(middle(x.unsqueeze(-3), rows), rows.any(-1), own)

    def tolerates(self, rows: int) -> int:
        return max(0, (rows - 1) // 2)

    def kappa(self, rows: int) -> float:
        """2h/(n - 2f) with h honest of n rows.

        At least n/2 - f honest rows lie as far from the mean as the median does, or farther.
        """
        bad = self.tolerates(rows)
        return 2.0 * (rows - bad) / (rows - 2 * bad)


def middle(x: Stack, rows: Mask) -> Vector:
    """Coordinate-wise median of the rows that count; x as `usable` returns it, rows [..., k] may
    have more leading axes. Zeros when no row counts.
    """
    count = rows.sum(-1, keepdim=True)
    place = torch.arange(x.shape[-2], device=x.device)
    chosen = (place == (count - 1) // 2) | (place == count // 2)
    return ordered_mean(x, rows, (chosen & (count > 0)).to(torch.float64))
