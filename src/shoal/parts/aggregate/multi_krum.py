"""Multi-Krum: the mean of the rows with the best Krum scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from shoal.parts.aggregate.base import Told, need_count
from shoal.parts.aggregate.krum import best_score_at, scores
from shoal.tensor.stack import masked_mean, nearest
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class MultiKrum(Told):
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

    keep: int | None = None

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 2, "keep": 3},
        {"byzantine": 0},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            need_count("multi_krum", "keep", self.keep, 1, "rows averaged; None chooses")

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        keep = self.keep
        if keep is None:
            keep = (received - self.byzantine - 2).clamp(min=1)
        return masked_mean(x, nearest(scores(x, rows, received, self.byzantine), keep))

    def tolerates(self, rows: int) -> int:
        room = self.byzantine if self.keep is None else rows - self.keep
        return max(0, min(self.byzantine, rows - self.byzantine - 3, room))

    def kappa(self, rows: int) -> float:
        """As for `Krum`: the i-th best score is at most the i-th best honest one."""
        bad = self.tolerates(rows)
        return 6.0 * (rows - bad) / max(1, rows - self.byzantine - 2 - bad)

    def breaks_at(self, rows: int) -> int:
        """Fewer honest rows than are averaged, or as for `Krum`."""
        keep = max(1, rows - self.byzantine - 2) if self.keep is None else self.keep
        return min(max(1, rows - keep + 1), best_score_at(rows, self.byzantine))
