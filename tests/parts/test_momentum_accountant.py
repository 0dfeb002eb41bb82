"""The accountant of momentum: against enumeration, closed forms, figures and dp-accounting."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.privacy.momentum_accountant import (
    momentum_epsilon,
    momentum_noise,
    momentum_renyi,
)
from shoal.parts.privacy.sampled_gaussian import sampled_gaussian_renyi

WHOLE = tuple(float(order) for order in range(2, 129))


def enumerated(s: float, p: float, rounds: int, beta: float, alpha: float) -> float:
    """The expectation over all 2^rounds bits of one record."""
    lam, total = alpha * (alpha - 1) / (2 * s * s), []
    for bits in product((0, 1), repeat=rounds):
        memory = spent = log_chance = 0.0
        for bit in bits:
            memory = beta * memory + (1 - beta) * bit
            spent += memory**2
            log_chance += math.log(p if bit else 1 - p)
        total.append(log_chance + lam * spent)
    return float(np.logaddexp.reduce(total)) / (alpha - 1)


def rounded_up(s: float, beta: float, orders: tuple[float, ...], points: int) -> float:
    """epsilon at p = 0.05, 200 rounds and delta = 1e-5 with m rounded up to a grid."""
    alpha = np.array(orders)[:, None]
    lam = alpha * (alpha - 1) / (2 * s * s)
    memory = np.linspace(0, 1, points)
    low = np.ceil(beta * memory * (points - 1) - 1e-9).astype(int)
    high = np.ceil((beta * memory + 1 - beta) * (points - 1) - 1e-9).astype(int)
    value = np.zeros((len(orders), points))
    for _ in range(200):
        reached = lam * memory**2 + value
        value = np.logaddexp(math.log(0.95) + reached[:, low], math.log(0.05) + reached[:, high])
    return float((value[:, 0] / (alpha[:, 0] - 1) + math.log(1e5) / (alpha[:, 0] - 1)).min())


@given(
    s=st.floats(0.7, 6), p=st.floats(0.02, 0.9), rounds=st.integers(1, 9),
    beta=st.floats(0, 0.95), alpha=st.sampled_from((1.5, 2.0, 5.0, 12.0)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_never_below_the_expectation_and_close_to_it(
    s: float, p: float, rounds: int, beta: float, alpha: float
) -> None:
    exact = enumerated(s, p, rounds, beta, alpha)
    (found,) = momentum_renyi(s, p, rounds, beta, [alpha])
    (finer,) = momentum_renyi(s, p, rounds, beta, [alpha], points=1025)
    assert exact - 1e-9 <= finer <= found + 1e-9
    # The chord's error per round is lam / (4 * 128^2) at most, and what V adds to the curvature.
    assert finer <= exact * 1.01 + 1e-6


@pytest.mark.parametrize(
    ("s", "beta", "figure"),
    [(2.0, 0.9, 3.77), (5.0, 0.9, 1.40), (1.0, 0.9, 8.32)],
)
def test_figures_of_a_grid_that_rounds_up(s: float, beta: float, figure: float) -> None:
    found = momentum_epsilon(s, 0.05, 200, beta, 1e-5, orders=WHOLE)
    assert found == pytest.approx(figure, rel=0.01)
    some = (2.0, 3.0, 4.0, 5.0, 6.0, 12.0)
    coarse = rounded_up(s, beta, some, 4001)
    assert coarse == pytest.approx(figure, rel=3e-3)
    # Chords are tighter than rounding up, on a grid of a thirtieth of the points.
    assert found <= coarse


@pytest.mark.parametrize(("s", "figure"), [(2.0, 11.19), (5.0, 3.91), (1.0, 28.0)])
def test_figures_without_momentum(s: float, figure: float) -> None:
    spent = momentum_renyi(s, 0.05, 200, 0.0, WHOLE)
    by_hand = [
        200 / (a - 1) * math.log(0.95 + 0.05 * math.exp(a * (a - 1) / (2 * s * s)))
        for a in WHOLE[:20]
    ]
    assert spent[:20] == pytest.approx(by_hand, rel=1e-9)
    epsilon = min(e + math.log(1e5) / (a - 1) for a, e in zip(WHOLE, spent, strict=True))
    assert epsilon == pytest.approx(figure, rel=0.01)


@pytest.mark.parametrize(("s", "figure"), [(2.0, 2.06), (5.0, 0.72)])
def test_without_momentum_the_subsampled_mechanism_is_taken(s: float, figure: float) -> None:
    plain = momentum_epsilon(s, 0.05, 200, 0.0, 1e-5)
    tight = momentum_epsilon(s, 0.05, 200, 0.0, 1e-5, tight=True)
    assert tight < plain
    assert min(abs(plain / figure - 1), abs(tight / figure - 1)) <= 0.01


def test_agrees_with_dp_accounting_without_momentum() -> None:
    rdp = pytest.importorskip("dp_accounting.rdp")
    dp = pytest.importorskip("dp_accounting")
    for s, p, rounds in ((1.1, 0.1, 150), (2.0, 0.05, 200), (5.0, 0.01, 1000)):
        orders = [float(order) for order in range(2, 65)]
        theirs = rdp.RdpAccountant(orders)
        event = dp.PoissonSampledDpEvent(p, dp.GaussianDpEvent(s))
        theirs.compose(event, rounds)
        ours = momentum_epsilon(s, p, rounds, 0.0, 1e-5, orders=orders, tight=True)
        assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
        # Nor does the bound that holds for momentum go below it.
        for order in (2, 5, 32):
            (mixture,) = momentum_renyi(s, p, rounds, 0.0, [order])
            assert mixture >= sampled_gaussian_renyi(s, p, rounds, order) - 1e-12


def test_everything_drawn_is_a_composition_of_gaussians() -> None:
    memory, square = 0.0, 0.0
    for _ in range(30):
        memory = 0.8 * memory + 0.2
        square += memory**2
    (found,) = momentum_renyi(3.0, 1.0, 30, 0.8, [6.0], points=4097)
    assert found == pytest.approx(6.0 * square / 18.0, rel=1e-4)
    assert found >= 6.0 * square / 18.0


@given(
    s=st.floats(0.8, 5), p=st.floats(0.02, 0.5), rounds=st.integers(2, 60), beta=st.floats(0, 0.95),
    more=st.floats(1.05, 2),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_monotone_in_rounds_sampling_and_noise(
    s: float, p: float, rounds: int, beta: float, more: float
) -> None:
    base = momentum_epsilon(s, p, rounds, beta, 1e-5)
    assert momentum_epsilon(s, p, rounds + 5, beta, 1e-5) >= base - 1e-9
    assert momentum_epsilon(s, min(1.0, p * more), rounds, beta, 1e-5) >= base - 1e-9
    assert momentum_epsilon(s * more, p, rounds, beta, 1e-5) <= base + 1e-9


def test_longer_memory_costs_less() -> None:
    """In divergence; at beta = 0 of the same bound, before the subsampled mechanism is taken."""
    spent = [momentum_renyi(2.0, 0.05, 200, beta, [4.0])[0] for beta in (0, 0.5, 0.9, 0.99, 0.999)]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < 0.05 * spent[0]


@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_inversion(epsilon: float) -> None:
    for beta in (0.0, 0.9):
        s = momentum_noise(epsilon, 0.1, 150, beta, 1e-4)
        assert epsilon * (1 - 1e-8) <= momentum_epsilon(s, 0.1, 150, beta, 1e-4) <= epsilon


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: momentum_epsilon(0.0, 0.1, 10, 0.9, 1e-5), "s=0.0; need noise above 0"),
        (lambda: momentum_epsilon(1.0, 0.0, 10, 0.9, 1e-5), "p=0.0"),
        (lambda: momentum_epsilon(1.0, 1.1, 10, 0.9, 1e-5), "p=1.1"),
        (lambda: momentum_epsilon(1.0, 0.1, 0, 0.9, 1e-5), "rounds=0"),
        (lambda: momentum_epsilon(1.0, 0.1, 10, 1.0, 1e-5), "beta=1.0"),
        (lambda: momentum_epsilon(1.0, 0.1, 10, 0.9, 0.0), "delta=0.0"),
        (lambda: momentum_renyi(1.0, 0.1, 10, 0.9, [1.0]), "orders from 1.0"),
        (lambda: momentum_noise(1e-9, 0.1, 150, 0.9, 1e-4), "epsilon=1e-09; from"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
