"""The algebra of masked stacks `[..., k, dim]` that robust rules share: who counts, and means.

A row counts when its mask says so and all its numbers are finite; `usable` does that once, puts
zeros into the other rows, and everything else takes its two results: here, in `distances` and in
`ordered`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.tensor.types import Index, Mask, Stack, Vector, Weight

MOST_ROWS = 128
"""Up to this many rows a network of row-wise minima and maxima beats sorting columns (2.7 times at
100 rows, 4 times at 22, on one core), and compiled loops take a stack."""

# Numbers in a stack from which on compiled loops are worth loading the compiler; a constant, so
# that the same stack is always treated alike.
_LEAST = 1 << 17


def finite_rows(x: Stack) -> Mask:
    """Which rows hold finite numbers only, bool [..., k].

    >>> finite_rows(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
    tensor([ True, False])
    """
    if x.shape[-1] == 0:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    # Two reductions without a temporary; isfinite(x).all() writes and reads one byte a number.
    return torch.isfinite(x.amax(-1)) & torch.isfinite(x.amin(-1))


def certain(flags: Mask) -> bool:
    """Whether every flag is set; False where values cannot be looked at (the meta device)."""
    return not flags.is_meta and bool(flags.all())


def usable(x: Stack, mask: Mask | None = None) -> tuple[Stack, Mask]:
    """The stack with zeros in rows that do not count, and which rows do, bool [..., k].

    mask may lack leading axes of x; None = all rows are there. Nothing may be written into the
    result: where all rows count it is x itself.
    """
    if mask is None:
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    # A sum is not finite when a number is not. One look at it spares a copy of everything; on a
    # device the copy costs less than the wait for that look.
    if x.is_cpu and mask.dim() < x.dim() and certain(mask) and certain(torch.isfinite(x.sum(-1))):
        return x, mask.expand(x.shape[:-1])
    rows = finite_rows(x) & mask
    return torch.where(rows.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device)), rows


def large(x: Stack) -> bool:
    """Whether a stack goes through compiled loops, one [k, dim] at a time.

    Only its own size decides, so that it has the same numbers alone and among others.
    """
    fits = x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.shape[-2] <= MOST_ROWS
    return fits and x.shape[-2] * x.shape[-1] >= _LEAST


def shares(mask: Mask, weight: Weight | None = None) -> Tensor:
    """Weights of the rows that count, summing to 1, float64 [..., k]; all zero when none counts.

    A weight that is negative or not finite counts as 0: it comes from the sender.

    >>> shares(torch.tensor([True, False, True]), torch.tensor([1.0, 5.0, 3.0])).tolist()
    [0.25, 0.0, 0.75]
    """
    if weight is None:
        part = mask.to(torch.float64)
    else:
        part = weight.to(torch.float64)
        good = mask & torch.isfinite(part) & (part > 0)
        part = torch.where(good, part, torch.zeros_like(part))
        if part.shape[-1]:
            # Weights near the largest float would overflow in the sum.
            top = part.amax(-1, keepdim=True)
            part = part / torch.where(top > 0, top, torch.ones_like(top))
    total = part.sum(-1, keepdim=True)
    return part / torch.where(total > 0, total, torch.ones_like(total))


def combine(share: Tensor, x: Stack) -> Vector:
    """Sum over rows of share [..., k] times x [..., k, dim]; one pass, no temporary stack."""
    return torch.matmul(share.to(x.dtype).unsqueeze(-2), x).squeeze(-2)


def masked_mean(x: Stack, rows: Mask, weight: Weight | None = None) -> Vector:
    """Weighted mean of the rows that count; zeros when there is none. x as `usable` returns it.

    >>> x, rows = usable(torch.tensor([[1.0], [float("inf")], [3.0]]), torch.ones(3, dtype=bool))
    >>> masked_mean(x, rows)
    tensor([2.])
    """
    return combine(shares(rows, weight), x)


def or_center(value: Vector, some: Mask, center: Vector | None) -> Vector:
    """`value` where `some` [...] row counts, else the center, else zeros."""
    other = torch.zeros_like(value) if center is None else center.to(value.dtype)
    return torch.where(some.unsqueeze(-1), value, other)


def first_usable(x: Stack, rows: Mask) -> Vector:
    """The lowest row that counts, [..., dim]; zeros when there is none."""
    return picked_row(x, rows)


def picked_row(x: Stack, chosen: Mask) -> Vector:
    """The lowest chosen row, [..., dim]; without one, the first row."""
    if not x.shape[-2]:
        return x.sum(-2)
    place = chosen.to(torch.int8).argmax(-1)[..., None, None]
    return x.take_along_dim(place.expand(*place.shape[:-1], x.shape[-1]), -2).squeeze(-2)


def grouped_means(x: Stack, group: Index, groups: int) -> tuple[Stack, Mask]:
    """Mean of the rows of each group [..., groups, dim], and which groups have any.

    group: [..., k], the number of the group that a row is in; -1 = none.
    """
    number = torch.arange(groups, device=x.device).unsqueeze(-1)
    member = group.unsqueeze(-2) == number
    held = member.sum(-1)
    share = 1.0 / held.clamp(min=1).to(x.dtype)
    if large(x):
        return _grouped_means(x, member, share), held > 0
    return (member.to(x.dtype) * share.unsqueeze(-1)) @ x, held > 0


def _grouped_means(x: Stack, member: Mask, share: Tensor) -> Stack:
    from shoal.tensor import compiled

    lead, dim = member.shape[:-2], x.shape[-1]
    out = torch.empty(*member.shape[:-1], dim, dtype=x.dtype, device=x.device)
    x = x.expand(*lead, *x.shape[-2:])
    for place in np.ndindex(*lead):
        here = [np.flatnonzero(each) for each in member[place].numpy()]
        index = np.full((len(here), max([1, *map(len, here)])), -1)
        for number, each in enumerate(here):
            index[number, : len(each)] = each
        values, factor = x[place].detach().contiguous().numpy(), share[place].numpy()
        compiled.means(values, index, factor, out[place].numpy())
    return out


def nearest(distance: Tensor, keep: int | Tensor) -> Mask:
    """The `keep` smallest entries along the last axis, bool [..., k]; ties go to the lower index.

    keep: a number or [...]; entries that are NaN are never kept.

    >>> nearest(torch.tensor([2.0, 1.0, 2.0, float("nan")]), 2).tolist()
    [True, True, False, False]
    """
    rank = distance.argsort(stable=True, dim=-1).argsort(dim=-1)
    limit = keep.unsqueeze(-1) if isinstance(keep, Tensor) else keep
    return (rank < limit) & ~torch.isnan(distance)
