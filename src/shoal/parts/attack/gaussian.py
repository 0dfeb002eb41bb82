"""Gaussian noise in place of work, or on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.attack.base import clean_data, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Gaussian:
    """Each Byzantine peer sends independent normal noise of standard deviation `scale`.

    With `add=True` the noise lies on top of its honest vector. `scale` and `mean`, the same in all
    coordinates, are in the units of what is sent.
    Source: Blanchard et al. 2017, section 6 (scale 200, in place of work).

    >>> import torch
    >>> own = torch.zeros(1, 3)
    >>> noise = Gaussian(2.0)(View(honest=own, own=own, round=0), keyed.key_of(0))
    >>> noise.shape, bool((noise != 0).all())
    (torch.Size([1, 3]), True)
    """

    scale: float = 200.0
    add: bool = False
    mean: float = 0.0

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"scale": 0.1, "add": True},
        {"scale": 1.0, "mean": 3.0},
    )

    def __post_init__(self) -> None:
        need_number("gaussian", "scale", self.scale, "a standard deviation", least=0.0)
        need_number("gaussian", "mean", self.mean, "0 is usual")

    def __call__(self, view: View, key: Key) -> Stack:
        byzantine, dim = view.own.shape[-2:]
        keys = keyed.grid(keyed.grid(key, byzantine), dim)
        noise = self.mean + self.scale * keyed.normal(keys, dtype=view.own.dtype)
        noise = noise.expand(view.own.shape)
        return view.own + noise if self.add else noise.contiguous()

    poison = clean_data
