"""Adaptive robust clipping in front of any other rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._before import lengths, rule_after, shortened
from shoal.parts.aggregate.base import Settings, frozen, need_count, same_for_all
from shoal.tensor.stack import usable
from shoal.tensor.types import Mask, Scalar, Stack, Vector, Weight


@dataclass(frozen=True)
class ARC:
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

    def __post_init__(self) -> None:
        need_count("arc", "byzantine", self.byzantine, 0, "how many peers may be faulty")
        object.__setattr__(self, "settings", frozen(self.settings))
        _ = self.rule

    @property
    def rule(self) -> Any:
        """The rule that follows."""
        return rule_after("arc", self.then, self.settings, self.byzantine)

    @property
    def centered(self) -> bool:
        return self.rule.centered

    def clipped(self, x: Stack, mask: Mask) -> Stack:
        """The rows with the longest shortened, NaN for rows that are absent or not finite."""
        x, rows = usable(x, mask)
        length = lengths(x, rows)
        received = mask.expand(rows.shape).sum(-1)
        share = 2 * self.byzantine * (received - self.byzantine).clamp(min=0)
        cut = share // received.clamp(min=1)
        absent = received - rows.sum(-1)
        limit = _largest_but(length, rows, (cut - absent).clamp(min=0))
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
        limit = 0 if self.centered else self.rule.tolerates(rows)
        return self.byzantine if self.byzantine <= min(limit, (rows - 1) // 2) else 0

    def kappa(self, rows: int) -> float:
        """kappa of the rule + 2b/(n - 2b), b = byzantine (the paper's theorem 3.2)."""
        if self.tolerates(rows) < self.byzantine:
            return math.inf
        return self.rule.kappa(rows) + 2 * self.byzantine / (rows - 2 * self.byzantine)


def _largest_but(length: Scalar, rows: Mask, cut: torch.Tensor) -> Scalar:
    """The largest length when `cut` [...] larger ones are left out; the shortest at least."""
    if not length.shape[-1]:
        return length.sum(-1)
    order = torch.where(rows, length, -1.0).sort(-1, descending=True).values
    place = torch.minimum(cut, (rows.sum(-1) - 1).clamp(min=0))
    return order.take_along_dim(place.unsqueeze(-1), -1).squeeze(-1).clamp(min=0)
