"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.aggregate.base import same_for_all
from shoal.tensor.stack import masked_sort, or_center, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class Median:
    """The middle value of each coordinate, or the mean of the two middle ones.

    x: [..., k, dim]; weights are ignored, rows that are not finite are absent. Breaks when half of
    the rows are arbitrary; far from the mean when honest rows differ much (kappa does not vanish
    with fewer faults). Source: Yin et al. 2018, definition 1 (arXiv 1803.01498).

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [9.0]])
    >>> Median()(x, mask=torch.ones(3, dtype=torch.bool))
    tensor([1.])
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    centered: ClassVar[bool] = False

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        return or_center(middle(x, rows), rows.any(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        return max(0, (rows - 1) // 2)

    def kappa(self, rows: int) -> float:
        """2h/(n - 2f) with h honest of n rows.

        At least n/2 - f honest rows lie as far from the mean as the median does, or farther.
        """
        bad = self.tolerates(rows)
        return 2.0 * (rows - bad) / (rows - 2 * bad)


def middle(x: Stack, rows: Mask) -> Vector:
    """Coordinate-wise median of the rows that count; x as `usable` returns it.

    Infinite when no row counts: the caller decides what that means.
    """
    if x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-2], x.shape[-1]))
    ordered = masked_sort(x, rows)
    count = rows.sum(-1)[..., None, None]
    low = ordered.take_along_dim(((count - 1) // 2).clamp(min=0), -2).squeeze(-2)
    high = ordered.take_along_dim((count // 2).clamp(max=x.shape[-2] - 1), -2).squeeze(-2)
    # Half of each, since the sum of two large numbers may overflow.
    return 0.5 * low + 0.5 * high
