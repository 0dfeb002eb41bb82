"""The algebra of masked stacks `[..., k, dim]` that robust rules share.

A row counts when its mask says so and all its numbers are finite; `usable` does that once, puts
zeros into the other rows, and everything else here takes its two results. Distances are float64
whatever the stack holds, and NaN marks the distance of a row that does not count: sorting puts NaN
behind infinity, so such a row loses every comparison, even against a row that overflowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from shoal.tensor.types import Mask, Stack, Vector, Weight

# Numbers converted to float64 at a time: they stay in a core's cache, and 100 stacks of 100 large
# vectors never exist twice. Fixed, because a limit that follows free memory would change low bits.
_CHUNK = 1 << 18

# Up to this many rows a network of row-wise minima and maxima beats sorting columns (2.7 times at
# 100 rows, 4 times at 22, on one core).
_NETWORK_ROWS = 128


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


def usable(x: Stack, mask: Mask) -> tuple[Stack, Mask]:
    """The stack with zeros in rows that do not count, and which rows do, bool [..., k].

    mask may lack leading axes of x.
    """
    rows = finite_rows(x) & mask
    return torch.where(rows.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device)), rows


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
    first = rows & (rows.cumsum(-1) == 1)
    return combine(first, x)


def ordered_mean(x: Stack, rows: Mask, weight: Weight) -> Vector:
    """Weighted mean over places, of each coordinate's values in ascending order.

    weight: [..., k], of the value at each place; places without weight do not enter, whatever they
    hold. Leading axes of x may be missing or 1 where rows has more: receivers of the same rows need
    no copies of them.

    >>> x = torch.tensor([[3.0], [1.0], [2.0], [9.0]])
    >>> here = torch.ones(4, dtype=torch.bool)
    >>> ordered_mean(x, here, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    tensor([2.5000])
    """
    count, dim = x.shape[-2:]
    lead = torch.broadcast_shapes(x.shape[:-2], rows.shape[:-1])
    weight = shares(weight > 0, weight).to(x.dtype).unsqueeze(-1)
    full = torch.full((), float("inf"), dtype=x.dtype, device=x.device)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if count > _NETWORK_ROWS:
        ordered = torch.where(rows.unsqueeze(-1), x, full).expand(*lead, count, dim).sort(-2).values
        return (torch.where(weight > 0, ordered, zero) * weight).sum(-2)
    out = torch.zeros(*lead, dim, dtype=x.dtype, device=x.device)
    width = max(64, _CHUNK * dim // max(1, 4 * out.numel()))
    for source, target in zip(x.split(width, -1), out.split(width, -1), strict=True):
        here = rows.unsqueeze(-1)
        row = [torch.where(here[..., i, :], source[..., i, :], full) for i in range(count)]
        _sort_rows(row)
        for i, values in enumerate(row):
            share = weight[..., i, :]
            target += torch.where(share > 0, values, zero) * share
    return out


def _sort_rows(row: list[Tensor]) -> None:
    """Put tensors of one shape into ascending order, entry by entry, in place."""
    if len(row) < 2:
        return
    spare = torch.empty_like(row[0])
    for low, high in _network(len(row)):
        torch.minimum(row[low], row[high], out=spare)
        torch.maximum(row[low], row[high], out=row[high])
        row[low], spare = spare, row[low]


@cache
def _network(count: int) -> tuple[tuple[int, int], ...]:
    """Comparators of Batcher's odd-even merge sort (Knuth, volume 3, algorithm 5.2.2M)."""
    pairs = []
    block = 1
    while block < count:
        step = block
        while step:
            for start in range(step % block, count - step, 2 * step):
                pairs += [
                    (low, low + step)
                    for low in range(start, min(start + step, count - step))
                    if low // (2 * block) == (low + step) // (2 * block)
                ]
            step //= 2
        block *= 2
    return tuple(pairs)


def distances_to(x: Stack, rows: Mask, point: Vector) -> Tensor:
    """Euclidean distance of each row to `point` [..., dim]: float64 [..., k], NaN = not counted."""
    square = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    for part in _around(x, point):
        square += torch.linalg.vector_norm(part, dim=-1).square()
    # A difference that overflows is infinitely far, also where infinity met infinity.
    apart = square.sqrt().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.where(rows, apart, float("nan"))


def _around(x: Stack, point: Vector) -> Iterator[Stack]:
    """x - point in float64, some coordinates at a time."""
    width = max(64, _CHUNK * x.shape[-1] // max(1, x.numel()))
    for start in range(0, x.shape[-1], width):
        near = point[..., start : start + width].to(torch.float64).unsqueeze(-2)
        yield x[..., start : start + width].to(torch.float64) - near


def squared_distances(x: Stack, rows: Mask) -> Tensor:
    """Squared Euclidean distance of every pair of rows: float64 [..., k, k], NaN = not counted.

    From Gram matrices (k^2 dim multiplications, memory k^2): a rough one in the rows' own precision
    finds a row that has a majority near it, then one in float64 around that row keeps the digits
    of rows that lie close together and far from the origin. Around a mean it would not: one row of
    1e38 takes the mean along. Squares above 1e308 count as infinite.

    >>> x = torch.tensor([[0.0], [3.0], [4.0]])
    >>> squared_distances(x, torch.ones(3, dtype=torch.bool))[0].tolist()
    [0.0, 9.0, 16.0]
    """
    if x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-1], 0), dtype=torch.float64)
    square = _from_gram(inner_products(x, rows))
    both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return torch.where(both, square, float("nan"))


