"""Sign flipping: the opposite of honest work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.attack.base import clean_data, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class SignFlip:
    """Each Byzantine peer sends -scale times what it would have sent.

    Blind: needs its own vector only. Source: Li et al. 2019 (RSA), section 5; with a large scale
    the scaled sign flip that plain means do not survive.

    >>> import torch
    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.tensor([[1.0, -2.0]])
    >>> SignFlip(3.0)(View(honest=own, own=own, round=0), key_of(0))
    tensor([[-3.,  6.]])
    """

    scale: float = 1.0

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"scale": 10.0})

    def __post_init__(self) -> None:
        need_number("sign_flip", "scale", self.scale, "1 mirrors the honest vector", least=0.0)

    def __call__(self, view: View, key: Key) -> Stack:
        return -self.scale * view.own

    poison = clean_data
