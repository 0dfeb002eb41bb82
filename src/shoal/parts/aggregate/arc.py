"""Adaptive robust clipping in front of any other rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate._before import Before, measured, shortened
from shoal.parts.aggregate.base import Settings
from shoal.tensor.types import Mask, Scalar, Stack


@dataclass(frozen=True)
class ARC(Before):
    """The longest rows are shortened to the length of the longest other; another rule combines.

    x: [..., k, dim], gradients or updates: lengths must mean something. Of n rows received the
    k = floor(2 (byzantine/n) (n - byzantine)) longest are cut to the length of the next one; rows
    that are not finite are the longest, and stay so for the rule that follows. `then` names that
    rule and `settings` are its own, as for `NNM`; its `byzantine` or `trim` is this rule's unless
    the settings say otherwise. A limit that follows the rows needs no tuning and keeps the bound
    of the rule behind it, which a fixed one (`clipping`) does not. Breaks as the rule that follows.
    Source: Allouah et al. 2025, algorithm 2 (arXiv 2405.14432).

    >>> x = torch.tensor([[1.0], [2.0], [3.0], [-99.0]])
    >>> ARC(1, then="mean")(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([0.7500])
    """

    byzantine: int = 1
    then: str = "trimmed_mean"
    settings: Settings = ()

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 2, "then": "median"},
        {"byzantine": 2, "then": "nnm"},
        {"byzantine": 0, "then": "mean"},
    )
    translation: ClassVar[bool] = False

    def before(self, x: Stack, mask: Mask) -> tuple[Stack, Mask]:
        """The rows with the longest shortened."""
        x, rows, length = measured(x, mask)
        received = mask.expand(rows.shape).sum(-1)
        absent = received - rows.sum(-1)
        limit = _largest_but(length, rows, (self._cut(received) - absent).clamp(min=0))
        return shortened(x, rows, length, limit), mask

    def _cut(self, received: Any) -> Any:
        """How many of these many rows are shortened; a number or a tensor."""
        share = 2 * self.byzantine * (received - self.byzantine)
        if isinstance(received, Tensor):
            return share.clamp(min=0) // received.clamp(min=1)
        return max(0, share) // max(1, received)

    def kappa(self, rows: int) -> float:
        """kappa of the rule + 2b/(n - 2b), b = byzantine (the paper's theorem 3.2)."""
        if self.tolerates(rows) < self.byzantine:
            return math.inf
        return self.rule.kappa(rows) + 2 * self.byzantine / (rows - 2 * self.byzantine)

    def breaks_at(self, rows: int) -> int | None:
        """Far rows stay far where there are more of them than are shortened."""
        after = self.rule.breaks_at(rows)
        return None if after is None else max(after, self._cut(rows) + 1)


def _largest_but(length: Scalar, rows: Mask, cut: Tensor) -> Scalar:
    """The largest length when `cut` [...] larger ones are left out; the shortest at least."""
    if not length.shape[-1]:
        return length.sum(-1)
    order = torch.where(rows, length, -1.0).sort(-1, descending=True).values
    place = torch.minimum(cut, (rows.sum(-1) - 1).clamp(min=0))
    return order.take_along_dim(place.unsqueeze(-1), -1).squeeze(-1).clamp(min=0)
