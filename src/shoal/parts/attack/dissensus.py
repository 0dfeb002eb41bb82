"""Dissensus: another vector for each receiver, to keep honest peers apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.attack.base import clean_data, honest_mean, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Dissensus:
    """Each honest receiver hears what undoes its agreement with those that it hears.

    With honest neighbours k and b Byzantine ones a receiver at x is told
    x + scale/b * (sum of x - x_k): with equal weights and scale 1 its mean stays where it is, and
    beyond 1 honest peers are driven apart. Equivocation: the result is [..., honest, byzantine,
    dim], another vector for each receiver, so no two honest peers see the same stack. Of no use
    against a single receiver, such as a hub. Source: He et al. 2022, section 5 (arXiv 2202.01545),
    for equal mixing weights.

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> Dissensus()(View(honest=honest, own=honest[:1], round=0), key_of(0)).flatten()
    tensor([-2.,  4.])
    """

    scale: float = 1.0

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"scale": 5.0})

    def __post_init__(self) -> None:
        need_number("dissensus", "scale", self.scale, "1 undoes all agreement", least=0.0)

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        *lead, honest, dim = x.shape
        byzantine = view.own.shape[-2]
        heard = view.heard
        if heard is None:
            heard = torch.ones(honest, honest + byzantine, dtype=torch.bool, device=x.device)
        friends = (heard[..., :honest] & rows.unsqueeze(-2)).to(x.dtype)
        liars = heard[..., honest:].sum(-1, keepdim=True).clamp(min=1)
        # Around the mean, so that vectors far from the origin keep the digits of differences.
        apart = torch.where(rows.unsqueeze(-1), x - mean.unsqueeze(-2), 0.0)
        undone = friends.sum(-1, keepdim=True) * apart - friends @ apart
        pushed = view.honest + self.scale * undone / liars
        return pushed.unsqueeze(-2).expand(*lead, honest, byzantine, dim).contiguous()

    poison = clean_data