def inner_products(x: Stack, rows: Mask) -> Tensor:
    """Gram matrices float64 [..., k, k] of the rows around a row that has a majority near it.

    Squared distances of weighted means follow without the rows themselves: with weights w of sum 1,
    |x_i - sum_j w_j x_j|^2 = G_ii - 2 (G w)_i + w G w. Entries of rows that do not count have no
    meaning.
    """
    return _gram(x, majority_row(x, rows))


def _gram(x: Stack, pivot: Vector) -> Tensor:
    total = torch.zeros((*x.shape[:-1], x.shape[-2]), dtype=torch.float64, device=x.device)
    for part in _around(x, pivot):
        total += part @ part.mT
    return total


def _from_gram(inner: Tensor) -> Tensor:
    norm = inner.diagonal(dim1=-2, dim2=-1)
    square = norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * inner
    square = square.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=0)
    same = torch.eye(inner.shape[-1], dtype=torch.bool, device=inner.device)
    return torch.where(same, torch.zeros_like(square), square)


def majority_row(x: Stack, rows: Mask) -> Vector:
    """A row within whose reach lies a majority at the smallest radius: never a lone outlier."""
    plain = x.to(torch.promote_types(x.dtype, torch.float32))
    square = _from_gram(plain @ plain.mT)
    far = torch.where(rows.unsqueeze(-2), square, float("inf")).sort(-1).values
    half = (rows.sum(-1) // 2).clamp(max=x.shape[-2] - 1)
    radius = far.take_along_dim(half[..., None, None], -1).squeeze(-1)
    radius = torch.where(rows, radius, float("nan"))
    return combine(nearest(radius, 1), x)


def nearest(distance: Tensor, keep: int | Tensor) -> Mask:
    """The `keep` smallest entries along the last axis, bool [..., k]; ties go to the lower index.

    keep: a number or [...]; entries that are NaN are never kept.

    >>> nearest(torch.tensor([2.0, 1.0, 2.0, float("nan")]), 2).tolist()
    [True, True, False, False]
    """
    rank = distance.argsort(stable=True, dim=-1).argsort(dim=-1)
    limit = keep.unsqueeze(-1) if isinstance(keep, Tensor) else keep
    return (rank < limit) & ~torch.isnan(distance)
