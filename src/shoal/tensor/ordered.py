"""Each coordinate's values of a masked stack in ascending order, and their means by place.

Numbers at a time are fixed, because a limit that follows free memory would change low bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shoal.tensor.stack import MOST_ROWS, large, shares
from shoal.tensor.types import Mask, Stack, Vector, Weight

# Numbers of one row that a step of the network takes at a time: all rows stay in a core's cache,
# and calls are still few; on a device fewer calls count for more.
_LANE, _FAR_LANE = 1 << 13, 1 << 16


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
    if large(x):
        return _ordered_mean(x, rows, weight)
    wanted = places_with(weight)
    return torch.cat([weighed(row, weight, wanted) for row in sorted_rows(x, rows, wanted)], -1)


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
        if count > MOST_ROWS:
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
