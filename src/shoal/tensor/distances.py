"""How far the rows of a masked stack lie from each other, and from a point.

Distances are float64 whatever the stack holds, and NaN marks the distance of a row that does not
count: sorting puts NaN behind infinity, so such a row loses every comparison, even against a row
that overflowed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.tensor.stack import certain, large, nearest, picked_row
from shoal.tensor.types import Mask, Stack, Vector

# Numbers converted to float64 at a time: they stay in a core's cache, and 100 stacks of 100 large
# vectors never exist twice. Fixed, because a limit that follows free memory would change low bits.
_CHUNK = 1 << 18

# How much farther from the nearest majority than it is wide a pivot may lie (squared), which costs
# as many of the 2^52 that float64 tells apart; and how many pivots are tried.
_NEAR, _PIVOTS = 1 << 10, 4


def distances_to(x: Stack, rows: Mask, point: Vector) -> Tensor:
    """Euclidean distance of each row to `point` [..., dim]: float64 [..., k], NaN = not counted."""
    if large(x):
        square = _squares(x, point)
    else:
        square = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        for part in _around(x, point):
            square += torch.linalg.vector_norm(part, dim=-1).square()
    # A difference that overflows is infinitely far, also where infinity met infinity.
    apart = square.sqrt().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.where(rows, apart, float("nan"))


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
    # A product of matrices need not be symmetric to the last bit, and ties are settled by it.
    square = torch.maximum(square, square.mT)
    both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
    return torch.where(both, square, float("nan"))


def inner_products(x: Stack, rows: Mask, point: Vector | None = None) -> Tensor:
    """Gram matrices float64 [..., k, k] of the rows around a row that has a majority near it.

    With a point [..., dim] they are [..., k + 1, k + 1]: it is one more row, the last.

    Squared distances of weighted means follow without the rows themselves: with weights w of sum 1,
    |x_i - sum_j w_j x_j|^2 = G_ii - 2 (G w)_i + w G w. Entries of rows that do not count have no
    meaning.
    """
    if large(x):
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
