"""Statistics over few paired seeds: medians with exact intervals, bootstrap by key.

Seeds are few (2 to 10), so intervals say which level they really reach. Nothing here draws from a
global generator: the same numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.base import keyed

Numbers = Sequence[float]


@dataclass(frozen=True)
class Interval:
    """`level`: the coverage that it really has, which few seeds keep below the wish."""

    low: float
    high: float
    level: float
    method: str


def median(values: Numbers) -> float:
    """The middle value, or the mean of the middle two; nan for none."""
    ordered = sorted(values)
    if not ordered or any(math.isnan(v) for v in ordered):
        return math.nan
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return ordered[half - 1] / 2 + ordered[half] / 2


def quantile(values: Numbers, q: float) -> float:
    """Linear interpolation between order statistics (type 7 of Hyndman and Fan 1996).

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    if not len(values):
        return math.nan
    return float(np.quantile(np.asarray(values, dtype=float), q))


def median_interval(values: Numbers, level: float = 0.95) -> Interval | None:
    """Distribution-free interval for a median: from the k-th smallest to the k-th largest value.

    Its coverage is exactly 1 - 2 P[Binomial(n, 1/2) < k] for continuous distributions; the largest
    k that reaches `level` is taken, k = 1 (the whole range) when none does. None below 2 values.
    Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).level
    0.9375
    """
    ordered = sorted(values)
    count = len(ordered)
    if count < 2 or any(math.isnan(v) for v in ordered):
        return None
    rank, tail = 1, 2.0**-count
    while True:
        # P[Binomial < rank + 1]: one more term of the lower tail.
        wider = tail + math.comb(count, rank) * 2.0**-count
        if 1 - 2 * wider < level or rank + 1 > (count + 1) // 2:
            break
        rank, tail = rank + 1, wider
    return Interval(ordered[rank - 1], ordered[count - rank], 1 - 2 * tail, "order statistics")


def bootstrap_interval(
    values: Numbers,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap; `statistic` maps [resamples, n] to [resamples], default the mean.

    Resamples are drawn by key. The nominal level is optimistic for n below about 10.
    Source: Efron and Tibshirani 1993, section 13.3.
    """
    data = np.asarray(values, dtype=float)
    if data.size < 2 or not np.isfinite(data).all():
        return None
    draws = _uniform(seed, resamples * data.size).reshape(resamples, data.size)
    index = np.minimum((draws * data.size).astype(np.int64), data.size - 1)
    sample = data[index]
    estimates = sample.mean(-1) if statistic is None else statistic(sample)
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "bootstrap")


def _uniform(seed: int, count: int) -> np.ndarray:
    """`keyed.uniform(seed, "bootstrap", i)` for i below count, as one array."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) ^ np.uint64(keyed.fold(0, seed, "bootstrap"))
        z = z + np.uint64(keyed.GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(keyed.MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(keyed.MIX_2)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * keyed.UNIT


def summarise(values: Numbers, statistic: str = "median") -> tuple[float, Interval | None]:
    """A statistic with its interval: order statistics for medians, bootstrap for means.

    Minimum and maximum are about the seeds that were run, so their interval is the range.
    """
    if not len(values):
        return math.nan, None
    if statistic == "median":
        return median(values), median_interval(values)
    if statistic == "mean":
        return float(np.mean(np.asarray(values, dtype=float))), bootstrap_interval(values)
    extreme = min(values) if statistic == "min" else max(values)
    spread = Interval(min(values), max(values), math.nan, "range") if len(values) > 1 else None
    return extreme, spread


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Differences of the seeds that both have.

    >>> paired({1: 3.0, 2: 5.0}, {2: 1.0})
    {2: 4.0}
    """
    return {seed: first[seed] - second[seed] for seed in sorted(first) if seed in second}
