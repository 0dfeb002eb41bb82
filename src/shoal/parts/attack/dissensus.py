"""Dissensus: another vector for each receiver, to keep honest peers apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.attack.base import clean_data, honest_mean, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Dissensus:
    """Each honest receiver hears itself pushed away from the honest mean: x + scale * (x - mean).

    Equivocation: the result is [..., honest, byzantine, dim], another vector for each receiver, so
    no two honest peers see the same stack. Against averaging, honest / byzantine is the scale that
    cancels all agreement on a complete graph. Source: He et al. 2022, section 5 (arXiv 2202.01545),
    for equal mixing weights.

    >>> import torch
    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> Dissensus()(View(honest=honest, own=honest[:1], round=0), key_of(0)).flatten()
    tensor([-1.,  3.])
    """

    scale: float = 1.0

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"scale": 5.0})

    def __post_init__(self) -> None:
        need_number("dissensus", "scale", self.scale, "1 doubles the distance", least=0.0)

    def __call__(self, view: View, key: Key) -> Stack:
        mean, _, _ = honest_mean(view)
        pushed = view.honest + self.scale * (view.honest - mean.unsqueeze(-2))
        *lead, honest, dim = pushed.shape
        byzantine = view.own.shape[-2]
        return pushed.unsqueeze(-2).expand(*lead, honest, byzantine, dim).contiguous()

    poison = clean_data
