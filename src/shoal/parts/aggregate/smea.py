"""Smallest maximum eigenvalue averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.aggregate._subsets import best_set, set_breaks_at
from shoal.parts.aggregate.base import Told, bounded_products
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class SMEA(Told):
    """Mean of the set of all rows but `byzantine` that vary least in their worst direction.

    x: [..., k, dim]; weights are ignored. The worst direction is the one of the largest eigenvalue
    of the set's covariance, from k x k inner products; of sets that tie the one with the smallest
    total variance counts. Rows that are not finite are left out first. All sets are tried: the time
    grows as the number of ways to choose `byzantine` of the rows, which is limited to 200,000.
    Breaks when more than `byzantine` rows are arbitrary, or half of them.
    Source: Allouah et al. 2023, section 5 (arXiv 2302.04787).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    >>> SMEA(1)(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([1.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        inner = bounded_products(x, rows)

        def worth(kept: Mask, order: Tensor) -> tuple[Tensor, Tensor]:
            products = inner.take_along_dim(order.unsqueeze(-1), -2)
            products = products.take_along_dim(order.unsqueeze(-2), -1).unsqueeze(-3)
            size = kept.sum(-1, keepdim=True).clamp(min=1)
            share = kept.to(torch.float64) / size
            with_mean = (products @ share.unsqueeze(-1)).squeeze(-1)
            of_mean = (share * with_mean).sum(-1)[..., None, None]
            around = products - with_mean.unsqueeze(-1) - with_mean.unsqueeze(-2) + of_mean
            both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
            around = torch.where(both, around, torch.zeros_like(around)) / size.unsqueeze(-1)
            trace = around.diagonal(dim1=-2, dim2=-1).sum(-1)
            return torch.linalg.eigvalsh(around)[..., -1], trace

        return masked_mean(x, best_set("smea", rows, received, self.byzantine, worth))

    def tolerates(self, rows: int) -> int:
        return self.byzantine if rows > 2 * self.byzantine else 0

    def kappa(self, rows: int) -> float:
        """(sqrt(b h/(g m)) + sqrt((h - g)/g))^2, m = n - byzantine kept, g = m - b honest or more.

        A set of m honest rows has a largest eigenvalue of at most h/m variances, so the best set
        has: between its b arbitrary and g honest rows it leaves room for no more.
        """
        bad = self.tolerates(rows)
        honest, kept = rows - bad, max(1, rows - self.byzantine)
        good = kept - bad
        moved = math.sqrt(bad * honest / (good * kept))
        return (moved + math.sqrt(max(0, honest - good) / good)) ** 2

    def breaks_at(self, rows: int) -> int:
        return set_breaks_at(rows, self.byzantine)
