"""The covariance-bound agnostic filter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.aggregate.base import Told, bounded_products
from shoal.tensor.stack import certain, masked_mean
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class CAF(Told):
    """A weighted mean whose rows lose weight the farther they lie along the worst direction.

    x: [..., k, dim]; the weights of senders are ignored. All rows begin with weight 1. Again and
    again the direction of the largest variance is found and row i keeps 1 - t_i / max t of its
    weight, t_i its squared distance to the mean along that direction, until n - 2 byzantine of n
    are left; of all means on the way the one with the smallest largest variance counts. No bound on
    the honest variance need be known. Rows that are not finite weigh nothing. Works on k x k inner
    products; at most k steps. Breaks when more than `byzantine` rows are arbitrary or
    n <= 3 byzantine. Source: Allouah et al. 2025, algorithm 2 (arXiv 2505.01874).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    >>> CAF(1)(x, mask=torch.ones(4, dtype=torch.bool)).round(decimals=1)
    tensor([1.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        return masked_mean(x, rows, self._weights(bounded_products(x, rows), rows, received))

    def _weights(self, inner: Tensor, rows: Mask, received: Tensor) -> Tensor:
        weight = rows.to(torch.float64)
        best, least = weight, torch.full_like(weight[..., 0], math.inf)
        enough = (received - 2 * self.byzantine).clamp(min=1).to(torch.float64)
        done = torch.zeros_like(least, dtype=torch.bool)
        for _ in range(rows.shape[-1]):
            total = weight.sum(-1, keepdim=True)
            share = weight / torch.where(total > 0, total, 1.0)
            # Rows without weight must not enter as 0 times something vast.
            both = (weight > 0).unsqueeze(-1) & (weight > 0).unsqueeze(-2)
            products = torch.where(both, inner, 0.0)
            with_mean = (products @ share.unsqueeze(-1)).squeeze(-1)
            of_mean = (share * with_mean).sum(-1)[..., None, None]
            around = products - with_mean.unsqueeze(-1) - with_mean.unsqueeze(-2) + of_mean
            around = torch.where(both, around, 0.0)
            root = share.sqrt()
            size, axes = torch.linalg.eigh(root.unsqueeze(-1) * around * root.unsqueeze(-2))
            top = size[..., -1]
            better = ~done & (top < least)
            best = torch.where(better.unsqueeze(-1), weight, best)
            least = torch.where(better, top, least)
            along = (around @ (root * axes[..., -1]).unsqueeze(-1)).squeeze(-1).abs()
            farthest = along.amax(-1, keepdim=True)
            kept = weight * (1 - (along / torch.where(farthest > 0, farthest, 1.0)).square())
            # One of the farthest loses all, whatever rounding says, so that every step counts.
            kept = torch.where((along >= farthest) & (farthest > 0), 0.0, kept)
            done = done | (kept.sum(-1) <= enough) | (farthest.squeeze(-1) <= 0)
            weight = torch.where(done.unsqueeze(-1), weight, kept)
            if certain(done):
                break
        return best

    def tolerates(self, rows: int) -> int:
        return self.byzantine if rows > 3 * self.byzantine else 0

    def kappa(self, rows: int) -> float:
        """(sqrt(2 b h) + sqrt(2 b (h - 2b)))^2 / (h - 2b)^2, h = n - b honest.

        As long as arbitrary rows have the larger part of the variance they lose the larger part of
        the weight. At the first step at which they have not, at most b of the honest weight is gone
        and the variance is at most 2h/(h - 2b); the mean that counts has no larger one, and honest
        weight of h - 2b or more.
        """
        bad = self.tolerates(rows)
        if bad < self.byzantine:
            return math.inf
        honest = rows - bad
        good = honest - 2 * bad
        return (math.sqrt(2 * bad * honest) + math.sqrt(2 * bad * good)) ** 2 / good**2

    def breaks_at(self, rows: int) -> int:
        """2 byzantine rows, each far beyond the one before, each in a step of its own: all but the
        last have lost their weight when the filter stops."""
        return max(1, 2 * self.byzantine)
