"""The mean around the trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.parts.aggregate._values import mean_near, near_pivot
from shoal.parts.aggregate.base import Told
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.tensor.ordered import trimmed_places
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class Phocas(Told):
    """Of each coordinate, the mean of the values nearest to its trimmed mean, all but `byzantine`.

    x: [..., k, dim]; weights are ignored. The trimmed mean drops `byzantine` values at each end; of
    n rows received n - byzantine values are averaged (at least one), and rows that are not finite
    are the farthest. Breaks when more than `byzantine` rows are arbitrary, or half of them.
    Source: Xie et al. 2018, definition 4 (Phocas, arXiv 1805.09682).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [99.0]])
    >>> Phocas(1)(x, mask=torch.ones(5, dtype=torch.bool))
    tensor([1.5000])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        keep = (received - self.byzantine).clamp(min=1)
        return mean_near(x, rows, trimmed_places(rows, self.byzantine), keep, self.byzantine)

    def tolerates(self, rows: int) -> int:
        return max(0, min(self.byzantine, (rows - 1) // 2))

    def kappa(self, rows: int) -> float:
        """`near_pivot` around the trimmed mean."""
        bad = self.tolerates(rows)
        pivot = TrimmedMean(self.byzantine).kappa(rows)
        return near_pivot(rows - bad, max(1, rows - self.byzantine), bad, pivot)

    def breaks_at(self, rows: int) -> int:
        return self.tolerates(rows) + 1
