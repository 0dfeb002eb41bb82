"""Uniform noise in place of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Uniform:
    """Each Byzantine peer sends independent numbers, uniform in [low, high).

    Unlike `Gaussian` the noise has a mean: all who send it lean to one direction, the diagonal, in
    units of what is sent. Source: Almasi et al. 2024, section 3 ("random", uniform in [0, 1);
    arXiv 2302.05865).

    >>> import torch
    >>> own = torch.zeros(1, 1000)
    >>> sent = Uniform()(View(honest=own, own=own, round=0), keyed.key_of(0))
    >>> bool((sent >= 0).all() and (sent < 1).all()), round(float(sent.mean()), 1)
    (True, 0.5)
    """

    low: float = 0.0
    high: float = 1.0

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"low": -2.0, "high": 3.0})

    def __post_init__(self) -> None:
        need_number("uniform", "low", self.low, "the smallest number sent")
        need_number("uniform", "high", self.high, "above the largest number sent")
        if not self.low < self.high:
            raise UsageError(
                f"uniform: low={self.low}, high={self.high}; need low < high (swap them)"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        byzantine, dim = view.own.shape[-2:]
        draws = keyed.uniform(keyed.grid(keyed.grid(key, byzantine), dim))
        sent = self.low + (self.high - self.low) * draws
        return sent.to(view.own.dtype).expand(view.own.shape).contiguous()

    poison = clean_data
