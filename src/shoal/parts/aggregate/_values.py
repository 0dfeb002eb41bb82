"""Means of the values that lie nearest to a pivot, coordinate by coordinate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.tensor.ordered import places_with, sorted_rows, weighed
from shoal.tensor.stack import shares
from shoal.tensor.types import Mask, Stack, Vector, Weight


def mean_near(x: Stack, rows: Mask, pivot: Weight, keep: Tensor, most: int) -> Vector:
    """Of each coordinate's values the mean of the `keep` nearest to a pivot.

    x as `usable` returns it, at least one row. pivot: [..., k], the weights of values in ascending
    order whose mean it is, as for `ordered_mean`; keep [...] >= 1; most: no more than so many rows
    that count may be left out, the others stay. Of two values equally far the lower one stays, so
    that the order of rows settles nothing. Zeros when no row counts.
    """
    last = x.shape[-2] - 1
    count = rows.sum(-1)
    left = torch.minimum((count - keep).clamp(min=0), torch.full_like(count, min(most, last)))
    kept = (count - left).unsqueeze(-1)
    weight = shares(pivot > 0, pivot).to(x.dtype)
    places = places_with(weight)
    share = 1.0 / kept.clamp(min=1).to(x.dtype)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    step = torch.arange(min(most, last), device=x.device)
    beyond = (step + kept).clamp(max=last).unsqueeze(-1)
    candidate = (step < left.unsqueeze(-1)).unsqueeze(-1)
    found = []
    for row in sorted_rows(x, rows):
        point = weighed(row, weight, places).unsqueeze(-2)
        values = torch.stack(row, -2)
        # The i-th lowest value goes when it is farther away than the one that would come in for it.
        above = values.take_along_dim(beyond, -2) - point
        gone = candidate & (point - values[..., : len(step), :] > above)
        first = gone.sum(-2)
        mean = torch.zeros_like(row[0])
        for place, value in enumerate(row):
            inside = (first <= place) & (first > place - kept)
            # Divided first: a sum of values near the largest float would overflow.
            mean += torch.where(inside, value, zero) * share
        found.append(mean)
    return torch.cat(found, -1)


def near_pivot(honest: int, kept: int, byzantine: int, pivot: float) -> float:
    """Kappa of averaging, by coordinate, the `kept` values nearest to a pivot of that kappa.

    Each arbitrary value that is kept pairs with an honest one that is not and lies no nearer to the
    pivot. So the result is within (2/m) sqrt(b s) of a mean of m honest values, m kept of h, where
    s = h (1 + pivot) variances bounds the squares around the pivot; and such a mean is within
    sqrt((h - m)/m) deviations of the mean of all.
    """
    from_pairs = 2 * math.sqrt(min(byzantine, kept) * honest * (1 + pivot)) / kept
    return (from_pairs + math.sqrt(max(0, honest - kept) / kept)) ** 2
