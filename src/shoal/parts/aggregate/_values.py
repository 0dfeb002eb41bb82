"""Means of the values that lie nearest to a pivot, coordinate by coordinate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.tensor.types import Mask, Stack, Vector


def mean_near(x: Stack, rows: Mask, pivot: Vector, keep: Tensor, most: int) -> Vector:
    """Of each coordinate's values the mean of the `keep` nearest to the pivot's [..., dim].

    x as `usable` returns it; keep [...] >= 1; most: no more than so many rows that count may be
    left out, the others stay. Of two values equally far the lower one stays, so that the order of
    rows settles nothing. Zeros when no row counts.
    """
    full = torch.full((), math.inf, dtype=x.dtype, device=x.device)
    ordered = torch.where(rows.unsqueeze(-1), x, full).sort(-2).values
    count = rows.sum(-1)
    left = (count - keep).clamp(min=0).unsqueeze(-1)
    low = torch.zeros_like(pivot, dtype=torch.int64).unsqueeze(-2)
    high = (count - 1).clamp(min=0)[..., None, None].expand(low.shape)
    for step in range(min(most, x.shape[-2] - 1)):
        below = pivot - ordered.take_along_dim(low, -2).squeeze(-2)
        above = ordered.take_along_dim(high, -2).squeeze(-2) - pivot
        more = step < left
        upper = (more & (above >= below)).unsqueeze(-2)
        high = high - upper.long()
        low = low + (more.unsqueeze(-2) & ~upper).long()
    place = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
    inside = (place >= low) & (place <= high) & (count > 0)[..., None, None]
    share = 1.0 / (high - low + 1).to(x.dtype)
    # Divided first: a sum of values near the largest float would overflow.
    return (torch.where(inside, ordered, torch.zeros_like(full)) * share).sum(-2)


def near_pivot(honest: int, kept: int, byzantine: int, pivot: float) -> float:
    """Kappa of averaging, by coordinate, the `kept` values nearest to a pivot of that kappa.

    Each arbitrary value that is kept pairs with an honest one that is not and lies no nearer to the
    pivot. So the result is within (2/m) sqrt(b s) of a mean of m honest values, m kept of h, where
    s = h (1 + pivot) variances bounds the squares around the pivot; and such a mean is within
    sqrt((h - m)/m) deviations of the mean of all.
    """
    from_pairs = 2 * math.sqrt(min(byzantine, kept) * honest * (1 + pivot)) / kept
    return (from_pairs + math.sqrt(max(0, honest - kept) / kept)) ** 2
