"""Nearest-neighbour mixing in front of any other rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.aggregate.base import (
    Settings,
    frozen,
    need_count,
    rule_named,
    same_for_all,
)
from shoal.parts.aggregate.nna import pivoted
from shoal.tensor.stack import nearest, squared_distances, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class NNM:
    """Each row is replaced by the mean of its nearest rows; another rule combines these means.

    x: [..., k, dim]. Of r rows received each mean takes r - byzantine, the row itself first. `then`
    names a rule in this folder and `settings` are its own (a mapping, or pairs); its `byzantine` or
    `trim` is this rule's unless the settings say otherwise. Mixing shrinks the variance among
    honest peers with different data, on which robust rules otherwise lose; it is no defence
    without a robust rule after it: a far row stays far. Rows that are not finite stay so for the
    rule that follows. Source: Allouah et al. 2023, algorithm 2 (arXiv 2302.01772).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [99.0]])
    >>> NNM(1, then="median")(x, mask=torch.ones(5, dtype=torch.bool))
    tensor([1.5000])
    """

    byzantine: int = 1
    then: str = "trimmed_mean"
    settings: Settings = ()

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 2, "then": "krum"},
        {"byzantine": 2, "then": "multi_krum", "settings": (("keep", 3),)},
        {"byzantine": 2, "then": "geometric_median"},
        {"byzantine": 2, "then": "centered_clipping"},
        {"byzantine": 0, "then": "mean"},
    )

    def __post_init__(self) -> None:
        need_count("nnm", "byzantine", self.byzantine, 0, "how many peers may be faulty")
        object.__setattr__(self, "settings", frozen(self.settings))
        if self.then == "nnm":
            raise UsageError("nnm: then='nnm' mixes twice; need another rule, such as trimmed_mean")
        _ = self.rule

    @property
    def rule(self) -> Any:
        """The rule that follows."""
        return rule_named(self.then, self.settings, self.byzantine)

    @property
    def centered(self) -> bool:
        return self.rule.centered

    def mixed(self, x: Stack, mask: Mask) -> Stack:
        """The means [..., k, dim], NaN for rows that are absent or not finite."""
        x, rows = usable(x, mask)
        keep = (mask.expand(rows.shape).sum(-1) - self.byzantine).clamp(min=1)
        both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
        square = pivoted(squared_distances(x, rows), both)
        kept = nearest(square, keep.unsqueeze(-1).expand(rows.shape)).to(x.dtype)
        mean = (kept / kept.sum(-1, keepdim=True).clamp(min=1)) @ x
        nothing = torch.full((), float("nan"), dtype=x.dtype, device=x.device)
        return torch.where(rows.unsqueeze(-1), mean, nothing)

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        return self.rule(self.mixed(x, mask), mask=mask, weight=weight, center=center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        if not self.centered:
            return same_for_all(self, x, mask)
        means = self.mixed(x, mask).unsqueeze(-3)
        seen = means.expand(*x.shape[:-1], *x.shape[-2:])
        return self.rule(seen, mask=mask.unsqueeze(-2), center=x)

    def tolerates(self, rows: int) -> int:
        # Around an own vector that was not mixed itself, the means need not lie evenly.
        limit = 0 if self.centered else self.rule.tolerates(rows)
        return self.byzantine if self.byzantine <= min(limit, (rows - 1) // 2) else 0

    def kappa(self, rows: int) -> float:
        """8 b/(n - b) (kappa of the rule + 1), b = byzantine (the paper's theorem 1).

        The means of the honest rows differ from the honest mean by 8 b/(n - b) variances at most,
        on average over them. Infinite when the rule that follows does not tolerate b rows.
        """
        if self.tolerates(rows) < self.byzantine:
            return float("inf")
        return 8 * self.byzantine / (rows - self.byzantine) * (self.rule.kappa(rows) + 1)
