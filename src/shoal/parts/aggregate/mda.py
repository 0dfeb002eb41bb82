"""Minimum diameter averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.aggregate._subsets import best_set, set_breaks_at
from shoal.parts.aggregate.base import Told
from shoal.tensor.distances import squared_distances
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class MDA(Told):
    """Mean of the set of all rows but `byzantine` whose two farthest members lie closest together.

    x: [..., k, dim]; weights are ignored. Of sets with one diameter the one with the smallest sum
    of squared distances counts. Rows that are not finite are left out first. All sets are tried:
    the time grows as the number of ways to choose `byzantine` of the rows, which is limited to
    200,000. Breaks when more than `byzantine` rows are arbitrary, or half of them.
    Source: El Mhamdi et al. 2021, section 4 (minimum diameter averaging; arXiv 2008.00742).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    >>> MDA(1)(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([1.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        square = squared_distances(x, rows)

        def worth(kept: Mask, order: Tensor) -> tuple[Tensor, Tensor]:
            apart = square.take_along_dim(order.unsqueeze(-1), -2)
            apart = apart.take_along_dim(order.unsqueeze(-2), -1).unsqueeze(-3)
            both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
            pairs = torch.where(both, apart, torch.zeros_like(apart)).flatten(-2)
            return pairs.amax(-1), pairs.sum(-1)

        return masked_mean(x, best_set("mda", rows, received, self.byzantine, worth))

    def tolerates(self, rows: int) -> int:
        return self.byzantine if rows > 2 * self.byzantine else 0

    def kappa(self, rows: int) -> float:
        """((b/m) sqrt(2h) + sqrt((h - g)/g))^2, m = n - byzantine kept, at least g = m - b honest.

        No set of honest rows is wider than sqrt(2h) deviations, so the best set is not either: each
        arbitrary row in it is within that of the mean of the honest ones.
        """
        bad = self.tolerates(rows)
        honest, kept = rows - bad, max(1, rows - self.byzantine)
        good = kept - bad
        moved = bad / kept * math.sqrt(2 * honest)
        return (moved + math.sqrt(max(0, honest - good) / good)) ** 2

    def breaks_at(self, rows: int) -> int:
        return set_breaks_at(rows, self.byzantine)
