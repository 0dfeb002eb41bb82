"""The geometric median by smoothed Weiszfeld steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate.base import Plain, need_count, need_positive
from shoal.parts.aggregate.median import middle
from shoal.tensor.distances import inner_products, majority_row
from shoal.tensor.stack import combine, or_center, shares, usable
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class GeometricMedian(Plain):
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

    def __post_init__(self) -> None:
        need_positive("geometric_median", "smoothing", self.smoothing, "1e-6 is usual")
        need_count("geometric_median", "iterations", self.iterations, 1, "8 is usual")

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        start = middle(x, rows)
        inner = inner_products(x, rows, start)
        norm = inner.diagonal(dim1=-2, dim2=-1)
        square = norm[..., :-1] - 2 * inner[..., -1, :-1] + norm[..., -1:]
        pull = self._pull(square, inner[..., :-1, :-1], rows)
        # All rows too far for float64: nothing pulls, and the point stays.
        return or_center(combine(pull, x), pull.sum(-1) > 0, start)

    def among(self, x: Stack, heard: Mask) -> Stack:
        """All receivers: distances to their starts and between rows are inner products."""
        own = x
        x, good = usable(x)
        rows = heard.expand(*good.shape, good.shape[-1]) & good.unsqueeze(-2)
        start = middle(x.unsqueeze(-3), rows)
        pivot = majority_row(x, good).unsqueeze(-2).to(torch.float64)
        near, begin = x - pivot, start - pivot
        inner = near @ near.mT
        square = (near.square().sum(-1).unsqueeze(-2) - 2 * begin @ near.mT).add_(
            begin.square().sum(-1, keepdim=True)
        )
        pull = self._pull(square, inner.unsqueeze(-3), rows)
        points = or_center(pull.to(x.dtype) @ x, pull.sum(-1) > 0, start)
        return or_center(points, rows.any(-1), own)

    def _pull(self, square: Tensor, inner: Tensor, rows: Mask) -> Tensor:
        """Weights of the rows [..., k] after all steps; square: squared distances to the start.

        A weighted mean's distances come from inner products [..., k, k]: rows are read but once.
        """
        pull = self._step(square, rows)
        inner = torch.where(rows.unsqueeze(-1) & rows.unsqueeze(-2), inner, 0.0)
        norm = inner.diagonal(dim1=-2, dim2=-1)
        for _ in range(self.iterations - 1):
            along = (inner @ pull.unsqueeze(-1)).squeeze(-1)
            size = (along * pull).sum(-1, keepdim=True)
            step = self._step(norm - 2 * along + size, rows)
            pull = torch.where(step.sum(-1, keepdim=True) > 0, step, pull)
        return pull

    def _step(self, square: Tensor, rows: Mask) -> Tensor:
        apart = square.nan_to_num(nan=math.inf, posinf=math.inf).clamp(min=0).sqrt()
        return shares(rows, 1.0 / apart.clamp(min=self.smoothing))

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

    def breaks_at(self, rows: int) -> int:
        return self.tolerates(rows) + 1
