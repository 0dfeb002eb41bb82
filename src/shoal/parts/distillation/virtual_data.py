"""Where virtual images begin: noise with the statistics of real images, or real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.rounds.task import Batch
from shoal.tensor.keyed import fold, grid, normal, uniform
from shoal.tensor.types import Key, Mask


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of each class and channel, over samples and pixels: mean and deviation [..., classes,
    channels], and which classes there are, bool [..., classes]; what is not there is 0."""

    mean: Tensor
    deviation: Tensor
    there: Mask

    def images(self, count: int, shape: tuple[int, ...], key: Key) -> Tensor:
        """`count` images of noise for each class: [..., classes * count, *shape]; key [...]."""
        classes, channels = self.mean.shape[-2:]
        pixels = shape[-2] * shape[-1]
        draws = normal(grid(key, classes * count * channels * pixels), dtype=self.mean.dtype)
        draws = draws.view(*key.shape, classes, count, channels, pixels)
        mean, deviation = (t.unsqueeze(-2).unsqueeze(-1) for t in (self.mean, self.deviation))
        return (mean + deviation * draws).view(*key.shape, classes * count, *shape)


def labels(classes: int, count: int, device: torch.device) -> Tensor:
    """The fixed, balanced labels of `count` images per class, class by class: [classes * count]."""
    return torch.arange(classes, device=device).repeat_interleave(count)


def members(y: Tensor, mask: Mask, classes: int, dtype: torch.dtype) -> tuple[Tensor, Mask]:
    """Averaging weights of samples y [..., n] by class [..., classes, n], and which there are.

    >>> members(torch.tensor([1, 1, 0]), torch.tensor([True, True, False]), 2, torch.float32)
    (tensor([[0.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000]]), tensor([False,  True]))
    """
    kinds = torch.arange(classes, device=y.device).unsqueeze(-1)
    own = ((y.unsqueeze(-2) == kinds) & mask.unsqueeze(-2)).to(dtype)
    count = own.sum(-1, keepdim=True)
    return own / count.clamp_min(1.0), count.squeeze(-1) > 0


def statistics(real: Batch, classes: int) -> Statistics:
    """Of images x [..., n, channels, height, width]; deviations are those of the population."""
    x = real.x.flatten(-2)
    own, there = members(real.y, real.mask, classes, x.dtype)
    mean = own @ x.mean(-1)
    square = own @ x.square().mean(-1)
    return Statistics(mean, (square - mean.square()).clamp_min(0.0).sqrt(), there)


def real_images(real: Batch, classes: int, count: int, key: Key) -> Tensor:
    """`count` real images of each class, drawn by key: [..., classes * count, *].

    A class with fewer gives some of them more than once; a class that is missing gives zeros.
    """
    mask = real.mask
    draws = uniform(
        fold(key, "real").unsqueeze(-1), torch.arange(mask.shape[-1], device=key.device)
    )
    kinds = torch.arange(classes, device=key.device).unsqueeze(-1)
    own = (real.y.unsqueeze(-2) == kinds) & mask.unsqueeze(-2)
    order = torch.where(own, draws.unsqueeze(-2), 2.0).argsort(dim=-1, stable=True)
    slots = torch.arange(count, device=key.device) % own.sum(-1, keepdim=True).clamp_min(1)
    place = order.gather(-1, slots).flatten(-2)
    features = real.x.shape[mask.dim() :]
    index = place.view(*place.shape, *(1,) * len(features)).expand(*place.shape, *features)
    chosen = real.x.gather(mask.dim() - 1, index)
    some = own.any(-1).repeat_interleave(count, -1)
    return torch.where(some.view(*some.shape, *(1,) * len(features)), chosen, 0.0)
