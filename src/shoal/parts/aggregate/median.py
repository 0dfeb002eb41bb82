"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate.base import ByPlace
from shoal.tensor.ordered import middle_places, ordered_mean
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class Median(ByPlace):
    """The middle value of each coordinate, or the mean of the two middle ones.

    x: [..., k, dim]; weights are ignored, rows that are not finite are absent. Breaks when half of
    the rows are arbitrary; far from the mean when honest rows differ much (kappa does not vanish
    with fewer faults). Source: Yin et al. 2018, definition 1 (arXiv 1803.01498).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [9.0]])
    >>> Median()(x, mask=torch.ones(3, dtype=torch.bool))
    tensor([1.])
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def values(self, x: Stack, rows: Mask) -> Vector:
        return middle(x, rows)

    def tolerates(self, rows: int) -> int:
        return max(0, (rows - 1) // 2)

    def kappa(self, rows: int) -> float:
        """2h/(n - 2f) with h honest of n rows.

        At least n/2 - f honest rows lie as far from the mean as the median does, or farther.
        """
        bad = self.tolerates(rows)
        return 2.0 * (rows - bad) / (rows - 2 * bad)

    def breaks_at(self, rows: int) -> int:
        return self.tolerates(rows) + 1


def middle(x: Stack, rows: Mask) -> Vector:
    """Coordinate-wise median of the rows that count; x as `usable` returns it, rows [..., k] may
    have more leading axes. Zeros when no row counts.
    """
    return ordered_mean(x, rows, middle_places(rows))
