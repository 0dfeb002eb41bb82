"""The algebra of masked stacks `[..., k, dim]` that robust rules share.

A row counts when its mask says so and all its numbers are finite; `usable` does that once, puts
zeros into the other rows, and everything else here takes its two results. Distances are float64
whatever the stack holds, and NaN marks the distance of a row that does not count: sorting puts NaN
behind infinity, so such a row loses every comparison, even against a row that overflowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.tensor.types import Index, Mask, Stack, Vector, Weight

# Numbers converted to float64 at a time: they stay in a core's cache, and 100 stacks of 100 large
# vectors never exist twice. Fixed, because a limit that follows free memory would change low bits.
_CHUNK = 1 << 18

# Up to this many rows a network of row-wise minima and maxima beats sorting columns (2.7 times at
# 100 rows, 4 times at 22, on one core).
_NETWORK_ROWS = 128

# Numbers of one row that a step of the network takes at a time: all rows stay in a core's cache,
# and calls are still few; on a device fewer calls count for more.
_LANE, _FAR_LANE = 1 << 13, 1 << 16

# Numbers in a stack from which on compiled loops are worth loading the compiler; a constant, so
# that the same stack is always treated alike.
_LEAST = 1 << 17

# How much farther from the nearest majority than it is wide a pivot may lie (squared), which costs
# as many of the 2^52 that float64 tells apart; and how many pivots are tried.
_NEAR, _PIVOTS = 1 << 10, 4


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

    mask may lack leading axes of x. Nothing may be written into the result: where all rows count it
    is x itself.
    """
    # A sum is not finite when a number is not. One look at it spares a copy of everything; on a
    # device the copy costs less than the wait for that look.
    if x.is_cpu and mask.dim() < x.dim() and certain(mask) and certain(torch.isfinite(x.sum(-1))):
        return x, mask.expand(x.shape[:-1])
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
    if _large(x):
        return _grouped_means(x, member, share), held > 0
    return (member.to(x.dtype) * share.unsqueeze(-1)) @ x, held > 0


