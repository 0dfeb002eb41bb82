"""Clipping of each row's length in front of any other rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._before import lengths, rule_after, shortened
from shoal.parts.aggregate.base import (
    Settings,
    frozen,
    need_count,
    need_positive,
    same_for_all,
)
from shoal.tensor.stack import usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class Clipping:
    """Rows longer than `radius` are shortened to it; another rule combines what is left.

    x: [..., k, dim], gradients or updates, `radius` in their units. `then`, `settings` and
    `byzantine` are as for `NNM`. A radius below the honest lengths bends the mean, one far above
    them does nothing, so there is no bound in terms of the honest variance; `arc` chooses one by
    the rows. Around the receiver's own vector it is `centered_clipping`. Rows that are not finite
    stay so for the rule that follows. Breaks as that rule.
    Source: Allouah et al. 2025, section 3 (static clipping; arXiv 2405.14432).

    >>> x = torch.tensor([[1.0], [2.0], [99.0]])
    >>> Clipping(3.0)(x, mask=torch.ones(3, dtype=torch.bool))
    tensor([2.])
    """

    radius: float = 10.0
    then: str = "mean"
    settings: Settings = ()
    byzantine: int = 0

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"radius": 0.5, "then": "trimmed_mean", "byzantine": 2},
    )
    translation: ClassVar[bool] = False
    keeps_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_positive("clipping", "radius", self.radius, "the longest honest row is a start")
        need_count("clipping", "byzantine", self.byzantine, 0, "handed to the rule that follows")
        object.__setattr__(self, "settings", frozen(self.settings))
        _ = self.rule

    @property
    def rule(self) -> Any:
        """The rule that follows."""
        return rule_after("clipping", self.then, self.settings, self.byzantine)

    @property
    def centered(self) -> bool:
        return self.rule.centered

    def clipped(self, x: Stack, mask: Mask) -> Stack:
        """Rows no longer than the radius, NaN for rows that are absent or not finite."""
        x, rows = usable(x, mask)
        length = lengths(x, rows)
        limit = torch.full(length.shape[:-1], self.radius, dtype=length.dtype, device=x.device)
        return shortened(x, rows, length, limit)

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        return self.rule(self.clipped(x, mask), mask=mask, weight=weight, center=center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        if not self.centered:
            return same_for_all(self, x, mask)
        seen = self.clipped(x, mask).unsqueeze(-3).expand(*x.shape[:-1], *x.shape[-2:])
        return self.rule(seen, mask=mask.unsqueeze(-2), center=x)

    def tolerates(self, rows: int) -> int:
        """Nothing is proven about the distance to the mean."""
        return 0

    def kappa(self, rows: int) -> float:
        return math.inf
