"""What attacks share that go as far from the mean as their test of hiding lets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, honest_mean, repeated
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.distances import squared_distances
from shoal.tensor.stack import masked_mean
from shoal.tensor.types import Key, Mask, Stack

Direction = Literal["deviation", "mean", "sign"]
DIRECTIONS = ("deviation", "mean", "sign")


@dataclass(frozen=True)
class Hidden:
    """Every Byzantine peer sends mean - gamma * direction with the largest gamma that hides.

    direction: the honest rows' standard deviation by coordinate, the mean scaled to length 1, or
    the mean's signs. A subclass says what hides.
    """

    direction: Direction = "deviation"

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {}, {"direction": "mean"}, {"direction": "sign"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            part = type(self).__module__.rpartition(".")[2]
            raise UsageError(
                f"{part}: direction={self.direction!r}; need one of {', '.join(DIRECTIONS)}"
            )

    def farthest(self, apart: Stack, way: Tensor, square: Tensor, rows: Mask) -> Tensor:
        """The largest gamma float64 [..., 1] that hides; may be infinite where nobody is honest.

        apart: float64 [..., honest, dim], the mean minus each row, zeros where a row does not
        count; way: float64 [..., dim], the direction, of a length above zero; square: [..., honest,
        honest], squared distances between the rows that count, zeros elsewhere.
        """
        raise NotImplementedError

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        if self.direction == "deviation":
            way = masked_mean((x - mean.unsqueeze(-2)).square(), rows).sqrt()
        else:
            length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
            way = mean.sign() if self.direction == "sign" else mean / length.clamp_min(1e-30)
        there = rows.unsqueeze(-1) & rows.unsqueeze(-2)
        square = torch.where(there, squared_distances(x, rows), 0.0)
        apart = (mean.unsqueeze(-2) - x).to(torch.float64)
        apart = torch.where(rows.unsqueeze(-1), apart, 0.0)
        steep = way.to(torch.float64)
        gamma = self.farthest(apart, steep, square, rows)
        some = (steep != 0).any(-1, keepdim=True)
        gamma = torch.where(some, gamma, 0.0).nan_to_num(nan=0.0, posinf=0.0)
        return repeated(mean - gamma.to(mean.dtype) * way, view)

    poison = clean_data
