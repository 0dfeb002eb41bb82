"""The running weighted sum: what every aggregator of a tree keeps, mergeable in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.serving.shared_object_store import UpdateRefused

_STRIP = 1 << 16
"""Numbers per step: two strips stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """(sum of n_i u_i, sum of n_i) over the updates in `ids`, each of them once.

    total: flat array [dim], not to be written into; weight: at least 0. Merging is associative and
    commutative up to rounding, so trees of any shape give the flat weighted mean.
    Source: LIFL (Qi et al. 2024), section on aggregation; FedAvg's weights (McMahan et al. 2017).

    >>> a = WeightedSum.of(7, np.array([1.0, 2.0]), 3.0)
    >>> b = WeightedSum.of(9, np.array([5.0, 6.0]), 1.0)
    >>> a.merged(b).mean().tolist(), sorted(a.merged(b).ids)
    ([2.0, 3.0], [7, 9])
    """

    total: np.ndarray
    weight: float
    ids: frozenset[int]

    @classmethod
    def of(cls, id: int, update: np.ndarray, weight: float) -> WeightedSum:
        """One update."""
        check_weight(weight)
        return cls(update * update.dtype.type(weight), weight, frozenset((id,)))

    def merged(self, other: WeightedSum) -> WeightedSum:
        """Both together; UsageError when an update is in both."""
        ids = disjoint((self.ids, other.ids))
        return WeightedSum(self.total + other.total, self.weight + other.weight, ids)

    def mean(self) -> np.ndarray:
        """The weighted mean [dim]; UsageError without any weight."""
        if not self.weight > 0:
            raise UsageError(f"mean of weight {self.weight}; need some (aggregate an update first)")
        return self.total / self.total.dtype.type(self.weight)


def check_weight(weight: float) -> None:
    """UpdateRefused unless the weight is a finite number of 0 or more."""
    if not 0 <= weight < math.inf:
        raise UpdateRefused(f"update of weight {weight}; need a finite number >= 0")


def disjoint(parts: Iterable[frozenset[int]]) -> frozenset[int]:
    """The union of sets of updates; UsageError when one is in two of them.

    >>> sorted(disjoint([frozenset((1, 2)), frozenset((3,))]))
    [1, 2, 3]
    """
    found: set[int] = set()
    for part in parts:
        if both := found & part:
            raise UsageError(f"update {min(both)} is in two sums; it would count twice (drop one)")
        found |= part
    return frozenset(found)


def accumulate(total: np.ndarray, update: np.ndarray, factor: float, first: bool) -> None:
    """`total += factor * update` where they lie, or `total = factor * update` when it is the first.

    Flat arrays of one length; the sum is kept in the precision of `total`.

    >>> total = np.array([9.0, 9.0], np.float32)
    >>> accumulate(total, np.array([1.0, 2.0], np.float32), 3.0, True)
    >>> accumulate(total, np.array([1.0, 1.0], np.float32), 1.0, False)
    >>> total.tolist()
    [4.0, 7.0]
    """
    scale = total.dtype.type(factor)
    if first:
        np.multiply(update, scale, out=total)
        return
    scaled = np.empty(min(_STRIP, len(total)), total.dtype)
    for start in range(0, len(total), _STRIP):
        part, into = update[start : start + _STRIP], total[start : start + _STRIP]
        if factor != 1.0:
            part = np.multiply(part, scale, out=scaled[: len(part)])
        np.add(into, part, out=into)
