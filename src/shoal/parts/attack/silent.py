"""Silence in the form of numbers: vectors of NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.attack.base import clean_data
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Silent:
    """Each Byzantine peer sends NaN, which must count as a vector that never came.

    A rule that lets it through breaks in one round; to be really silent is a fault (`Crash`), not
    an attack. Source: Farhadkhani et al. 2023 (arXiv 2209.10931) count absent vectors as faulty.

    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.zeros(1, 2)
    >>> Silent()(View(honest=own, own=own, round=0), key_of(0))
    tensor([[nan, nan]])
    """

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, view: View, key: Key) -> Stack:
        return torch.full_like(view.own, float("nan"))

    poison = clean_data
