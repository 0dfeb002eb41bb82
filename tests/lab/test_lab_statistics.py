"""Intervals and quantiles against scipy, numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shoal.base import keyed
from shoal.lab import statistics
from shoal.lab.statistics import (
    bootstrap_interval,
    median,
    median_interval,
    paired,
    quantile,
    summarise,
)

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(numbers)
def test_median_and_quantiles_are_numpys(values: list[float]) -> None:
    assert median(values) == pytest.approx(float(np.median(values)), rel=1e-12, abs=1e-9)
    for q in (0.05, 0.5, 0.95):
        assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-9)


def test_empty_and_broken_values_have_no_median() -> None:
    assert math.isnan(median([]))
    assert math.isnan(median([1.0, math.nan, 2.0]))
    assert math.isnan(quantile([], 0.5))
    assert median_interval([1.0]) is None
    assert median_interval([1.0, math.nan]) is None
    assert bootstrap_interval([1.0, math.inf]) is None


@pytest.mark.parametrize("count", range(2, 41))
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_median_interval_takes_the_largest_rank_that_covers(count: int, level: float) -> None:
    values = [float(v) for v in range(count)]
    found = median_interval(values, level)
    assert found is not None
    rank = int(found.low) + 1
    assert found.high == count - rank
    binomial = stats.binom(count, 0.5)
    assert found.level == pytest.approx(1 - 2 * binomial.cdf(rank - 1), abs=1e-12)
    narrower = 1 - 2 * binomial.cdf(rank)
    assert found.level >= level or rank == 1
    assert narrower < level or 2 * (rank + 1) > count + 1


def test_median_interval_covers_the_median_as_often_as_it_says() -> None:
    """5,000 samples of 7 exponential values, drawn by key; the median is ln 2."""
    trials, count, hits, level = 5000, 7, 0, 0.0
    for trial in range(trials):
        values = [-math.log1p(-keyed.uniform(3, "coverage", trial, i)) for i in range(count)]
        found = median_interval(values, 0.9)
        assert found is not None
        level = found.level
        hits += found.low <= math.log(2) <= found.high
    deviation = math.sqrt(level * (1 - level) / trials)
    assert abs(hits / trials - level) < 4 * deviation


def test_bootstrap_draws_are_the_keyed_ones() -> None:
    state = keyed.fold(0, 5, "bootstrap")
    expected = [keyed.unit(keyed.fold(state, i)) for i in range(64)]
    assert statistics._uniform(5, 64).tolist() == expected


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = [keyed.normal(1, "sample", i) + 3 for i in range(30)]
    ours = bootstrap_interval(values, resamples=8000)
    theirs = stats.bootstrap(
        (np.array(values),), np.mean, method="percentile", n_resamples=8000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert ours is not None
    error = np.std(values) / math.sqrt(30)
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * error)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * error)
    assert ours == bootstrap_interval(values, resamples=8000)
    assert ours != bootstrap_interval(values, resamples=8000, seed=1)


def test_summaries_by_statistic() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    assert summarise(values)[0] == 2.5
    assert summarise(values, "mean")[0] == 4.0
    assert summarise(values, "min")[0] == 1.0
    worst, spread = summarise(values, "max")
    assert worst == 10.0
    assert spread is not None
    assert (spread.low, spread.high) == (1.0, 10.0)
    assert math.isnan(summarise([])[0])


def test_pairs_are_of_common_seeds() -> None:
    assert paired({0: 1.0, 2: 5.0, 3: 1.0}, {2: 2.0, 3: 4.0, 9: 0.0}) == {2: 3.0, 3: -3.0}
