"""The discrete Gaussian: draws against its law and against fractions, sums against convolution."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.privacy import discrete_gaussian as sampler
from shoal.parts.privacy.accountant import log_power, renyi_divergence
from shoal.parts.privacy.discrete_gaussian import (
    FINEST,
    DiscreteGaussianRelease,
    discrete_gaussian,
    variance_of,
)
from shoal.parts.privacy.ledger import Ledger
from shoal.parts.privacy.modular_sum import ModularSum
from shoal.parts.transform.clip_and_noise import ClipAndNoise
from shoal.parts.transform.discrete_gaussian import DiscreteGaussian
from shoal.tensor.keyed import fold, grid, key_of, normal

KEY = key_of(3, "discrete")
REACH = 70
"""Beyond it sums have chances that change no divergence."""


def law(deviation: float, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weight = np.exp(-(x**2) / (2 * deviation**2))
    return weight / weight.sum()


@pytest.mark.parametrize("deviation", [0.3, 0.8, 1.0, 2.5, 17.0])
def test_draws_follow_the_law(deviation: float) -> None:
    count = 60_000
    found = discrete_gaussian(grid(fold(KEY, int(deviation * 10)), count), deviation).numpy()
    reach = math.ceil(10 * deviation) + 2
    expected = law(deviation, reach) * count
    # Cells of at least 20 expected draws each, tails together.
    inner = np.flatnonzero(expected >= 20)
    low, high = inner[0], inner[-1]
    where = np.clip(found + reach, low - 1, high + 1) - (low - 1)
    seen = np.bincount(where, minlength=high - low + 3)
    cells = np.concatenate(
        ([expected[:low].sum()], expected[low : high + 1], [expected[high + 1 :].sum()])
    )
    keep = cells > 0.5
    p = stats.chisquare(seen[keep], cells[keep] * seen[keep].sum() / cells[keep].sum()).pvalue
    assert p > 1e-3
    assert abs(found).max() <= reach


def test_large_deviations_have_their_moments() -> None:
    draws = discrete_gaussian(grid(KEY, 40_000), 2800.0).double()
    assert float(draws.std()) == pytest.approx(2800.0, rel=0.02)
    assert abs(float(draws.mean())) < 4 * 2800 / math.sqrt(40_000)
    assert float(stats.kurtosis(draws.numpy())) == pytest.approx(0.0, abs=0.1)


def by_whole_numbers(key: int, deviation: float) -> int:
    """The same algorithm with Python's whole numbers, which have no end, draw by draw."""
    top, bottom = variance_of(deviation)
    scale, drawn = math.isqrt(top // bottom) + 1, 0

    def below(count: int) -> int:
        nonlocal drawn
        while True:
            bits = keyed.fold(key, drawn)
            drawn += 1
            if bits >= (1 << 64) % count:
                return bits % count

    def heads(a: int, b: int) -> bool:
        while a > b:
            if not heads(1, 1):
                return False
            a -= b
        k = 1
        while below(b) < a and below(k) == 0:
            k += 1
        return k % 2 == 1

    while True:
        near = below(scale)
        if not heads(near, scale):
            continue
        rounds = 0
        while heads(1, 1):
            rounds += 1
        minus = below(2) == 0
        if minus and near == 0 and rounds == 0:
            continue
        size = near + scale * rounds
        away = Fraction(size) - Fraction(top, bottom * scale)
        gamma = away**2 * bottom / (2 * top)
        b = 2 * top * bottom * scale**2
        a = gamma * b
        assert a.denominator == 1
        if heads(a.numerator, b):
            return -size if minus else size


@given(seed=st.integers(0, 2**40), deviation=st.sampled_from((0.4, 1.0, 3.3, 40.0, 2000.0)))
@settings(max_examples=60, deadline=None)
def test_draws_are_those_of_exact_arithmetic(seed: int, deviation: float) -> None:
    """No product or square ever leaves 64 bits."""
    key = key_of(seed)
    found = int(discrete_gaussian(key, deviation))
    assert found == by_whole_numbers(int(key) & keyed.MASK, deviation)


def test_chances_of_coins_are_exponentials() -> None:
    stream = np.zeros(2, np.uint64)
    for a, b in ((0, 5), (1, 3), (1, 1), (7, 3), (5, 1)):
        heads = 0
        for trial in range(20_000):
            stream[:] = (keyed.fold(trial, a, b), 0)
            heads += sampler._heads_exp(stream, np.uint64(a), np.uint64(b))
        chance = math.exp(-a / b)
        assert stats.binomtest(heads, 20_000, chance).pvalue > 1e-3


@given(deviation=st.floats(1e-3, math.isqrt(FINEST)))
@settings(max_examples=80, deadline=None)
def test_the_variance_is_rounded_up_a_little(deviation: float) -> None:
    top, bottom = variance_of(deviation)
    assert 1 <= top <= FINEST
    assert Fraction(top, bottom) >= Fraction(deviation * deviation)
    if deviation >= 0.5:
        assert top / bottom <= deviation**2 * (1 + 1e-6)


def test_draws_have_the_keys_shape_and_depend_on_the_key_alone() -> None:
    keys = grid(grid(KEY, 4), 5)
    all_at_once = discrete_gaussian(keys, 3.0)
    assert all_at_once.shape == (4, 5)
    assert int(discrete_gaussian(keys[2, 3], 3.0)) == int(all_at_once[2, 3])
    assert all_at_once.t().equal(discrete_gaussian(keys.t(), 3.0))


def sum_law(deviation: float, clients: int) -> torch.Tensor:
    """Logarithms of the law of a sum of draws, by convolution, for -REACH .. REACH."""
    x = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    one = -(x**2) / (2 * deviation**2)
    total = log_power(one - one.logsumexp(0), clients)
    middle = len(total) // 2
    return total[middle - REACH : middle + REACH + 1]


@pytest.mark.parametrize("clients", [1, 2, 5, 10])
@pytest.mark.parametrize("deviation", [0.5, 0.7, 1.0, 2.0])
def test_the_bound_on_sums_is_above_the_exact_divergence(clients: int, deviation: float) -> None:
    total = sum_law(deviation, clients)
    for shift in (1, 2, 3):
        for alpha in (1.5, 2.0, 3.0):
            exact = renyi_divergence(total[:-shift], total[shift:], alpha)
            bound = DiscreteGaussianRelease(deviation, shift, clients).renyi(alpha)
            assert exact <= bound * (1 + 1e-9)
            if deviation >= 1:
                assert bound <= exact * 1.03


def test_a_release_costs_what_the_continuous_one_does() -> None:
    for deviation in (5.0, 300.0):
        discrete = DiscreteGaussianRelease(deviation, 2 * deviation, clients=4, dim=1000)
        assert discrete.renyi(3.0) == pytest.approx(3.0 * 2**2 / (2 * 4), rel=1e-6)
    assert DiscreteGaussianRelease(0.0, 1.0).renyi(2.0) == math.inf
    more = [DiscreteGaussianRelease(2.0, 3.0, n, 50).renyi(2.0) for n in (1, 2, 10, 100)]
    assert more == sorted(more, reverse=True)


def test_the_transform_is_the_gaussian_mechanism_in_whole_units() -> None:
    x = torch.linspace(-1, 1, 200) * 5
    codec = DiscreteGaussian(clip=2.0, noise_multiplier=0.5, unit=0.01)
    keys = grid(KEY, 300)
    decoded = codec.decode(codec.encode(x.expand(300, -1), None, keys)[0]).double()
    clipped = x.double() * 2.0 / x.double().norm()
    assert (decoded.mean(0) - clipped).abs().max() < 5.5 / math.sqrt(300)
    assert float((decoded - clipped).std()) == pytest.approx(1.0, rel=0.02)
    units = decoded / 0.01
    assert (units - units.round()).abs().max() < 1e-4
    plain = ClipAndNoise(clip=2.0, noise_multiplier=0.5)
    noise = plain.decode(plain.encode(x.expand(300, -1), None, keys)[0]).double() - clipped
    assert float(noise.std()) == pytest.approx(float((decoded - clipped).std()), rel=0.02)


@given(
    clip=st.floats(0.1, 5), unit=st.floats(1e-3, 0.1), dim=st.integers(1, 60),
    scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_vector_moves_a_sum_by_more_than_is_counted(
    clip: float, unit: float, dim: int, scale: float, seed: int
) -> None:
    codec = DiscreteGaussian(clip=clip, noise_multiplier=0.0, unit=unit)
    x = normal(grid(key_of(seed), dim), dtype=torch.float64) * scale
    payload, _ = codec.encode(x, None, KEY)
    numbers = (payload.codes - codec.most).double()
    assert float(numbers.norm()) <= codec.release(dim).sensitivity * (1 + 1e-12)


def test_sums_of_masked_numbers_are_the_sums_of_numbers() -> None:
    """The width holds the sum of all clients, so that it can be taken modulo a power of two."""
    clients, dim = 12, 30
    codec = DiscreteGaussian(clip=1.0, noise_multiplier=0.3, unit=0.01, clients=clients)
    x = torch.linspace(-3, 3, clients * dim).view(clients, dim)
    payload, _ = codec.encode(x, None, grid(KEY, clients))
    assert int(payload.codes.min()) >= 0
    ring = ModularSum(levels=2 * codec.most + 1, clients=clients)
    assert ring.bits == codec.width
    plain = payload.codes.clone()
    total = ring.total(ring.masked(payload.codes, KEY))
    # Masking is not to change what it is given.
    assert payload.codes.equal(plain)
    assert total.equal(plain.sum(0))
    mean = codec.decode_sum(total, clients)
    torch.testing.assert_close(mean, codec.decode(payload).double().mean(0), rtol=1e-5, atol=1e-6)
    spent = Ledger().after(codec.release(dim, clients), 10).epsilon(1e-5)
    alone = Ledger().after(codec.release(dim), 10).epsilon(1e-5)
    assert spent < alone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: discrete_gaussian(KEY, 0.0), "deviation=0.0; need a number above 0"),
        (lambda: discrete_gaussian(KEY, 1e5), "take a coarser unit"),
        (lambda: DiscreteGaussianRelease(1.0, -1.0), "sensitivity=-1.0"),
        (lambda: DiscreteGaussianRelease(1.0, 1.0, 0), "clients=0"),
        (lambda: DiscreteGaussianRelease(0.3, 1.0, 2), "sums are bounded from 0.5"),
        (lambda: DiscreteGaussian(clip=0.0), "clip=0.0; need a finite number > 0"),
        (lambda: DiscreteGaussian(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
        (lambda: DiscreteGaussian(unit=1e-6), "raise unit to"),
        (lambda: DiscreteGaussian(clients=0), "clients=0"),
        (lambda: DiscreteGaussian(unit=1e-16, noise_multiplier=0.0), "bits for an entry"),
        (lambda: DiscreteGaussian().decode_sum(torch.zeros(2), 0), "clients=0"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
