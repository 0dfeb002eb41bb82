"""Nearest-neighbour mixing in front of any other rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._before import Before
from shoal.parts.aggregate.base import Settings
from shoal.parts.aggregate.nna import pivoted
from shoal.tensor.distances import squared_distances
from shoal.tensor.stack import nearest, usable
from shoal.tensor.types import Mask, Stack


@dataclass(frozen=True)
class NNM(Before):
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

    def before(self, x: Stack, mask: Mask) -> tuple[Stack, Mask]:
        """The means [..., k, dim]."""
        x, rows = usable(x, mask)
        keep = (mask.expand(rows.shape).sum(-1) - self.byzantine).clamp(min=1)
        both = rows.unsqueeze(-1) & rows.unsqueeze(-2)
        square = pivoted(squared_distances(x, rows), both)
        kept = nearest(square, keep.unsqueeze(-1).expand(rows.shape)).to(x.dtype)
        # A row that does not count gives NaN by its share, which spares a look at all its numbers.
        share = kept / kept.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(rows.unsqueeze(-1), share, float("nan")) @ x, mask

    def kappa(self, rows: int) -> float:
        """8 b/(n - b) (kappa of the rule + 1), b = byzantine (the paper's theorem 1).

        The means of the honest rows differ from the honest mean by 8 b/(n - b) variances at most,
        on average over them. Infinite when the rule that follows does not tolerate b rows.
        """
        if self.tolerates(rows) < self.byzantine:
            return float("inf")
        return 8 * self.byzantine / (rows - self.byzantine) * (self.rule.kappa(rows) + 1)

    def breaks_at(self, rows: int) -> int | None:
        """With more than `byzantine` far rows every mean takes one in."""
        after = self.rule.breaks_at(rows)
        return None if after is None else min(self.byzantine + 1, after)
