"""Min-sum: as far from all honest vectors together as the loneliest honest one is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.parts.attack._hidden import Hidden
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class MinSum(Hidden):
    """Every Byzantine peer sends mean - gamma * direction with the largest gamma that hides.

    Hidden: the sum of its squared distances to the honest vectors is no larger than the largest
    such sum of an honest vector. That stays nearer to the mean than `min_max`, and escapes rules
    that add distances up. direction: as for `min_max`. gamma solves one quadratic equation, whose
    middle term vanishes around the mean; it is exact where the source halves intervals.
    Source: Shejwalkar and Houmansadr 2021, section IV-D (Manipulating the Byzantine, NDSS).

    >>> import torch
    >>> from shoal.rounds.attack import View
    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0], [4.0]])
    >>> MinSum()(View(honest=honest, own=honest[:1], round=0), key_of(0))
    tensor([[0.]])
    """

    def farthest(self, apart: Stack, way: Tensor, square: Tensor, rows: Mask) -> Tensor:
        """From h gamma^2 |way|^2 + sum of |mean - x_i|^2 = the largest sum."""
        most = square.sum(-1).amax(-1, keepdim=True)
        left = (most - apart.square().sum((-2, -1)).unsqueeze(-1)).clamp_min(0.0)
        count = rows.sum(-1, keepdim=True).clamp_min(1)
        return (left / (count * way.square().sum(-1, keepdim=True))).sqrt()
