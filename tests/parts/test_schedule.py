"""Schedules of server steps: closed forms, what weights do to the optimum, and staleness."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from math import ceil, fsum, inf, isclose
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.schedule import (
    AllReturns,
    Drawn,
    EachReturn,
    FirstReturns,
    FixedTimes,
    Scheme,
    analyze_schedule,
)

# The slowest of 20 clients takes 1 s, the fastest 80% less.
F80 = tuple(1.0 - i * 0.8 / 19 for i in range(20))
UNIFORM = (1.0 / 20,) * 20


def first(scheme: Scheme, times: tuple[float, ...], steps: int) -> list[Any]:
    return list(islice(scheme.steps(times), steps))


def test_two_clients_by_hand() -> None:
    """tau = (1, 0.5): client 1 at 0.5, then clients 0 and 1, in this order, at 1."""
    assert first(EachReturn(), (1.0, 0.5), 6) == [
        (0.5, (1,)), (1.0, (0,)), (1.0, (1,)), (1.5, (1,)), (2.0, (0,)), (2.0, (1,)),
    ]  # fmt: skip
    found = analyze_schedule((1.0, 0.5), (0.5, 0.5), EachReturn())
    assert found.weights == (1.5, 0.75)
    assert found.counted == (0.5, 0.5)
    assert isclose(found.steps_per_s, 3.0, rel_tol=1e-2)


def test_fixed_times_take_whoever_has_returned() -> None:
    assert first(FixedTimes(0.5), (1.0, 0.5, 0.6), 4) == [
        (0.5, (1,)), (1.0, (0, 1, 2)), (1.5, (1,)), (2.0, (0, 1, 2)),
    ]  # fmt: skip
    assert analyze_schedule((1.0, 0.5, 0.6), (0.5, 0.25, 0.25), FixedTimes(0.5)).weights == (
        1.0, 0.25, 0.5,
    )  # fmt: skip


def test_a_period_that_divides_a_time_doubles_no_weight() -> None:
    """Three times 0.1 is more than three periods of 0.1 in floats."""
    assert (0.1 + 0.1 + 0.1) / 0.1 > 3.0
    assert FixedTimes(0.1).periods(0.1 + 0.1 + 0.1) == 3
    assert FixedTimes(0.1).periods(0.7) == 7
    assert FixedTimes(0.1).periods(0.71) == 8


def test_a_full_buffer_lets_its_clients_go() -> None:
    assert first(FirstReturns(2), (1.0, 0.5, 0.3), 3) == [
        (0.5, (1, 2)), (1.0, (0, 2)), (1.3, (1, 2)),
    ]  # fmt: skip


def test_a_buffer_of_all_is_federated_averaging() -> None:
    assert first(FirstReturns(20), F80, 5) == first(AllReturns(), F80, 5)


def test_the_fastest_of_f80_and_its_weights() -> None:
    """The range of weights of 20 clients of which the fastest is five times as fast."""
    found = analyze_schedule(F80, UNIFORM, EachReturn())
    assert isclose(fsum(1.0 / t for t in F80), 41.31, abs_tol=0.01)
    assert isclose(min(found.weights), 0.41, abs_tol=0.005)
    assert isclose(max(found.weights), 2.07, abs_tol=0.005)


times = st.lists(st.floats(0.05, 5.0), min_size=1, max_size=8)
parts = st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8)


def schemes(clients: int, period_s: float) -> list[Scheme]:
    return [
        AllReturns(), EachReturn(), FixedTimes(period_s), FirstReturns(1 + clients // 2),
        Drawn(1 + clients // 3),
    ]  # fmt: skip


@given(times=times, parts=parts, period_s=st.floats(0.1, 3.0))
@settings(max_examples=25, deadline=None)
def test_unbiased_weights_count_everybody_as_asked(
    times: list[float], parts: list[float], period_s: float
) -> None:
    """Invariant: with every scheme the mean weight is p_i, so the optimum is the one asked for."""
    whole = fsum(parts[: len(times)])
    asked = [part / whole for part in parts[: len(times)]]
    for scheme in schemes(len(times), period_s):
        found = analyze_schedule(times, asked, scheme, steps=400)
        if min(found.shares) == 0:
            # Too slow to take part in so few steps.
            assert isinstance(scheme, FirstReturns)
            assert found.gap == 0 or found.gap > 0
            continue
        for counted, q, p in zip(found.counted, found.importances, asked, strict=True):
            assert abs(counted - p) < 1e-9
            assert abs(q - p) < 1e-9
        assert found.gap < 1e-15
        assert isclose(fsum(found.counted), 1.0, rel_tol=1e-9)


@given(times=times, period_s=st.floats(0.2, 3.0))
@settings(max_examples=12, deadline=None)
def test_shares_are_those_that_are_counted(times: list[float], period_s: float) -> None:
    steps = 2000
    for scheme in schemes(len(times), period_s):
        closed = scheme.shares(times)
        if closed is None:
            continue
        counts = Counter(c for _, clients in first(scheme, tuple(times), steps) for c in clients)
        for client, share in enumerate(closed):
            tolerance = 0.05 if isinstance(scheme, Drawn) else 0.02
            assert abs(counts[client] / steps - share) < tolerance


def test_the_same_weight_for_all_favours_the_fast() -> None:
    found = analyze_schedule((1.0, 0.5), (0.5, 0.5), EachReturn(), weighting="identical")
    assert found.weights == (1.0, 1.0)
    np.testing.assert_allclose(found.importances, (1 / 3, 2 / 3))
    np.testing.assert_allclose(found.bias, (1 / 3 - 1 / 2, 2 / 3 - 1 / 2))
    assert isclose(found.gap, (1 / 6) ** 2 / (1 / 3) + (1 / 6) ** 2 / (2 / 3))
    buffered = analyze_schedule(F80, UNIFORM, FirstReturns(5), weighting="identical")
    np.testing.assert_allclose(buffered.weights, 1 / 5, rtol=1e-9)


def test_staleness() -> None:
    """Nobody's work is old in federated averaging; a slow client misses the others' steps."""
    calm = analyze_schedule(F80, UNIFORM, AllReturns())
    assert (calm.staleness_most, set(calm.staleness)) == (0, {0.0})
    assert calm.weights == UNIFORM
    assert isclose(calm.largest, 1.0)
    fixed = analyze_schedule((1.0, 0.5, 0.2), (0.4, 0.3, 0.3), FixedTimes(0.25))
    assert fixed.staleness == (3.0, 1.0, 0.0)
    each = analyze_schedule(F80, UNIFORM, EachReturn())
    # The slowest sees 41.31 steps per second, less its own.
    assert abs(each.staleness[0] - 40.31) < 1.0
    others = sum(ceil(1.0 / t) for t in F80[1:])
    assert 41 <= each.staleness_most <= others


def test_weights_that_vary_less_are_steadier() -> None:
    """Terms of the convergence bound: the variance of weights rises from waiting to not waiting."""
    ordered = [AllReturns(), FixedTimes(0.5), FixedTimes(0.25), EachReturn()]
    found = [analyze_schedule(F80, UNIFORM, scheme).variance for scheme in ordered]
    assert found == sorted(found)
    assert found[-1] > 10 * found[0]


# What is minimised: quadratics whose optimum is known.


def optimum(weighting: str, lr: float, anchors: np.ndarray, seconds: int) -> np.ndarray:
    """The time average of the second half of asynchronous averaging.

    f_i(x) = |x - a_i|^2 / 2, ten full gradients per return, from the model that the client got. A
    client pulls just after its own change, which shifts what is found by the order of the rate.
    """
    found = analyze_schedule(F80, UNIFORM, EachReturn(), weighting=weighting)
    keep = (1.0 - lr) ** 10
    model = np.zeros(anchors.shape[1])
    sent = np.zeros_like(anchors)
    steps = round(seconds * found.steps_per_s)
    total, count = np.zeros_like(model), 0
    for n, (_, (client,)) in enumerate(islice(EachReturn().steps(F80), steps)):
        change = (1.0 - keep) * (anchors[client] - sent[client])
        model = model + found.weights[client] * change
        sent[client] = model
        if n >= steps // 2:
            total, count = total + model, count + 1
    return total / count


def test_each_return_minimises_what_the_analysis_says() -> None:
    # Anchors go with speeds, or no bias would show.
    anchors = np.stack((np.linspace(-1.7, 1.7, 20), np.linspace(1.7, -1.7, 20)), axis=1)
    for weighting in ("identical", "unbiased"):
        q = np.array(analyze_schedule(F80, UNIFORM, EachReturn(), weighting=weighting).importances)
        measured = optimum(weighting, 0.0002, anchors, 400)
        np.testing.assert_allclose(measured, q @ anchors, atol=1e-3)
    biased = np.array(
        analyze_schedule(F80, UNIFORM, EachReturn(), weighting="identical").importances
    )
    assert abs(biased @ anchors).max() > 0.3


@pytest.mark.parametrize(
    ("times", "importances", "scheme", "match"),
    [
        ((), (), EachReturn(), "no clients"),
        ((1.0, 0.0), (0.5, 0.5), EachReturn(), "client 1 takes 0.0 seconds"),
        ((1.0, -1.0), (0.5, 0.5), EachReturn(), "client 1 takes -1.0 seconds"),
        ((1.0, inf), (0.5, 0.5), EachReturn(), "client 1 takes inf seconds"),
        ((1.0, 1.0), (0.5, 0.6), EachReturn(), "sum 1.1"),
        ((1.0, 1.0), (1.5, -0.5), EachReturn(), "smallest -0.5"),
        ((1.0, 1.0), (1.0,), EachReturn(), "1 for 2 clients"),
        ((1.0, 1.0), (0.5, 0.5), FirstReturns(3), "count=3 of 2 clients"),
        ((1.0, 1.0), (0.5, 0.5), Drawn(3), "count=3 of 2 clients"),
    ],
)
def test_schedules_that_cannot_be(
    times: tuple[float, ...], importances: tuple[float, ...], scheme: Scheme, match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        analyze_schedule(times, importances, scheme)


def test_settings_that_cannot_work() -> None:
    for period_s in (0.0, -1.0, inf):
        with pytest.raises(UsageError, match="period_s="):
            FixedTimes(period_s)
    for scheme in (FirstReturns, Drawn):
        with pytest.raises(UsageError, match="count=0"):
            scheme(0)
    with pytest.raises(UsageError, match="weighting='equal'"):
        analyze_schedule((1.0,), (1.0,), EachReturn(), weighting="equal")
    with pytest.raises(UsageError, match="steps=9"):
        analyze_schedule((1.0,), (1.0,), EachReturn(), steps=9)
