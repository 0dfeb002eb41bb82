"""Infinity: one addition, and a mean is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Infinite:
    """Each Byzantine peer sends infinity, or the largest finite number of its type.

    sign: 1 or -1. finite=False tests that rules treat what is no number as no vector; finite=True
    passes that check, and overflows in sums, squares and distances instead.

    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.zeros(1, 2)
    >>> Infinite(sign=-1)(View(honest=own, own=own, round=0), key_of(0))
    tensor([[-inf, -inf]])
    """

    sign: int = 1
    finite: bool = False

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"sign": -1, "finite": True})

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise UsageError(f"infinite: sign={self.sign!r}; need 1 or -1")

    def __call__(self, view: View, key: Key) -> Stack:
        value = torch.finfo(view.own.dtype).max if self.finite else float("inf")
        return torch.full_like(view.own, self.sign * value)

    poison = clean_data
