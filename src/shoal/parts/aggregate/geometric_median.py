"""The geometric median by smoothed Weiszfeld steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate.base import need_count, need_positive, same_for_all
from shoal.parts.aggregate.median import middle
from shoal.tensor.stack import combine, distances_to, or_center, shares, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class GeometricMedian:
    """The point with the least sum of distances to the rows, approximately.

    x: [..., k, dim]; weights are ignored, rows that are not finite are absent. Starts at the
    coordinate-wise median, where a mean would start as far away as the worst row, and takes
    `iterations` Weiszfeld steps; no step raises the sum. Distances below `smoothing` (in the units
    of x) count as `smoothing`, so the result is that coarse: keep it far below the honest spread.
    Breaks when half of the rows are arbitrary. Source: Pillutla et al. 2022, algorithm 2 (smoothed
    Weiszfeld; arXiv 1912.13445).

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [99.0, 99.0]])
    >>> GeometricMedian()(x, mask=torch.ones(4, dtype=torch.bool)).round(decimals=2)
    tensor([0.5000, 0.5000])
    """

    smoothing: float = 1e-6
    iterations: int = 8

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"iterations": 1, "smoothing": 1e-3})
    centered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_positive("geometric_median", "smoothing", self.smoothing, "1e-6 is usual")
        need_count("geometric_median", "iterations", self.iterations, 1, "8 is usual")

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        some = rows.any(-1)
        point = or_center(middle(x, rows), some, None)
        for _ in range(self.iterations):
            apart = distances_to(x, rows, point).clamp(min=self.smoothing)
            pull = shares(rows, 1.0 / apart)
            # All rows too far for float64: nothing pulls, and the point stays.
            point = or_center(combine(pull, x), pull.sum(-1) > 0, point)
        return or_center(point, some, center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        return max(0, (rows - 1) // 2)

    def kappa(self, rows: int) -> float:
        """((n a + 2h) / (n - 2f))^2, a^2 = 2h/(n - 2f) the start's bound; any number of steps.

        From "no step raises the sum" by the triangle inequality. The exact median has the better
        4 (h / (n - 2f))^2 (Allouah et al. 2023, proposition 3).
        """
        bad = self.tolerates(rows)
        honest, margin = rows - bad, rows - 2 * bad
        return ((rows * math.sqrt(2 * honest / margin) + 2 * honest) / margin) ** 2
