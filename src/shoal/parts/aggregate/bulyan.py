"""Bulyan: Krum again and again, then the values on which the chosen rows agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._values import mean_near
from shoal.parts.aggregate.base import need_count, same_for_all
from shoal.parts.aggregate.krum import scores_of
from shoal.parts.aggregate.median import middle
from shoal.tensor.stack import nearest, or_center, squared_distances, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class Bulyan:
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

    byzantine: int = 1

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"byzantine": 2}, {"byzantine": 0})
    centered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_count("bulyan", "byzantine", self.byzantine, 0, "how many peers may be faulty")

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        if not x.shape[-2]:
            return or_center(x.sum(-2), rows.any(-1), center)
        received = mask.expand(rows.shape).sum(-1)
        picked = self._pick(x, rows, received)
        keep = (received - 4 * self.byzantine).clamp(min=1)
        near = mean_near(x, picked, middle(x, picked), keep, 2 * self.byzantine)
        return or_center(near, rows.any(-1), center)

    def _pick(self, x: Stack, rows: Mask, received: torch.Tensor) -> Mask:
        square = squared_distances(x, rows)
        square = torch.maximum(square, square.mT)
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

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

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
