"""Nothing learned: vectors of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.attack.base import clean_data
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Zero:
    """Each Byzantine peer sends zeros: as a gradient a free rider's, as parameters a dead model.

    Zeros are ordinary numbers, so they count as a vector that came (NaN does not: `Silent`). Among
    gradients they shrink a mean and are the nearest neighbours of everything small.
    Source: Lin et al. 2019, section 3.1 (free riders, arXiv 1911.12560).

    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.ones(1, 2)
    >>> Zero()(View(honest=own, own=own, round=0), key_of(0))
    tensor([[0., 0.]])
    """

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, view: View, key: Key) -> Stack:
        return torch.zeros_like(view.own)

    poison = clean_data
