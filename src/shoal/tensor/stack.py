"""The algebra of masked stacks `[..., k, dim]` that robust rules share.

A row counts when its mask says so and all its numbers are finite; `usable` does that once, puts
zeros into the other rows, and everything else here takes its two results. Distances are float64
whatever the stack holds, and NaN marks the distance of a row that does not count: sorting puts NaN
behind infinity, so such a row loses every comparison, even against a row that overflowed.
"""

from __future__ import annotations

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


def masked_sort(x: Stack, rows: Mask) -> Stack:
    """Each coordinate ascending over the rows that count; the other places hold +inf, at the end.

    >>> x = torch.tensor([[3.0], [1.0], [2.0]])
    >>> masked_sort(x, torch.tensor([True, True, False])).flatten().tolist()
    [1.0, 3.0, inf]
    """
    # Absent rows become +inf first: as zeros they would take the place of honest ones.
    full = torch.full((), float("inf"), dtype=x.dtype, device=x.device)
    x = torch.where(rows.unsqueeze(-1), x, full)
    count, dim = x.shape[-2:]
    if count > _NETWORK_ROWS:
        return x.sort(-2).values
    if count < 2 or x.numel() == 0:
        return x
    width = max(64, _CHUNK * count // (4 * x.numel() // dim) or 1)
    out = torch.empty_like(x)
    for source, target in zip(x.split(width, -1), out.split(width, -1), strict=True):
        _sort_rows(source, target)
    return out


def _sort_rows(x: Stack, out: Stack) -> None:
    row = [part.clone() for part in x.unbind(-2)]
    spare = torch.empty_like(row[0])
    for low, high in _network(len(row)):
        torch.minimum(row[low], row[high], out=spare)
        torch.maximum(row[low], row[high], out=row[high])
        row[low], spare = spare, row[low]
    torch.stack(row, -2, out=out) if out.is_contiguous() else out.copy_(torch.stack(row, -2))


_networks: dict[int, tuple[tuple[int, int], ...]] = {}


def _network(count: int) -> tuple[tuple[int, int], ...]:
    """Comparators of Batcher's odd-even merge sort (Knuth, volume 3, algorithm 5.2.2M)."""
    known = _networks.get(count)
    if known is not None:
        return known
    pairs = []
    block = 1
    while block < count:
        step = block
        while step:
            for start in range(step % block, count - step, 2 * step):
                for low in range(start, min(start + step, count - step)):
                    if low // (2 * block) == (low + step) // (2 * block):
                        pairs.append((low, low + step))
            step //= 2
        block *= 2
    return _networks.setdefault(count, tuple(pairs))


def distances_to(x: Stack, rows: Mask, point: Vector) -> Tensor:
    """Euclidean distance of each row to `point` [..., dim]: float64 [..., k], NaN = not counted."""
    apart = torch.linalg.vector_norm(x - point.unsqueeze(-2), dim=-1, dtype=torch.float64)
    # A difference that overflows is infinitely far, also where infinity met infinity.
    return torch.where(rows, apart.nan_to_num(nan=float("inf"), posinf=float("inf")), float("nan"))


def squared_distances(x: Stack, rows: Mask) -> Tensor:
    """Squared Euclidean distance of every pair of rows: float64 [..., k, k], NaN = not counted.

    From one Gram matrix (k^2 dim multiplications, memory k^2), in float64: its rounding stays below
    what float32 rows can tell apart, and a row of 1e38 spoils nobody else's distances, which
    subtracting a mean would. Rows that are float64 themselves get a second pass around a row that
    has a majority near it. Squares above 1e308 count as infinite.

    >>> x = torch.tensor([[0.0], [3.0], [4.0]])
    >>> squared_distances(x, torch.ones(3, dtype=torch.bool))[0].tolist()
    [0.0, 9.0, 16.0]
    """
    if x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-1], 0), dtype=torch.float64)
    square = _from_gram(_gram(x, None))
    if x.dtype == torch.float64:
        square = _from_gram(_gram(x, _pivot(x, rows, square)))
    both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return torch.where(both, square, float("nan"))


def _gram(x: Stack, pivot: Vector | None) -> Tensor:
    *lead, count, dim = x.shape
    total = torch.zeros((*lead, count, count), dtype=torch.float64, device=x.device)
    width = max(64, _CHUNK * dim // max(1, x.numel()))
    for start in range(0, dim, width):
        part = x[..., start : start + width].to(torch.float64)
        if pivot is not None:
            part = part - pivot[..., start : start + width].unsqueeze(-2)
        total += part @ part.mT
    return total


def _from_gram(inner: Tensor) -> Tensor:
    norm = inner.diagonal(dim1=-2, dim2=-1)
    square = norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * inner
    square = square.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp(min=0)
    same = torch.eye(inner.shape[-1], dtype=torch.bool, device=inner.device)
    return torch.where(same, torch.zeros_like(square), square)


def _pivot(x: Stack, rows: Mask, square: Tensor) -> Vector:
    """A row within whose reach lies a majority at the smallest radius: never a lone outlier."""
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
    rank = distance.argsort(-1, stable=True).argsort(-1, stable=True)
    limit = keep.unsqueeze(-1) if isinstance(keep, Tensor) else keep
    return (rank < limit) & ~torch.isnan(distance)
