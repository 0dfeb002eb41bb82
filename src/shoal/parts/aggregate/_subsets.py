"""The search for the best set of rows by trying all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor.types import Mask

MOST = 200_000
"""Sets that are tried at most; a constant, so that what runs does not depend on the machine."""
_NUMBERS = 1 << 22

Worth = Callable[[Mask, Tensor], tuple[Tensor, Tensor]]
"""(kept bool [..., c, k], order [..., k]) -> what is least for the best set, and what settles ties,
float64 [..., c]; place i of a set stands for row order[..., i]."""


def best_set(part: str, rows: Mask, received: Tensor, byzantine: int, worth: Worth) -> Mask:
    """The rows to keep, bool [..., k]: all that count but `byzantine`, at least one.

    received: [...], rows in hand; those that do not count use up the number of rows left out.
    """
    most = rows.shape[-1]
    count = rows.sum(-1)
    drop = received.clamp(max=byzantine + 1) - 1
    drop = torch.minimum(drop, torch.full_like(drop, byzantine)) - (received - count)
    drop = torch.minimum(drop, count - 1).clamp(min=0)
    order = (~rows).to(torch.int8).argsort(dim=-1, stable=True)
    place = torch.arange(most, device=rows.device)
    here = (place < count.unsqueeze(-1)).unsqueeze(-2)
    chosen, least, tie = here.squeeze(-2), None, None
    left_out = _left_out(part, most, min(byzantine, max(0, most - 1))).to(rows.device)
    for some in left_out.split(max(1, _NUMBERS // max(1, rows.numel() * most))):
        fits = (some.sum(-1) == drop.unsqueeze(-1)) & ~(some & ~here).any(-1)
        kept = ~some & here
        first, second = (_ranked(value, fits) for value in worth(kept, order))
        low = first.amin(-1, keepdim=True)
        second = torch.where(first == low, second, float("inf"))
        at = second.argmin(-1, keepdim=True)
        low, after = low.squeeze(-1), second.take_along_dim(at, -1).squeeze(-1)
        found = kept.take_along_dim(at.unsqueeze(-1), -2).squeeze(-2)
        if least is None or tie is None:
            chosen, least, tie = found, low, after
            continue
        better = (low < least) | ((low == least) & (after < tie))
        chosen = torch.where(better.unsqueeze(-1), found, chosen)
        least, tie = torch.where(better, low, least), torch.where(better, after, tie)
    return torch.zeros_like(rows).scatter(-1, order, chosen)


def _ranked(value: Tensor, fits: Mask) -> Tensor:
    """Sets that do not fit come behind all others, those of infinite worth included."""
    top = torch.finfo(torch.float64).max
    return torch.where(fits, value.nan_to_num(nan=top, posinf=top), float("inf"))


@lru_cache(maxsize=8)
def _left_out(part: str, count: int, byzantine: int) -> Mask:
    """Every set of at most `byzantine` of `count` places, bool [c, count]."""
    total = sum(comb(count, size) for size in range(byzantine + 1))
    if total > MOST:
        raise UsageError(
            f"{part}: byzantine={byzantine} of {count} rows leaves {total} sets to try; need at "
            f"most {MOST} (lower byzantine, or take caf or multi_krum, which try none)"
        )
    out = torch.zeros(total, count, dtype=torch.bool, device="cpu")
    row = 0
    for size in range(byzantine + 1):
        for places in combinations(range(count), size):
            out[row, list(places)] = True
            row += 1
    return out


def set_breaks_at(rows: int, byzantine: int) -> int:
    """How many arbitrary rows carry the mean of the best set of all but `byzantine` away.

    One more than that cannot all be left out; and rows that fill a set by themselves, all equal,
    are the best one.
    """
    return min(byzantine + 1, max(1, rows - byzantine))
