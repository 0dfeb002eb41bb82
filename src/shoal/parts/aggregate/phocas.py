"""The mean around the trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate._values import mean_near, near_pivot
from shoal.parts.aggregate.base import need_count, same_for_all
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.tensor.stack import or_center, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class Phocas:
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

    byzantine: int = 1

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"byzantine": 2}, {"byzantine": 0})
    centered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_count("phocas", "byzantine", self.byzantine, 0, "how many peers may be faulty")

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        keep = (mask.expand(rows.shape).sum(-1) - self.byzantine).clamp(min=1)
        pivot = TrimmedMean(self.byzantine)(x, mask=rows)
        near = mean_near(x, rows, pivot, keep, self.byzantine)
        return or_center(near, rows.any(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        return max(0, min(self.byzantine, (rows - 1) // 2))

    def kappa(self, rows: int) -> float:
        """`near_pivot` around the trimmed mean."""
        bad = self.tolerates(rows)
        pivot = TrimmedMean(self.byzantine).kappa(rows)
        return near_pivot(rows - bad, max(1, rows - self.byzantine), bad, pivot)
