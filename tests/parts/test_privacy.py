"""The accountant: against closed forms, enumeration, the Gaussian mechanism and dp-accounting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import (
    ORDERS,
    Accountant,
    gaussian_renyi,
    log_convolve,
    log_power,
    renyi_divergence,
    to_epsilon,
)
from shoal.parts.privacy.calibrate import calibrated
from shoal.parts.transform.pbm import Pbm
from shoal.parts.transform.rqm import Rqm

laws = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8).map(
    lambda weights: torch.tensor(weights, dtype=torch.float64) / sum(weights)
)


@given(p=laws, q=laws, alpha=st.floats(1.01, 40))
@settings(max_examples=60, deadline=None)
def test_divergence_is_its_sum_and_grows_with_the_order(p, q, alpha: float) -> None:
    size = min(len(p), len(q))
    p, q = p[:size] / p[:size].sum(), q[:size] / q[:size].sum()
    found = renyi_divergence(p.log(), q.log(), alpha)
    direct = math.log(float((p**alpha * q ** (1 - alpha)).sum())) / (alpha - 1)
    assert found == pytest.approx(direct, rel=1e-6, abs=1e-9)
    kl, most = (renyi_divergence(p.log(), q.log(), order) for order in (1.0, math.inf))
    assert kl == pytest.approx(float(stats.entropy(p, q)), abs=1e-12)
    assert kl - 1e-9 <= found <= most + 1e-9


def test_impossible_codes_are_infinitely_telling_and_never_nan() -> None:
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    for alpha in (1.0, 2.0, 64.0, math.inf):
        assert renyi_divergence(p, q, alpha) == math.inf
        assert renyi_divergence(q, p, alpha) == pytest.approx(math.log(2))
    assert Accountant(Pbm(theta=0.5)).renyi(2.0) == math.inf
    assert Accountant(Pbm(theta=0.5)).epsilon(1e-5) == math.inf
    plain = Rqm(extension=0.0, keep=1.0, private=False)
    assert Accountant(plain, 3).renyi(8.0) == math.inf


@given(p=laws, q=laws)
@settings(max_examples=40, deadline=None)
def test_convolution_in_logarithms_is_convolution(p, q) -> None:
    found = log_convolve(p.log(), q.log()).exp().numpy()
    assert np.abs(found - np.convolve(p, q)).max() <= 1e-14
    cube = log_power(p.log(), 3).exp().numpy()
    assert np.abs(cube - np.convolve(np.convolve(p, p), p)).max() <= 1e-14


def test_sums_of_pbm_are_binomial_even_where_chances_leave_the_range_of_floats() -> None:
    codec = Pbm(levels=16, theta=0.25)
    law = codec.log_pmf(torch.tensor(-codec.clip, dtype=torch.float64))
    found = log_power(law, 40).numpy()
    expected = stats.binom.logpmf(np.arange(601), 600, 0.25)
    assert expected.min() < -800  # no float64 holds e^-800
    assert np.abs(found - expected).max() <= 1e-8 * 800


@pytest.mark.parametrize("mechanism", [Rqm(levels=4, keep=0.3), Pbm(levels=3, theta=0.4)])
def test_sums_by_enumeration_of_all_codes(mechanism: Rqm | Pbm) -> None:
    """Three clients: every triple of codes, both neighbours, all choices of the others."""
    ends = torch.tensor([-mechanism.clip, mechanism.clip], dtype=torch.float64)
    low, high = mechanism.pmf(ends).numpy()
    size = mechanism.levels

    def law(first: np.ndarray, others: tuple[np.ndarray, ...]) -> np.ndarray:
        total = np.zeros(3 * (size - 1) + 1)
        for codes in np.ndindex(size, size, size):
            total[sum(codes)] += first[codes[0]] * others[0][codes[1]] * others[1][codes[2]]
        return total

    for alpha in (1.5, 2.0, 8.0):
        worst = 0.0
        for others in ((high, high), (low, low), (high, low)):
            p, q = law(high, others), law(low, others)
            for a, b in ((p, q), (q, p)):
                worst = max(worst, math.log((a**alpha * b ** (1 - alpha)).sum()) / (alpha - 1))
        assert Accountant(mechanism, 3).renyi(alpha) == pytest.approx(worst, rel=1e-9)


@given(
    clip=st.floats(0.2, 4), levels=st.integers(3, 20), extension=st.floats(0.1, 4),
    keep=st.floats(0.05, 0.9), alpha=st.floats(1.1, 32),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_no_pair_is_worse_than_the_extremes_and_none_beats_infinity(
    clip: float, levels: int, extension: float, keep: float, alpha: float
) -> None:
    mechanism = Rqm(clip=clip, levels=levels, extension=extension, keep=keep)
    extremes = Accountant(mechanism)
    assert Accountant(mechanism, points=11).renyi(alpha) <= extremes.renyi(alpha) * (1 + 1e-9)
    assert extremes.renyi(alpha) <= extremes.renyi(math.inf) + 1e-9 < math.inf
    # More clients hide each other better.
    assert Accountant(mechanism, 4).renyi(alpha) <= extremes.renyi(alpha) * (1 + 1e-9)


def test_conversion_of_the_gaussian_mechanism() -> None:
    """Over continuous orders the least is s^2/2 + s sqrt(2 log(1/delta)) (Mironov, section 6)."""
    delta, noise = 1e-5, 4.0
    curve = [gaussian_renyi(alpha, clip=1.0, noise=noise) for alpha in ORDERS]
    shift = 2.0 / noise
    closed = shift**2 / 2 + shift * math.sqrt(2 * math.log(1 / delta))
    plain = to_epsilon(ORDERS, curve, delta)
    assert closed <= plain + 1e-9
    assert plain <= closed * 1.01
    tight = to_epsilon(ORDERS, curve, delta, tight=True)

    # What no conversion can go below: the exact curve of the Gaussian mechanism (Balle and Wang
    # 2018, theorem 8).
    def exact_delta(epsilon: float) -> float:
        a, b = shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift
        return float(stats.norm.cdf(a) - math.exp(epsilon) * stats.norm.cdf(b))

    assert exact_delta(tight) <= delta
    assert tight < plain


def test_entries_and_rounds_add_up() -> None:
    accountant = Accountant(Rqm(), 10)
    order = (2.0,)
    one = accountant.epsilon(1e-5, orders=order) - math.log(1e5)
    many = accountant.epsilon(1e-5, rounds=7, dims=30, orders=order) - math.log(1e5)
    assert one == pytest.approx(accountant.renyi(2.0))
    assert many == pytest.approx(210 * one)


def test_calibration_meets_its_target() -> None:
    target = Accountant(Rqm(), 40).renyi(2.0)
    theta = calibrated(
        lambda t: Pbm(theta=t), lambda a: a.renyi(2.0), target, 0.01, 0.4, clients=40
    )
    assert Accountant(Pbm(theta=theta), 40).renyi(2.0) == pytest.approx(target, rel=1e-6)
    keep = calibrated(
        lambda q: Rqm(keep=q), lambda a: a.epsilon(1e-5, rounds=10), 20.0, 0.05, 0.95, clients=10
    )
    assert Accountant(Rqm(keep=keep), 10).epsilon(1e-5, rounds=10) == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Accountant(Rqm(), clients=0), "clients=0"),
        (lambda: Accountant(Rqm(), points=1), "points=1"),
        (lambda: Accountant(Rqm()).renyi(0.5), "alpha=0.5; need an order of at least 1"),
        (lambda: Accountant(Rqm()).epsilon(0.0), "delta=0.0"),
        (lambda: Accountant(Rqm()).epsilon(1e-5, rounds=0), "rounds=0"),
        (lambda: to_epsilon([1.0], [0.1], 0.1), "orders: 1.0"),
        (
            lambda: calibrated(lambda t: Pbm(theta=t), lambda a: a.renyi(2.0), 1e9, 0.1, 0.4),
            "the target 1e.09 is not between",
        ),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_agrees_with_dp_accounting() -> None:
    """Google's package, where it is installed: conversions, and exact composition below ours."""
    rdp = pytest.importorskip("dp_accounting.rdp")
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    accountant = Accountant(Rqm(), 40)
    orders = tuple(order for order in ORDERS if 1.01 < order < 500)
    spent = [20 * each for each in accountant.curve(orders)]
    theirs, _ = rdp.compute_epsilon(orders, spent, 1e-5)
    assert to_epsilon(orders, spent, 1e-5, tight=True) == pytest.approx(theirs, rel=1e-6)
    clip = accountant.mechanism.clip
    low, high = accountant.mechanism.log_pmf(
        torch.tensor([-clip, clip], dtype=torch.float64)
    ).tolist()
    exact = pld.from_two_probability_mass_functions(
        dict(enumerate(low)), dict(enumerate(high)), value_discretization_interval=1e-3
    )
    local = Accountant(Rqm())
    assert exact.get_epsilon_for_delta(1e-12) <= local.renyi(math.inf) + 1e-3
    ours = local.epsilon(1e-3, rounds=5, tight=True)
    composed = exact.self_compose(5).get_epsilon_for_delta(1e-3)
    assert 0.8 * ours <= composed <= ours + 5e-3
