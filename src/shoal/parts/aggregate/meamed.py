"""The mean around the median."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.parts.aggregate._values import mean_near, near_pivot
from shoal.parts.aggregate.base import Told
from shoal.parts.aggregate.median import Median
from shoal.tensor.ordered import middle_places
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class Meamed(Told):
    """Of each coordinate, the mean of the values nearest to its median, all but `byzantine`.

    x: [..., k, dim]; weights are ignored. Of n rows received n - byzantine values are averaged (at
    least one); rows that are not finite are the farthest. Keeps more values than a trimmed mean,
    which drops twice as many. Breaks when more than `byzantine` rows are arbitrary, or half of
    them. Source: Xie et al. 2018, definition 7 (arXiv 1802.10116).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    >>> Meamed(1)(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([1.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        keep = (received - self.byzantine).clamp(min=1)
        return mean_near(x, rows, middle_places(rows), keep, self.byzantine)

    def tolerates(self, rows: int) -> int:
        return max(0, min(self.byzantine, (rows - 1) // 2))

    def kappa(self, rows: int) -> float:
        """`near_pivot` around the median; rows that are not finite only shorten the median's."""
        bad = self.tolerates(rows)
        around = 2.0 * (rows - bad) / (rows - 2 * bad) if bad else Median().kappa(rows)
        return near_pivot(rows - bad, max(1, rows - self.byzantine), bad, around)

    def breaks_at(self, rows: int) -> int:
        return self.tolerates(rows) + 1
