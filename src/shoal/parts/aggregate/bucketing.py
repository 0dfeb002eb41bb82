"""Bucketing: means of a few rows each, in front of any other rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.aggregate._before import Before
from shoal.parts.aggregate.base import Settings, need_count
from shoal.tensor import keyed
from shoal.tensor.stack import grouped_means, usable
from shoal.tensor.types import Index, Mask, Stack


@dataclass(frozen=True)
class Bucketing(Before):
    """Rows are dealt into buckets of `size`; another rule combines the buckets' means.

    x: [..., k, dim]. Means of a few differ less than single rows, which robust rules need when
    data differ; one arbitrary row spoils its whole bucket, so there are fewer buckets with as many
    faults: size <= n/(2 byzantine) keeps a majority. Who is dealt together is drawn by `seed` from
    the places of the rows that count, since a rule keeps no state: the order of rows matters, and
    it stays the same from round to round, where the source draws anew. `then` and `settings` are as
    for `NNM`; an own vector is handed on. Breaks when the rule that follows does not tolerate
    `byzantine` of the buckets. Source: Karimireddy et al. 2022, algorithm 1 (arXiv 2006.09365).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    >>> Bucketing(2, then="mean")(x, mask=torch.ones(6, dtype=torch.bool))
    tensor([2.5000])
    """

    size: int = 2
    byzantine: int = 1
    then: str = "trimmed_mean"
    settings: Settings = ()
    seed: int = 0

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 1, "size": 3, "then": "median"},
        {"byzantine": 0, "then": "mean"},
    )
    exchangeable: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_count("bucketing", "size", self.size, 1, "rows in a bucket; 2 is usual")
        super().__post_init__()

    def order(self, rows: Mask) -> Index:
        """Rows in the order in which they are dealt, bucket after bucket, [..., k].

        Those that do not count come last.
        """
        # Places are counted among rows that count, and drawn in an order that all counts share.
        place = (rows.cumsum(-1) - 1).clamp(min=0)
        draws = keyed.uniform(keyed.grid(keyed.key_of(self.seed, "bucketing"), rows.shape[-1]))
        drawn = draws.to(rows.device)[place]
        return torch.where(rows, drawn, math.inf).argsort(dim=-1, stable=True)

    def before(self, x: Stack, mask: Mask) -> tuple[Stack, Mask]:
        """Means [..., ceil(k / size), dim] and which buckets hold a row."""
        x, rows = usable(x, mask)
        filled = -(-x.shape[-2] // self.size)
        rank = self.order(rows).argsort(-1)
        return grouped_means(x, torch.where(rows, rank // self.size, -1), filled)

    def tolerates(self, rows: int) -> int:
        """Faults that are not finite leave fewer rows, hence fewer buckets."""
        limit = 0 if self.centered else min(self.rule.tolerates(m) for m in self._counts(rows))
        return self.byzantine if self.byzantine <= limit else 0

    def kappa(self, rows: int) -> float:
        """(h/q) (sqrt(kappa of the rule) + 1)^2, h of the rows and q of the buckets honest.

        A mean is no farther from a point than its rows are on average (squared), so q honest
        buckets have at most h/q of the variance around the mean of the honest rows.
        """
        if self.tolerates(rows) < self.byzantine:
            return math.inf
        honest = rows - self.byzantine
        worst = 0.0
        for buckets in self._counts(rows):
            clean = buckets - self.byzantine
            if clean < 1:
                return math.inf
            bound = honest / clean * (math.sqrt(self.rule.kappa(buckets)) + 1) ** 2
            worst = max(worst, bound)
        return worst

    def _counts(self, rows: int) -> range:
        """Numbers of buckets with 0 to `byzantine` of the rows not finite."""
        least = max(1, rows - self.byzantine)
        return range(-(-least // self.size), -(-rows // self.size) + 1)

    def breaks_at(self, rows: int) -> int | None:
        """One arbitrary row spoils a whole bucket."""
        return self.rule.breaks_at(-(-rows // self.size))
