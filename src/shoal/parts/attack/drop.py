"""Lost coordinates: a vector of which a part is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Drop:
    """Each Byzantine peer sends its honest vector with a `share` of the coordinates replaced.

    Which ones is drawn anew in each round, for each peer by itself. fill: "zero", as when packets
    are lost on its link, or "uniform", numbers uniform in [0, 1) as when they are corrupted. To
    lose packets on every link, honest ones included, see the transform `lossy`.
    Source: Almasi et al. 2024, section 3 (10% zeroed; arXiv 2302.05865).

    >>> own = torch.ones(1, 1000)
    >>> sent = Drop(0.1)(View(honest=own, own=own, round=0), keyed.key_of(0))
    >>> 0.07 < float((sent == 0).float().mean()) < 0.13
    True
    """

    share: float = 0.1
    fill: str = "zero"

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"share": 0.4, "fill": "uniform"})

    def __post_init__(self) -> None:
        need_number("drop", "share", self.share, "0 to 1", least=0.0)
        if self.share > 1:
            raise UsageError(f"drop: share={self.share}; need at most 1 (all coordinates)")
        if self.fill not in ("zero", "uniform"):
            raise UsageError(f"drop: fill={self.fill!r}; need 'zero' or 'uniform'")

    def __call__(self, view: View, key: Key) -> Stack:
        byzantine, dim = view.own.shape[-2:]
        keys = keyed.grid(keyed.grid(key, byzantine), dim)
        lost = keyed.uniform(keys) < self.share
        fill = torch.zeros_like(view.own)
        if self.fill == "uniform":
            fill = keyed.uniform(keyed.fold(keys, "fill")).to(view.own.dtype)
        return torch.where(lost, fill, view.own)

    poison = clean_data
