"""The accountant of noisy sums: against dp-accounting over a grid, quadrature, and itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import Accountant
from shoal.parts.privacy.audit_bounds import gaussian_epsilon
from shoal.parts.privacy.discrete_gaussian import DiscreteGaussianRelease
from shoal.parts.privacy.ledger import ORDERS, Budget, Ledger, most_within, noise_for
from shoal.parts.privacy.sampled_gaussian import GaussianRelease, sampled_gaussian_renyi
from shoal.parts.privacy.tree_noise import TreeRelease
from shoal.parts.transform.rqm import Rqm

NOISES = (0.5, 1.1, 4.0)
SHARES = (0.001, 0.01, 0.1, 0.5, 0.9, 1.0)
ROUNDS = (1, 100, 5000)
WHOLE = tuple(order for order in ORDERS if order == int(order))


def test_never_below_dp_accounting_over_a_grid() -> None:
    """Equal over the same orders; over its own, which it has more of, it is not below."""
    dp, rdp = pytest.importorskip("dp_accounting"), pytest.importorskip("dp_accounting.rdp")
    fine = rdp.RdpAccountant()._orders
    for noise in NOISES:
        for p in SHARES:
            event = dp.PoissonSampledDpEvent(p, dp.GaussianDpEvent(noise))
            same, default = rdp.RdpAccountant(WHOLE), rdp.RdpAccountant(fine[9:])
            for each in (same, default):
                each.compose(event, 1)
            for rounds in ROUNDS:
                ledger = Ledger().after(GaussianRelease(noise, p), rounds)
                for delta in (1e-3, 1e-6, 1e-10):
                    ours = ledger.epsilon(delta, WHOLE)
                    case = (noise, p, rounds, delta)
                    reference = rdp.compute_epsilon(WHOLE, rounds * same._rdp, delta)[0]
                    assert ours == pytest.approx(reference, rel=1e-9, abs=1e-6), case
                    finer = rdp.compute_epsilon(default._orders, rounds * default._rdp, delta)[0]
                    assert ours >= finer - 1e-6, case


@pytest.mark.parametrize(("noise", "p", "rounds"), [(0.8, 0.05, 50), (1.1, 0.05, 200), (4.0, 1, 9)])
def test_all_orders_are_sharper_and_still_above_the_exact_loss(
    noise: float, p: float, rounds: int
) -> None:
    """The distribution of the privacy loss itself, by dp-accounting, is below any such bound."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    exact = pld.from_gaussian_mechanism(
        noise, sampling_prob=p, value_discretization_interval=1e-3
    ).self_compose(rounds)
    ledger = Ledger().after(GaussianRelease(noise, p), rounds)
    for delta in (1e-3, 1e-6):
        truth = exact.get_epsilon_for_delta(delta)
        sharp, plain = ledger.epsilon(delta), ledger.epsilon(delta, WHOLE)
        assert truth - 0.02 <= sharp <= plain <= sharp * 1.1
        assert sharp <= 1.4 * truth


