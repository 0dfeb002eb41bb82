"""Clipping of each row's length in front of any other rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._before import Before, measured, shortened
from shoal.parts.aggregate.base import Settings, need_positive
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class Clipping(Before):
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
        super().__post_init__()

    def before(self, x: Stack, mask: Mask) -> tuple[Stack, Mask]:
        """Rows no longer than the radius."""
        x, rows, length = measured(x, mask)
        limit = torch.full(length.shape[:-1], self.radius, dtype=length.dtype, device=x.device)
        return shortened(x, rows, length, limit), mask

    def tolerates(self, rows: int) -> int:
        """Nothing is proven about the distance to the mean."""
        return 0

    def kappa(self, rows: int) -> float:
        return math.inf

    def breaks_at(self, rows: int) -> None:
        """The rule that follows sees no row that is longer than the radius."""
        return None
