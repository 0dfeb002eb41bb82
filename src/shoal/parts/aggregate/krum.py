"""Krum: the row that lies closest to its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.aggregate.base import Told
from shoal.tensor.distances import squared_distances
from shoal.tensor.stack import nearest, picked_row
from shoal.tensor.types import Mask, Scalar, Stack, Vector


@dataclass(frozen=True)
class Krum(Told):
    """The received row with the smallest sum of squared distances to its nearest others.

    x: [..., k, dim]. Of n rows received, n - byzantine - 2 neighbours count (at least one); ties go
    to the lower index; rows that are not finite are the farthest. Breaks when more than `byzantine`
    rows are arbitrary or n < 2 byzantine + 3. The result is a single peer's vector, so the noise of
    honest rows is not averaged. Source: Blanchard et al. 2017, section 4.

    >>> x = torch.tensor([[0.0], [1.0], [1.5], [2.5], [99.0]])
    >>> Krum(1)(x, mask=torch.ones(5, dtype=torch.bool))
    tensor([1.])
    """

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        return picked_row(x, nearest(scores(x, rows, received, self.byzantine), 1))

    def tolerates(self, rows: int) -> int:
        return max(0, min(self.byzantine, rows - self.byzantine - 3))

    def kappa(self, rows: int) -> float:
        """6h/q with h honest rows and q = n - byzantine - 2 - f honest neighbours for certain.

        The least score is at most the honest rows' mean score, 2h variances; the chosen row's
        distance to the mean is bounded through its q honest neighbours.
        """
        bad = self.tolerates(rows)
        return 6.0 * (rows - bad) / max(1, rows - self.byzantine - 2 - bad)

    def breaks_at(self, rows: int) -> int:
        return best_score_at(rows, self.byzantine)


def best_score_at(rows: int, byzantine: int) -> int:
    """How many equal arbitrary rows, far away, have the best score among so many.

    Each has enough neighbours at distance 0, or, as a majority, fewer at a large one than an honest
    row has.
    """
    return min(max(1, rows - byzantine - 2) + 1, rows // 2 + 1)


def scores(x: Stack, rows: Mask, received: Tensor, byzantine: int) -> Scalar:
    """Krum's score of each row, float64 [..., k], NaN for rows that do not count.

    received: [...], rows in hand, the ones that are not finite included.
    """
    return scores_of(squared_distances(x, rows), rows, received, byzantine)


def scores_of(square: Tensor, rows: Mask, received: Tensor, byzantine: int) -> Scalar:
    """The same from squared distances [..., k, k], among those rows only."""
    both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    same = torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
    others = torch.where(both & ~same, square, float("nan"))
    neighbors = (received - byzantine - 2).clamp(min=1)[..., None]
    close = nearest(others, neighbors.expand(rows.shape))
    total = torch.where(close, square, torch.zeros_like(square)).sum(-1)
    return torch.where(rows, total, float("nan"))
