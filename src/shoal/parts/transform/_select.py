"""The largest entries of a vector, with ties settled the same way everywhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.tensor.types import Index, Vector


def kept_count(fraction: float, count: int) -> int:
    """How many of `count` entries a fraction keeps: max(1, round(fraction * count))."""
    return min(count, max(1, round(fraction * count)))


def largest(x: Vector, keep: int) -> Index:
    """Positions [..., keep], ascending, of the `keep` largest magnitudes of x [..., n].

    Of equal magnitudes the lower position is kept; entries that are not numbers count as infinite.

    >>> largest(torch.tensor([1., -2., 2., 2.]), 2)
    tensor([1, 2])
    """
    if keep == x.shape[-1]:
        return torch.arange(keep, device=x.device).expand(x.shape)
    size = x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    threshold = _kth_largest(size, keep)
    mask = size > threshold
    # Only the k-th value is the same on every device, not which of its ties `topk` returns.
    level = size == threshold
    missing = keep - mask.sum(-1, keepdim=True)
    mask |= level & (level.cumsum(-1, dtype=torch.int32) <= missing)
    if x.is_cpu:
        return mask.nonzero()[:, -1].view(*x.shape[:-1], keep)
    # Each kept position goes to its rank, all others behind the last: nobody waits for a count.
    rank = torch.where(mask, mask.cumsum(-1) - 1, keep)
    place = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    return torch.empty_like(place[..., : keep + 1]).scatter_(-1, rank, place)[..., :keep]


# numpy sorts and partitions without carrying indices along: on a CPU five to ten times faster.


def _kth_largest(x: Tensor, keep: int) -> Tensor:
    if x.device.type == "cpu":
        place = x.shape[-1] - keep
        return torch.from_numpy(np.partition(x.detach().numpy(), place)[..., place, None])
    return x.topk(keep, sorted=False).values.amin(-1, keepdim=True)


def ascending(x: Tensor) -> Tensor:
    """The values of x [..., n] in ascending order."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.detach().numpy()))
    return x.sort(-1).values
