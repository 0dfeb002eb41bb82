"""Min-max: as far from the mean as the honest vectors are from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, honest_mean, repeated
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.distances import squared_distances
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Key, Stack

Direction = Literal["deviation", "mean", "sign"]
DIRECTIONS = ("deviation", "mean", "sign")


@dataclass(frozen=True)
class MinMax:
    """Every Byzantine peer sends mean - gamma * direction with the largest gamma that hides.

    Hidden: no honest vector is further from it than the two honest vectors that are furthest apart.
    direction: the honest rows' standard deviation by coordinate ("deviation"), the mean scaled to
    length 1, or the mean's signs. gamma solves a quadratic equation for each honest row; the least
    is exact where the source halves intervals.
    Source: Shejwalkar and Houmansadr 2021, section IV-D (Manipulating the Byzantine, NDSS).

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> MinMax()(View(honest=honest, own=honest[:1], round=0), key_of(0))
    tensor([[0.]])
    """

    direction: Direction = "deviation"

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {}, {"direction": "mean"}, {"direction": "sign"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise UsageError(
                f"min_max: direction={self.direction!r}; need one of {', '.join(DIRECTIONS)}"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        if self.direction == "deviation":
            way = masked_mean((x - mean.unsqueeze(-2)).square(), rows).sqrt()
        else:
            length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
            way = mean.sign() if self.direction == "sign" else mean / length.clamp_min(1e-30)
        wide = squared_distances(x, rows).to(torch.float64)
        there = rows.unsqueeze(-1) & rows.unsqueeze(-2)
        widest = torch.where(there, wide, 0.0).flatten(-2).amax(-1, keepdim=True)
        # |mean - gamma way - x_i|^2 = widest, for the larger gamma.
        apart = (mean.unsqueeze(-2) - x).to(torch.float64)
        steep = way.to(torch.float64)
        square = steep.square().sum(-1, keepdim=True)
        along = (apart * steep.unsqueeze(-2)).sum(-1)
        left = (widest - apart.square().sum(-1)).clamp_min(0.0)
        root = (along.square() + square * left).sqrt()
        gamma = torch.where(rows, along + root, torch.inf).amin(-1, keepdim=True)
        gamma = torch.where(square > 0, gamma / square.clamp_min(1e-300), 0.0)
        gamma = gamma.nan_to_num(posinf=0.0)
        return repeated(mean - gamma.to(mean.dtype) * way, view)

    poison = clean_data
