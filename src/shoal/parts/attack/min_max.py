"""Min-max: as far from the mean as the honest vectors are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parts.attack._hidden import Hidden
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class MinMax(Hidden):
    """Every Byzantine peer sends mean - gamma * direction with the largest gamma that hides.

    Hidden: no honest vector is further from it than the two honest vectors that are furthest apart.
    direction: the honest rows' standard deviation by coordinate ("deviation"), the mean scaled to
    length 1, or the mean's signs. gamma solves a quadratic equation for each honest row; the least
    is exact where the source halves intervals.
    Source: Shejwalkar and Houmansadr 2021, section IV-D (Manipulating the Byzantine, NDSS).

    >>> from shoal.rounds.attack import View
    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> MinMax()(View(honest=honest, own=honest[:1], round=0), key_of(0))
    tensor([[0.]])
    """

    def farthest(self, apart: Stack, way: Tensor, square: Tensor, rows: Mask) -> Tensor:
        """The larger root of |mean - gamma way - x_i|^2 = widest, the least over the rows."""
        widest = square.flatten(-2).amax(-1, keepdim=True)
        size = way.square().sum(-1, keepdim=True)
        along = (apart * way.unsqueeze(-2)).sum(-1)
        left = (widest - apart.square().sum(-1)).clamp_min(0.0)
        root = (along.square() + size * left).sqrt()
        return torch.where(rows, along + root, torch.inf).amin(-1, keepdim=True) / size
