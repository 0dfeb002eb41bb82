"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate.base import ByPlace, need_count
from shoal.tensor.ordered import ordered_mean, trimmed_places
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class TrimmedMean(ByPlace):
    """Mean of what is left of each coordinate without its `trim` largest and smallest values.

    x: [..., k, dim]; weights are ignored, rows that are not finite are absent. With 2*trim or fewer
    rows present as many as possible are dropped, which leaves the median. Breaks when more than
    `trim` rows are arbitrary. Source: Yin et al. 2018, definition 2 (arXiv 1803.01498).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    >>> TrimmedMean(1)(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([1.5000])
    """

    trim: int = 1

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"trim": 2}, {"trim": 0})

    def __post_init__(self) -> None:
        need_count("trimmed_mean", "trim", self.trim, 0, "values dropped at each end")

    def values(self, x: Stack, rows: Mask) -> Vector:
        return ordered_mean(x, rows, trimmed_places(rows, self.trim))

    def tolerates(self, rows: int) -> int:
        return max(0, min(self.trim, (rows - 1) // 2))

    def kappa(self, rows: int) -> float:
        """Per coordinate, with h honest rows of which r values remain: h min(1/r, (h - r)/r^2).

        The r remaining values lie between r consecutive honest order statistics on either side;
        Cauchy and Schwarz bound those, or the h - r honest values that are left out. Rows that are
        not finite shorten the stack first, so the worst number of them counts.
        """
        bad = self.tolerates(rows)
        honest = rows - bad
        worst = 0.0
        for absent in range(bad + 1):
            count = rows - absent
            left = count - 2 * min(self.trim, (count - 1) // 2)
            bound = honest * min(1 / left, max(0, honest - left) / left**2)
            if left <= 2:
                bound = min(bound, 2 * honest / (count - 2 * (bad - absent)))
            worst = max(worst, bound)
        return worst

    def breaks_at(self, rows: int) -> int:
        return self.tolerates(rows) + 1
