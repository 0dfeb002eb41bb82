"""The attack on trimmed means: just beyond the honest extremes, on the side that turns back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, honest_mean, need_number
from shoal.rounds.attack import Knowledge, View
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class TrimmedMeanAttack:
    """Each coordinate beyond all honest ones, against the direction in which they have gone.

    Where the honest mean is positive, a number uniform between the least honest value m and m/b (if
    m > 0) or m b (else); where it is negative, the same beyond the largest. The mean's sign stands
    for the direction of change: exact for updates, and for parameters the change since zero, as an
    attack here remembers nothing of earlier rounds. Each Byzantine peer draws for itself.
    Source: Fang et al. 2020, section 4.3 (arXiv 1911.11815); b = 2 there.

    >>> honest = torch.tensor([[2.0, -1.0], [4.0, -2.0]])
    >>> sent = TrimmedMeanAttack()(View(honest, honest[:1], round=0), keyed.key_of(0))
    >>> bool(1.0 <= sent[0, 0] <= 2.0), bool(-1.0 <= sent[0, 1] <= -0.5)
    (True, True)
    """

    b: float = 2.0

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"b": 10.0})

    def __post_init__(self) -> None:
        need_number("trimmed_mean_attack", "b", self.b, "2 is usual", least=0.0)
        if self.b <= 1:
            raise UsageError(
                f"trimmed_mean_attack: b={self.b}; need more than 1 (1 would send the extremes)"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        mean, x, rows = honest_mean(view)
        some = rows.unsqueeze(-1)
        least = torch.where(some, x, torch.inf).amin(-2)
        largest = torch.where(some, x, -torch.inf).amax(-2)
        rising = mean > 0
        edge = torch.where(rising, least, largest)
        # Away from the others: towards zero when they are beyond it, else away from it.
        inward = torch.where(rising, edge > 0, edge < 0)
        beyond = torch.where(inward, edge / self.b, edge * self.b)
        beyond = torch.where(rows.any(-1, keepdim=True), beyond, mean)
        edge = torch.where(rows.any(-1, keepdim=True), edge, mean)
        byzantine, dim = view.own.shape[-2:]
        keys = keyed.grid(keyed.grid(key, byzantine), dim)
        draw = keyed.uniform(keys).to(view.own.dtype)
        sent = edge.unsqueeze(-2) + draw * (beyond - edge).unsqueeze(-2)
        return sent.expand(view.own.shape).to(view.own.dtype)

    poison = clean_data
