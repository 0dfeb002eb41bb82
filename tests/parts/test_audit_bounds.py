"""Bounds from attacks: coverage on mechanisms whose epsilon is known, sharpness, and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import UsageError
from shoal.parts.privacy.audit_bounds import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_runs_epsilon,
    many_runs_epsilon,
    one_run_epsilon,
    one_run_p_value,
    surely_less,
    surely_more,
)

TRIALS = 200


def randomised_response(
    rng: np.random.Generator, count: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coins, and each coin or its opposite, right with chance e^epsilon / (1 + e^epsilon)."""
    coins = rng.random(count) < 0.5
    right = rng.random(count) < 1 / (1 + math.exp(-epsilon))
    # Ties are broken by the order of canaries, which says nothing of coins.
    return np.where(coins == right, 1.0, 0.0), coins


def gaussian(rng: np.random.Generator, count: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    coins = rng.random(count) < 0.5
    return rng.normal(size=count) + mu * coins, coins


def covered(misses: int, confidence: float) -> bool:
    """Whether so many misses are no evidence against the confidence."""
    return stats.binomtest(misses, TRIALS, 1 - confidence, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(("epsilon", "confidence"), [(0.5, 0.8), (1.0, 0.95), (3.0, 0.8)])
def test_coverage_on_randomised_response(epsilon: float, confidence: float) -> None:
    """The bound is above the true epsilon no more often than it may be, and not far below it."""
    rng = np.random.default_rng(1)
    many, once = [], []
    for _ in range(TRIALS):
        scores, coins = randomised_response(rng, 600, epsilon)
        many.append(many_runs_epsilon(scores, coins, 0.0, confidence))
        once.append(one_run_epsilon(scores, coins, 0.0, confidence, guesses=600))
    chance = 1 / (1 + math.exp(-epsilon))
    # Two limits from 150 runs each at half the error, and one from 600 guesses.
    for bounds, tests, error in ((many, 150, (1 - confidence) / 2), (once, 600, 1 - confidence)):
        assert covered(sum(bound > epsilon for bound in bounds), confidence)
        off = stats.norm.ppf(1 - error) * math.sqrt(chance * (1 - chance) / tests)
        expected = math.log((chance - off) / (1 - chance + off))
        assert np.median(bounds) > 0.75 * expected


def test_one_run_uses_up_its_confidence() -> None:
    """With guesses about everybody no slack is left: the true epsilon is rejected in nearly 20% of
    runs, so that a bound which is a little too bold would be seen."""
    right = np.random.default_rng(2).binomial(501, 1 / (1 + math.exp(-1.0)), size=TRIALS)
    misses = sum(one_run_p_value(501, 501, int(each), 1.0, 0.0) <= 0.2 for each in right)
    assert misses > 0.13 * TRIALS
    assert covered(misses, 0.8)


@pytest.mark.parametrize(("mu", "confidence"), [(0.5, 0.95), (1.0, 0.8), (2.5, 0.8)])
def test_coverage_on_the_gaussian_mechanism(mu: float, confidence: float) -> None:
    rng, delta = np.random.default_rng(3), 1e-2
    truth = gaussian_epsilon(mu, delta)
    bounds = np.array(
        [
            [
                many_runs_epsilon(scores, coins, delta, confidence),
                gaussian_runs_epsilon(scores, coins, delta, confidence),
                one_run_epsilon(scores, coins, delta, confidence),
            ]
            for scores, coins in (gaussian(rng, 600, mu) for _ in range(TRIALS))
        ]
    )
    for misses in (bounds > truth).sum(0):
        assert covered(int(misses), confidence)
    if mu > 2:
        assert np.median(bounds[:, 1]) > 0.5 * truth


def test_a_sharper_assumption_proves_more() -> None:
    rng = np.random.default_rng(4)
    scores, coins = gaussian(rng, 4000, 3.0)
    plain = many_runs_epsilon(scores, coins, 1e-5)
    sharp = gaussian_runs_epsilon(scores, coins, 1e-5)
    truth = gaussian_epsilon(3.0, 1e-5)
    assert plain < 0.5 * truth < 0.8 * truth < sharp < truth


def test_nothing_is_proved_by_guessing() -> None:
    rng = np.random.default_rng(5)
    found = [many_runs_epsilon(*gaussian(rng, 400, 0.0), 1e-5, 0.99) for _ in range(100)]
    once = [one_run_epsilon(*gaussian(rng, 400, 0.0), 1e-5, 0.99) for _ in range(100)]
    assert sum(each > 0 for each in found) <= 5
    assert sum(each > 0 for each in once) <= 5
    # Nor by being wrong all the time.
    coins = np.arange(400) % 2 == 0
    assert many_runs_epsilon(-1.0 * coins, coins, 0.0) == 0.0
    assert one_run_epsilon(-1.0 * coins, coins, 0.0) == 0.0
    # A score that says nothing, and is the same for all.
    assert many_runs_epsilon(np.zeros(400), coins, 0.0) == 0.0
    # What succeeds no more often than delta proves nothing.
    assert many_runs_epsilon(1.0 * coins, coins, 0.999) == 0.0


@given(hits=st.integers(0, 40), more=st.integers(0, 40), confidence=st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_limits_are_those_of_binomial_tails(hits: int, more: int, confidence: float) -> None:
    trials = hits + more
    if trials == 0:
        return
    low, high = (float(f(hits, trials, confidence)) for f in (surely_more, surely_less))
    assert low <= hits / trials <= high
    if hits:
        assert stats.binom.sf(hits - 1, trials, low) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert low == 0
    if more:
        assert stats.binom.cdf(hits, trials, high) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert high == 1


@given(
    guesses=st.integers(1, 60), spare=st.integers(0, 60), share=st.floats(0, 1),
    epsilon=st.floats(0, 6), more=st.floats(0, 3), delta=st.sampled_from((0.0, 1e-6, 1e-3)),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_p_values_grow_with_epsilon_and_delta_and_fall_with_success(
    guesses: int, spare: int, share: float, epsilon: float, more: float, delta: float
) -> None:
    right = round(share * guesses)
    p = one_run_p_value(guesses + spare, guesses, right, epsilon, delta)
    assert 0 <= p <= 1
    assert one_run_p_value(guesses + spare, guesses, right, epsilon + more, delta) >= p - 1e-12
    assert one_run_p_value(guesses + spare, guesses, right, epsilon, delta + 1e-4) >= p - 1e-12
    if right:
        assert one_run_p_value(guesses + spare, guesses, right - 1, epsilon, delta) >= p - 1e-12


def test_p_values_by_hand() -> None:
    """Of 3 guesses about 4 canaries 2 are right; W is a binomial law of 3 draws."""
    q, delta = 1 / (1 + math.exp(-1.0)), 0.01
    law = [math.comb(3, k) * q**k * (1 - q) ** (3 - k) for k in range(4)]
    short = max(law[1] / 1, (law[1] + law[0]) / 2)
    expected = law[2] + law[3] + 2 * 4 * delta * short
    assert one_run_p_value(4, 3, 2, 1.0, delta) == pytest.approx(expected, rel=1e-12)


@given(mu=st.floats(0.05, 8), delta=st.floats(1e-9, 0.2))
@settings(max_examples=25, deadline=None)
def test_the_gaussian_curve_and_its_inverse(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        assert gaussian_delta(mu, 0.0) <= delta
        return
    assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=1e-5)
    # By the densities: what exceeds e^epsilon times the other one.
    x = np.linspace(-12, mu + 12, 100_001)
    above = stats.norm.pdf(x, mu) - math.exp(min(epsilon, 600)) * stats.norm.pdf(x)
    area = float(np.clip(above, 0, None).sum() * (x[1] - x[0]))
    assert area == pytest.approx(delta, rel=1e-2, abs=1e-11)


def test_curve_agrees_with_dp_accounting() -> None:
    dp = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    del dp
    for mu, delta in ((0.5, 1e-5), (2.0, 1e-6), (4.0, 1e-3)):
        theirs = pld.from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-3)
        assert gaussian_epsilon(mu, delta) == pytest.approx(
            theirs.get_epsilon_for_delta(delta), abs=5e-3
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: many_runs_epsilon([1.0, 2.0], [True], 0.0), "need a number and a bool for each"),
        (lambda: many_runs_epsilon([1.0], [1.0], 0.0), "need a number and a bool for each"),
        (lambda: many_runs_epsilon([1.0] * 4, [True] * 4, 0.0), "with and without the canary"),
        (lambda: many_runs_epsilon([math.nan] * 4, [True] * 4, 0.0), "not a number"),
        (lambda: one_run_epsilon([1.0] * 4, [True] * 4, 1.0), "delta=1.0"),
        (lambda: one_run_epsilon([1.0] * 4, [True] * 4, 0.0, 1.0), "confidence=1.0"),
        (lambda: one_run_epsilon([1.0] * 4, [True] * 4, 0.0, guesses=5), "guesses=5 about 4"),
        (lambda: one_run_p_value(4, 5, 2, 1.0, 0.0), "2 right of 5 guesses about 4"),
        (lambda: gaussian_epsilon(-1.0, 0.1), "mu=-1.0"),
        (lambda: gaussian_epsilon(1.0, 0.0), "delta=0.0"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
