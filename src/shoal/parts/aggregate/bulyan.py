"""Bulyan: Krum again and again, then the values on which the chosen rows agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.aggregate._values import mean_near
from shoal.parts.aggregate.base import Told
from shoal.parts.aggregate.krum import scores_of
from shoal.tensor.distances import squared_distances
from shoal.tensor.ordered import middle_places
from shoal.tensor.stack import nearest
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class Bulyan(Told):
    """Of rows that Krum picks one by one, each coordinate's mean of the values near the median.

    x: [..., k, dim]; weights are ignored. Of n rows received n - 2 byzantine are picked, each time
    the one with the best Krum score among those left; of their values the n - 4 byzantine nearest
    to the median are averaged (at least one each). Rows that are not finite are never picked before
    others. The second step bounds what a row that fooled Krum does to a single coordinate. Breaks
    when more than `byzantine` rows are arbitrary or n < 4 byzantine + 3.
    Source: El Mhamdi et al. 2018, section 4 (arXiv 1802.07927).

    >>> x = torch.tensor([[0.0], [1.0], [1.5], [2.0], [2.5], [4.0], [99.0]])
    >>> Bulyan(1)(x, mask=torch.ones(7, dtype=torch.bool))
    tensor([2.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        picked = self._pick(x, rows, received)
        keep = (received - 4 * self.byzantine).clamp(min=1)
        return mean_near(x, picked, middle_places(picked), keep, 2 * self.byzantine)

    def _pick(self, x: Stack, rows: Mask, received: Tensor) -> Mask:
        square = squared_distances(x, rows)
        wanted = (received - 2 * self.byzantine).clamp(min=1)
        left, picked = rows, torch.zeros_like(rows)
        for step in range(max(1, x.shape[-2] - 2 * self.byzantine)):
            score = scores_of(square, left, received - step, self.byzantine)
            # Two rows that are nearest to each other tie: the one nearer to all others goes first.
            tied = score == score.nan_to_num(nan=math.inf).amin(-1, keepdim=True)
            both = left.unsqueeze(-1) & left.unsqueeze(-2)
            apart = torch.where(both, square, torch.zeros_like(square)).sum(-1)
            best = nearest(torch.where(tied & left, apart, math.nan), 1)
            best = best & (step < wanted).unsqueeze(-1)
            left, picked = left & ~best, picked | best
        return picked

    def tolerates(self, rows: int) -> int:
        return self.byzantine if rows >= 4 * self.byzantine + 3 else 0

    def kappa(self, rows: int) -> float:
        """Whatever Krum picks: t = n - 2b rows with at most b arbitrary ones, m = n - 4b kept.

        The median of the picked is within sqrt(2h/(t - 2b)) deviations of the mean, since as many
        honest picked rows lie as far away. Each arbitrary value that is kept pairs with an honest
        picked one that is not: as `near_pivot`, with the pairs' distances to the pivot bounded by
        the triangle inequality.
        """
        bad = self.tolerates(rows)
        honest, kept = rows - bad, max(1, rows - 4 * self.byzantine)
        subset = math.sqrt(max(0, honest - kept) / kept)
        if not bad:
            return subset**2
        pivot = math.sqrt(2 * honest / (rows - 4 * bad))
        pairs = 2 * math.sqrt(bad) * (math.sqrt(honest) + math.sqrt(bad) * pivot) / kept
        return (pairs + subset) ** 2

    def breaks_at(self, rows: int) -> int:
        """With 2b + 1 of them picked, one value is kept.

        Equal rows are picked first as long as they are a majority of those left; and of 4b + 1 so
        many are picked whatever their scores are.
        """
        return min(4 * self.byzantine + 1, (rows + 2 * self.byzantine) // 2 + 1)
