"""Which of many models to look at closely: mostly near ones, and some that are far away.

Looking costs a test for each model. Models that are near are likely to be sound; those that are far
are either harmful or know what the receiver does not, so a share of them is looked at as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.types import Key, Mask


def quotas(alpha: float, k: int) -> tuple[int, int, int]:
    """How many of the near, middle and far third are looked at; rounding may exceed k by one.

    >>> quotas(0.4, 10), quotas(0.3, 10)
    ((4, 5, 2), (5, 4, 1))
    """
    if not 0 <= alpha <= 1 or k < 1:
        raise UsageError(f"alpha={alpha}, k={k}; need a share from 0 to 1 and at least one model")
    shares = ((1 - alpha) ** 2, 2 * alpha * (1 - alpha), alpha**2)
    # Products of shares are not exact: 0.5 stays 0.5 when it is rounded to nine digits first.
    near, middle, far = (int(round(share * k, 9) + 0.5) for share in shares)
    return near, middle, far


def most(alpha: float, k: int) -> int:
    """More than this are never chosen."""
    return max(k - 1, sum(quotas(alpha, k)))


def prioritised(distance: Tensor, alpha: float, k: int, key: Key) -> Mask:
    """Which models to look at: bool [..., n] for distances [..., n], NaN where there is none.

    Fewer than k: all of them. Otherwise they are sorted and cut into thirds, near, middle and far,
    and of each third as many as `quotas` says are drawn by key [...] (all, if it has fewer). Ties
    go to the lower index. Source: Verbraeken et al. 2021 (arXiv 2110.11006), section 5.

    >>> apart = torch.arange(19.0)
    >>> prioritised(apart, 0.4, 10, keyed.key_of(1)).split([7, 6, 6])[0].sum()
    tensor(4)
    """
    here = ~torch.isnan(distance)
    count = here.sum(-1, keepdim=True)
    rank = distance.argsort(dim=-1, stable=True).argsort(dim=-1)
    third = 3 * rank // count.clamp_min(1)
    places = torch.arange(distance.shape[-1], device=distance.device)
    draw = keyed.uniform(keyed.fold(key, "priority").unsqueeze(-1), places)
    order = torch.where(here, third + draw, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    # Rank r is in third t from r = ceil(t * count / 3) on.
    place = order - (third * count + 2) // 3
    near, middle, far = quotas(alpha, k)
    quota = torch.where(third == 0, near, torch.where(third == 1, middle, far))
    return here & ((count < k) | (place < quota))
