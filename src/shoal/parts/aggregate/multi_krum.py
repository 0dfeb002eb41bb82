"""Multi-Krum: the mean of the rows with the best Krum scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate.base import need_count, same_for_all
from shoal.parts.aggregate.krum import scores
from shoal.tensor.stack import masked_mean, nearest, or_center, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class MultiKrum:
    """Mean of the `keep` rows with the smallest Krum scores.

    x: [..., k, dim]. `keep=None` keeps n - byzantine - 2 of n rows received (at least one);
    otherwise as `Krum`. Breaks when more than `byzantine` rows are arbitrary, or when `keep` rows
    leave no room for them. Source: Blanchard et al. 2017, section 5; El Mhamdi et al. 2018 for the
    number kept.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [1.5], [2.5], [99.0]])
    >>> MultiKrum(1)(x, mask=torch.ones(5, dtype=torch.bool))
    tensor([1.2500])
    """

    byzantine: int = 1
    keep: int | None = None

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 2, "keep": 3},
        {"byzantine": 0},
    )
    centered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_count("multi_krum", "byzantine", self.byzantine, 0, "how many peers may be faulty")
        if self.keep is not None:
            need_count("multi_krum", "keep", self.keep, 1, "rows averaged; None chooses")

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        received = mask.expand(rows.shape).sum(-1)
        keep = self.keep
        if keep is None:
            keep = (received - self.byzantine - 2).clamp(min=1)
        chosen = nearest(scores(x, rows, received, self.byzantine), keep)
        return or_center(masked_mean(x, chosen), rows.any(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        room = self.byzantine if self.keep is None else rows - self.keep
        return max(0, min(self.byzantine, rows - self.byzantine - 3, room))

    def kappa(self, rows: int) -> float:
        """As for `Krum`: the i-th best score is at most the i-th best honest one."""
        bad = self.tolerates(rows)
        return 6.0 * (rows - bad) / max(1, rows - self.byzantine - 2 - bad)
