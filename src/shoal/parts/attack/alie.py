"""A little is enough: hide inside the honest spread."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch

from shoal.parts.attack.base import (
    clean_data,
    honest_mean,
    need_factor,
    need_number,
    repeated,
    strongest,
)
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class ALIE:
    """Every Byzantine peer sends mean + z * standard deviation of the honest rows, by coordinate.

    `z=None` takes the paper's value from the numbers of honest and Byzantine peers, the largest
    that a majority may still believe (`believable`); it is 0 with few Byzantine peers.
    `factor="search"` takes the most harmful z against the rule in force, that one included.
    The standard deviation is the population's (divided by the number of rows).
    Source: Baruch et al. 2019, algorithm 1 (arXiv 1902.06156).

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> ALIE(z=1.5)(View(honest=honest, own=honest[:1], round=0), key_of(0))
    tensor([[2.5000]])
    """

    z: float | None = None
    factor: str = "fixed"

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"z": 1.0}, {"factor": "search"})

    def __post_init__(self) -> None:
        need_factor("alie", self.factor)
        if self.z is not None:
            need_number("alie", "z", self.z, "standard deviations; None takes the paper's value")

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        deviation = masked_mean((x - mean.unsqueeze(-2)).square(), rows).sqrt()
        z = self.z
        if z is None:
            z = believable(view.honest.shape[-2], view.own.shape[-2])
        if self.factor == "fixed":
            return repeated(mean + z * deviation, view)
        fixed = torch.full(mean.shape[:-1], z, dtype=torch.float64, device=mean.device)
        return strongest("alie", view, mean, deviation, fixed)

    poison = clean_data


def believable(honest: int, byzantine: int) -> float:
    """z such that as many honest rows lie beyond it as the attackers lack for a majority.

    With n rows in all, s = floor(n/2 + 1) - byzantine and P(Z < z) = (honest - s) / honest.

    >>> round(believable(26, 24), 2)
    1.43
    """
    lacking = math.floor((honest + byzantine) / 2 + 1) - byzantine
    # A majority of attackers lacks nobody; half a row keeps the quantile finite.
    share = (honest - max(lacking, 0.5)) / honest
    return NormalDist().inv_cdf(share) if 0.5 < share < 1 else 0.0
