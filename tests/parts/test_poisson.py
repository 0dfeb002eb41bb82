"""Poisson clocks: the same dates for whoever asks, gaps of the right law."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.schedule.poisson import Poisson


@given(st.integers(0, 2**40), st.floats(0.05, 30.0), st.floats(0.0, 60.0), st.floats(0.0, 60.0))
@settings(max_examples=60, deadline=None)
def test_a_longer_horizon_only_adds_dates(seed: int, rate: float, a: float, b: float) -> None:
    clock = Poisson(seed, ("edge", 3, 4), rate)
    short, long = clock.dates(min(a, b)), clock.dates(max(a, b))
    assert np.array_equal(short, long[: len(short)])
    assert (np.diff(long) >= 0).all()
    assert (long < max(a, b)).all()
    assert (long[len(short) :] >= min(a, b)).all()


def test_dates_are_those_of_scalar_draws() -> None:
    dates = Poisson(5, ("gradient", 2), 0.5).dates(3000.0)
    gaps = [-np.log1p(-keyed.uniform(5, "gradient", 2, i)) / 0.5 for i in range(len(dates))]
    np.testing.assert_allclose(dates, np.cumsum(gaps), rtol=1e-12)
    assert len(dates) > 1000


def test_gaps_are_exponential_and_counts_poisson() -> None:
    dates = Poisson(1, ("test",), 2.0).dates(20_000.0)
    assert stats.kstest(np.diff(dates), "expon", args=(0, 0.5)).pvalue > 0.01
    counts = np.histogram(dates, bins=4000, range=(0, 20_000))[0]
    assert counts.mean() == pytest.approx(10.0, rel=0.02)
    assert counts.var() == pytest.approx(10.0, rel=0.1)
    other = Poisson(1, ("other",), 2.0).dates(20_000.0)
    other_counts = np.histogram(other, bins=4000, range=(0, 20_000))[0]
    assert abs(np.corrcoef(counts, other_counts)[0, 1]) < 0.06


def test_a_clock_that_never_rings_and_clocks_that_cannot_be() -> None:
    assert len(Poisson(0, (), 0.0).dates(1e9)) == 0
    for rate in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="rate="):
            Poisson(0, (), rate)
    with pytest.raises(UsageError, match="until=inf"):
        Poisson(0, ()).dates(float("inf"))