@given(
    s=st.floats(0.3, 8), p=st.floats(1e-3, 0.99), order=st.floats(1.05, 40),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_divergence_is_its_integral(s: float, p: float, order: float) -> None:
    """Both directions by adaptive quadrature of the densities; the larger is what is counted."""

    def logs(x: float) -> tuple[float, float]:
        plain, moved = -x * x / (2 * s * s), -((x - 1) ** 2) / (2 * s * s)
        return plain, float(np.logaddexp(math.log1p(-p) + plain, math.log(p) + moved))

    ends = np.linspace(-12 * s, order + 12 * s, 41)

    def moment(forward: bool) -> float:
        def height(x: float) -> float:
            plain, mixed = logs(x)
            top, bottom = (mixed, plain) if forward else (plain, mixed)
            return bottom + order * (top - bottom)

        peak = max(map(height, np.linspace(ends[0], ends[-1], 2000)))
        total = sum(
            integrate.quad(lambda x: math.exp(height(x) - peak), a, b, epsrel=1e-10)[0]
            for a, b in itertools.pairwise(ends)
        )
        return math.log(total) + peak - math.log(s * math.sqrt(2 * math.pi))

    found = sampled_gaussian_renyi(s, p, 1, order) * (order - 1)
    assert found == pytest.approx(moment(True), rel=1e-6, abs=1e-9)
    assert found >= moment(False) - 1e-8


@given(order=st.integers(2, 60), s=st.floats(0.4, 5), p=st.floats(1e-3, 0.9))
@settings(max_examples=25, deadline=None)
def test_orders_beside_a_whole_one_join_on(order: int, s: float, p: float) -> None:
    """The finite sum and the integral are one function of the order."""
    below, at, above = (
        sampled_gaussian_renyi(s, p, 1, order + shift) * (order + shift - 1)
        for shift in (-1e-4, 0.0, 1e-4)
    )
    assert at == pytest.approx((below + above) / 2, rel=1e-5, abs=1e-10)


@given(
    s=st.floats(0.4, 6), p=st.floats(1e-3, 1), rounds=st.integers(1, 3000),
    more=st.floats(1.01, 3), delta=st.sampled_from((1e-3, 1e-5, 1e-9)),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_monotone_in_rounds_noise_share_and_delta(
    s: float, p: float, rounds: int, more: float, delta: float
) -> None:
    def epsilon(s: float, p: float, rounds: int, delta: float) -> float:
        return Ledger().after(GaussianRelease(s, p), rounds).epsilon(delta)

    base = epsilon(s, p, rounds, delta)
    assert epsilon(s, p, rounds + 1, delta) >= base - 1e-9
    assert epsilon(s * more, p, rounds, delta) <= base + 1e-9
    assert epsilon(s, min(1.0, p * more), rounds, delta) >= base - 1e-9
    assert epsilon(s, p, rounds, delta / 10) >= base - 1e-9
    # All records used is the plain Gaussian mechanism, whose exact curve no accountant is below.
    assert epsilon(s, 1.0, rounds, delta) >= gaussian_epsilon(math.sqrt(rounds) / s, delta) - 1e-9


def test_different_releases_add_up() -> None:
    releases = [GaussianRelease(1.5, 0.1), TreeRelease(4.0, 12), DiscreteGaussianRelease(9.0, 3.0)]
    ledger = Ledger()
    for release in releases:
        ledger = ledger.after(release, 3)
    expected = [3 * sum(each.renyi(alpha) for each in releases) for alpha in ORDERS]
    assert ledger.curve() == pytest.approx(expected)
    assert ledger.epsilon(1e-5) > max(Ledger().after(r, 3).epsilon(1e-5) for r in releases)
    assert Ledger().after(releases[0], 0) == Ledger()
    assert Ledger().after(GaussianRelease(0.0)).epsilon(1e-5) == math.inf
    assert Ledger().after(GaussianRelease(1e7)).epsilon(1e-3) == 0.0


@pytest.mark.parametrize("epsilon", [0.3, 2.0, 20.0])
def test_noise_for_a_target(epsilon: float) -> None:
    def spent(noise: float) -> Ledger:
        return Ledger().after(GaussianRelease(noise, 0.02), 500)

    noise = noise_for(epsilon, 1e-5, spent)
    assert epsilon * (1 - 1e-8) <= spent(noise).epsilon(1e-5) <= epsilon


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_a_budget_refuses_before_it_is_exceeded(share: float) -> None:
    step, other = GaussianRelease(1.1, share), TreeRelease(20.0, 12)
    budget = Budget(2.0, 1e-5).spend(other)
    most = budget.most(step)
    assert most >= 1
    full = budget.spend(step, most)
    assert full.spent.epsilon(1e-5) <= 2.0 < full.spent.after(step).epsilon(1e-5)
    with pytest.raises(UsageError, match=r"of 2 at delta=1e-05; stop before .* \(0 would"):
        full.spend(step)
    assert full.most(step) == 0
    assert full.spend(step, 0) == full
    with pytest.raises(UsageError, match="epsilon would be inf"):
        Budget(2.0, 1e-5).spend(GaussianRelease(0.0))
    with pytest.raises(UsageError, match="is spent"):
        Budget(1.0, 1e-5, full.spent)
    assert most_within(lambda times: Ledger(), 1.0, 1e-5) >= 10**12
    # Noise that was made for a budget is within it.
    noise = noise_for(2.0, 1e-5, lambda s: Ledger().after(GaussianRelease(s, share), 70))
    assert Budget(2.0, 1e-5).most(GaussianRelease(noise, share)) == 70


def test_notions_of_neighbours_do_not_add_up() -> None:
    alone = Accountant(Rqm(), clients=10)
    assert Ledger().after(alone, 4).curve([2.0])[0] == pytest.approx(4 * alone.renyi(2.0))
    with pytest.raises(UsageError, match="Accountant holds for a record that is replaced, what"):
        Ledger().after(GaussianRelease(1.0)).after(alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianRelease(1.0, 0.1, "parts"), "draws='parts'; only records that are drawn"),
        (lambda: GaussianRelease(1.0, 0.1, "passes"), "draws='passes'; only records"),
        (lambda: GaussianRelease(1.0, 0.1, "batches"), "draws='batches'; only records"),
        (lambda: GaussianRelease(1.0, 1.0, "batches"), "may come several times"),
        (lambda: GaussianRelease(1.0, 0.1, "often"), "draws='often'; need one of poisson"),
        (lambda: GaussianRelease(-1.0), "s=-1.0; need noise above 0"),
        (lambda: GaussianRelease(1.0, 1.5), "p=1.5"),
        (lambda: sampled_gaussian_renyi(1.0, 0.1, 10, 1), "order=1; need a finite order above 1"),
        (lambda: sampled_gaussian_renyi(1.0, 0.1, 0, 2), "rounds=0"),
        (lambda: Ledger().after(GaussianRelease(1.0), -1), "times=-1"),
        (lambda: Ledger().after(GaussianRelease(1.0), math.inf), "times=inf"),
        (lambda: Budget(math.inf, 1e-5), "epsilon=inf; need a finite number"),
        (lambda: Budget(1.0, 0.0), "delta=0.0"),
        (lambda: Ledger().epsilon(0.0), "delta=0.0"),
        (lambda: Ledger().after(GaussianRelease(1.0)).epsilon(2.0), "delta=2.0"),
        (lambda: TreeRelease(1.0, 0), "leaves=0"),
        (lambda: TreeRelease(math.inf, 3), "noise=inf"),
        (
            lambda: noise_for(1e9, 1e-5, lambda s: Ledger().after(GaussianRelease(s))),
            "epsilon=1000000000.0; from .* are in reach",
        ),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
