"""Fall of empires: a vector whose inner product with the honest mean is negative."""

from __future__ import annotations

from dataclasses import dataclass
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
from shoal.tensor.distances import distances_to
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class InnerProduct:
    """Every Byzantine peer sends -epsilon times the mean of the honest vectors.

    `factor="search"` sends mean * (1 - t) with the most harmful t > 0 against the rule in force,
    epsilon's included; strengths are tried in units of the honest spread, so parameter vectors,
    whose mean dwarfs their differences, are searched where rules are deceived.
    Source: Xie et al. 2020, section 4 (Fall of Empires, arXiv 1903.03936).

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[1.0], [3.0]])
    >>> InnerProduct(0.5)(View(honest=honest, own=honest[:1], round=0), key_of(0))
    tensor([[-1.]])
    """

    epsilon: float = 0.1
    factor: str = "fixed"

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"epsilon": 1.1}, {"factor": "search"})

    def __post_init__(self) -> None:
        need_factor("inner_product", self.factor)
        need_number("inner_product", "epsilon", self.epsilon, "0.1 is usual", least=0.0)

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        if self.factor == "fixed":
            return repeated(-self.epsilon * mean, view)
        length = torch.linalg.vector_norm(mean, dim=-1, dtype=torch.float64)
        apart = distances_to(x, rows, mean).nan_to_num(nan=0.0, posinf=0.0)
        spread = masked_mean(apart.square().unsqueeze(-1), rows).squeeze(-1).sqrt()
        # Without a spread or a mean any unit does; one that is zero would search nothing.
        spread = torch.where(spread > 0, spread, length)
        unit = spread / torch.where(length > 0, length, torch.ones_like(length))
        fixed = (1 + self.epsilon) / torch.where(unit > 0, unit, torch.ones_like(unit))
        direction = -unit.to(mean.dtype).unsqueeze(-1) * mean
        return strongest("inner_product", view, mean, direction, fixed)

    poison = clean_data