def middle_places(rows: Mask) -> Weight:
    """For `ordered_mean`: the middle one or two of the rows that count, float64 [..., k]."""
    count = rows.sum(-1, keepdim=True)
    place = torch.arange(rows.shape[-1], device=rows.device)
    chosen = (place == (count - 1) // 2) | (place == count // 2)
    return (chosen & (count > 0)).to(torch.float64)


def trimmed_places(rows: Mask, trim: int) -> Weight:
    """For `ordered_mean`: all of the rows that count but `trim` at each end, or as many as leave
    the middle; float64 [..., k]."""
    count = rows.sum(-1, keepdim=True)
    cut = ((count - 1) // 2).clamp(min=0, max=trim)
    place = torch.arange(rows.shape[-1], device=rows.device)
    return ((place >= cut) & (place < count - cut)).to(torch.float64)


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
    if not x.shape[-2]:
        return x.sum(-2)
    weight = shares(weight > 0, weight).to(x.dtype)
    if _large(x):
        return _ordered_mean(x, rows, weight)
    wanted = places_with(weight)
    return torch.cat([weighed(row, weight, wanted) for row in sorted_rows(x, rows, wanted)], -1)


def places_with(weight: Weight) -> tuple[int, ...]:
    """Places that weigh something in any of the stacks; all of them where nobody may look."""
    count = weight.shape[-1]
    if not weight.is_cpu:
        return tuple(range(count))
    some = (weight > 0).reshape(-1, count).any(0)
    return tuple(some.nonzero().flatten().tolist())


def weighed(row: Sequence[Tensor], weight: Weight, places: Sequence[int]) -> Vector:
    """Sum over places of weight [..., k] times values [..., width]; what weighs nothing may be
    infinite."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    lead = torch.broadcast_shapes(row[0].shape, (*weight.shape[:-1], 1))
    total = torch.zeros(lead, dtype=weight.dtype, device=weight.device)
    for place in places:
        share = weight[..., place, None]
        total += torch.where(share > 0, row[place], zero) * share
    return total


def sorted_rows(
    x: Stack, rows: Mask, wanted: tuple[int, ...] | None = None
) -> Iterator[list[Tensor]]:
    """Each coordinate's values in ascending order, some coordinates at a time.

    A list of k tensors [..., width]; rows that do not count come last, as infinity. Leading axes of
    x may be missing or 1 where rows has more. wanted: the places that the caller looks at, None =
    all; what the others hold has no meaning.
    """
    count = x.shape[-2]
    lead = torch.broadcast_shapes(x.shape[:-2], rows.shape[:-1])
    full = torch.full((), float("inf"), dtype=x.dtype, device=x.device)
    here = rows.unsqueeze(-1)
    lane = _LANE if x.is_cpu else _FAR_LANE
    width = max(64, lane // max(1, math.prod(lead)))
    for source in x.split(width, -1):
        if count > _NETWORK_ROWS:
            values = torch.where(here, source, full).expand(*lead, *source.shape[-2:])
            yield list(values.sort(-2).values.unbind(-2))
            continue
        row = [torch.where(here[..., i, :], source[..., i, :], full) for i in range(count)]
        _sort_rows(row, wanted)
        yield row


def _sort_rows(row: list[Tensor], wanted: tuple[int, ...] | None = None) -> None:
    """Put tensors of one shape into ascending order, entry by entry, in place."""
    if len(row) < 2:
        return
    spare = torch.empty_like(row[0])
    for low, high, least, most in _network(len(row), wanted):
        if least and most:
            torch.minimum(row[low], row[high], out=spare)
            torch.maximum(row[low], row[high], out=row[high])
            row[low], spare = spare, row[low]
        elif least:
            torch.minimum(row[low], row[high], out=row[low])
        else:
            torch.maximum(row[low], row[high], out=row[high])


@lru_cache(maxsize=256)
def _network(
    count: int, wanted: tuple[int, ...] | None = None
) -> tuple[tuple[int, int, bool, bool], ...]:
    """Comparators of Batcher's odd-even merge sort (Knuth, volume 3, algorithm 5.2.2M).

    (low, high, whether the smaller one is needed, whether the larger one is): what no wanted place
    depends on is left out.
    """
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
    needed = set(range(count) if wanted is None else wanted)
    kept = []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def distances_to(x: Stack, rows: Mask, point: Vector) -> Tensor:
    """Euclidean distance of each row to `point` [..., dim]: float64 [..., k], NaN = not counted."""
    if _large(x):
        square = _squares(x, point)
    else:
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
        yield x[..., start : start + width].to(torch.float64, copy=True).sub_(near)


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


def inner_products(x: Stack, rows: Mask, point: Vector | None = None) -> Tensor:
    """Gram matrices float64 [..., k, k] of the rows around a row that has a majority near it.

    With a point [..., dim] they are [..., k + 1, k + 1]: it is one more row, the last.

    Squared distances of weighted means follow without the rows themselves: with weights w of sum 1,
    |x_i - sum_j w_j x_j|^2 = G_ii - 2 (G w)_i + w G w. Entries of rows that do not count have no
    meaning.
    """
    if _large(x):
        return _inner_products(x, rows, point)
    return _gram(x, majority_row(x, rows), point)


def _gram(x: Stack, pivot: Vector, point: Vector | None) -> Tensor:
    count, dim = x.shape[-2:]
    size = count + (point is not None)
    total = torch.zeros((*x.shape[:-2], size, size), dtype=torch.float64, device=x.device)
    width = max(64, _CHUNK * dim // max(1, x.numel()))
    buffer = total.new_empty((*x.shape[:-2], size, min(width, dim)))
    for start in range(0, dim, width):
        here = slice(start, min(start + width, dim))
        part = buffer[..., : here.stop - start]
        part[..., :count, :] = x[..., here]
        if point is not None:
            part[..., count, :] = point[..., here]
        part -= pivot[..., here].unsqueeze(-2)
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
    return picked_row(x, nearest(radius, 1))


def nearest(distance: Tensor, keep: int | Tensor) -> Mask:
    """The `keep` smallest entries along the last axis, bool [..., k]; ties go to the lower index.

    keep: a number or [...]; entries that are NaN are never kept.

    >>> nearest(torch.tensor([2.0, 1.0, 2.0, float("nan")]), 2).tolist()
    [True, True, False, False]
    """
    rank = distance.argsort(stable=True, dim=-1).argsort(dim=-1)
    limit = keep.unsqueeze(-1) if isinstance(keep, Tensor) else keep
    return (rank < limit) & ~torch.isnan(distance)


# Large stacks on the processor go through compiled loops, one stack at a time. Only its own size
# decides, so that a stack has the same numbers alone and among others.


def _large(x: Stack) -> bool:
    fits = x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.shape[-2] <= _NETWORK_ROWS
    return fits and x.shape[-2] * x.shape[-1] >= _LEAST


def _ordered_mean(x: Stack, rows: Mask, share: Tensor) -> Vector:
    """`ordered_mean` with its weights summing to 1."""
    from shoal.tensor import compiled

    count, dim = x.shape[-2:]
    lead = torch.broadcast_shapes(x.shape[:-2], rows.shape[:-1], share.shape[:-1])
    out = torch.zeros(*lead, dim, dtype=x.dtype, device=x.device)
    x, rows, share = x.expand(*lead, count, dim), rows.expand(*lead, -1), share.expand(*lead, -1)
    for place in np.ndindex(*lead):
        index = np.flatnonzero(rows[place].detach().numpy())
        factor = share[place].detach().numpy()
        wanted = np.flatnonzero(factor)
        if len(wanted) and wanted[-1] >= len(index):
            out[place] = float("inf")
        elif len(wanted):
            network = _network(len(index), tuple(wanted.tolist()))
            steps = compiled.steps_of(network, len(index))
            values = x[place].detach().contiguous().numpy()
            compiled.ordered_mean(values, index, steps, wanted, factor[wanted], out[place].numpy())
    return out


def _squares(x: Stack, point: Vector) -> Tensor:
    """Squared distances to the point."""
    from shoal.tensor import compiled

    lead = torch.broadcast_shapes(x.shape[:-2], point.shape[:-1])
    out = torch.zeros(*lead, x.shape[-2], dtype=torch.float64, device=x.device)
    x, point = x.expand(*lead, *x.shape[-2:]), point.expand(*lead, -1)
    for place in np.ndindex(*lead):
        values, near = x[place].detach().contiguous(), point[place].detach().contiguous()
        out[place] = torch.from_numpy(compiled.squares(values.numpy(), near.numpy()))
    return out


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


def _inner_products(x: Stack, rows: Mask, point: Vector | None) -> Tensor:
    """`inner_products` around the first row that counts, or one that the majority is nearer to."""
    from shoal.tensor import compiled

    count, dim = x.shape[-2:]
    lead = torch.broadcast_shapes(x.shape[:-2], rows.shape[:-1])
    size = count + (point is not None)
    out = torch.zeros(*lead, size, size, dtype=torch.float64, device=x.device)
    x, rows = x.expand(*lead, count, dim), rows.expand(*lead, -1)
    for place in np.ndindex(*lead):
        index = np.flatnonzero(rows[place].detach().numpy())
        values = x[place].detach().contiguous().numpy()
        beside = None if point is None else point[place].detach().contiguous().numpy()
        pivot = index[0] if len(index) else None
        for _ in range(_PIVOTS):
            if pivot is None:
                break
            found = compiled.gram(values, values[pivot], beside)
            out[place] = torch.from_numpy(found)
            finite = bool(np.isfinite(found).all())
            pivot = _nearer(found[np.ix_(index, index)], index) if finite else None
        if pivot is not None or not certain(torch.isfinite(out[place])):
            # Rows that lie ever farther out lead the search from one to the next; this one never.
            out[place] = _gram(x[place], majority_row(x[place], rows[place]), _at(point, place))
    return out


def _at(point: Vector | None, place: tuple[int, ...]) -> Vector | None:
    return None if point is None else point[place]


def _nearer(inner: NDArray[np.float64], index: NDArray[np.int64]) -> int | None:
    """The row in the middle of the nearest majority, unless the pivot is about as near to it."""
    norm = inner.diagonal()
    square = (norm[:, None] + norm - 2 * inner).clip(min=0)
    np.fill_diagonal(square, 0.0)
    radius = np.sort(square, axis=-1)[:, min(len(index) // 2, len(index) - 1)]
    best = int(radius.argmin())
    return int(index[best]) if norm[best] > _NEAR * radius[best] else None
