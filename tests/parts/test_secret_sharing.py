"""Sharing, norm proofs, joint noise and the secure noisy sum."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import UsageError
from shoal.parts.privacy import prime_field as field
from shoal.parts.privacy.joint_noise import JointNoise, joint_signs
from shoal.parts.privacy.norm_proof import Dealing, NormProof
from shoal.parts.privacy.prime_field import PRIME
from shoal.parts.privacy.secret_sharing import Shamir, subtract
from shoal.parts.privacy.secure_noisy_sum import SecureNoisySum
from shoal.tensor import keyed

elements = st.one_of(
    st.integers(0, PRIME - 1), st.sampled_from((0, 1, 2, PRIME - 1, PRIME - 2, 1 << 32, 1 << 60))
)


def key(*words: int) -> torch.Tensor:
    return keyed.key_of(7, "test", *words)


def array(*numbers: int) -> field.Elements:
    return np.array(numbers, np.uint64)


@given(a=elements, b=elements)
def test_arithmetic_is_that_of_whole_numbers(a: int, b: int) -> None:
    assert int(field.multiply(array(a), array(b))[0]) == a * b % PRIME
    assert int(field.add(array(a), array(b))[0]) == (a + b) % PRIME
    assert int(subtract(array(a), array(b))[0]) == (a - b) % PRIME
    found = field.matmul(array(a, b).reshape(1, 2), array(b, a).reshape(2, 1))
    assert int(found[0, 0]) == 2 * a * b % PRIME
    assert int(field.weighted_sum(array(a, b, 1)[None], array(a, a, b))[0]) == (
        (a * a + a * b + b) % PRIME
    )
    if a:
        assert field.inverse(a) * a % PRIME == 1
        square = a * a % PRIME
        root, inverse = field.roots(array(square, 4, square))
        assert {int(root[0]), int(root[2])} <= {a, PRIME - a}
        assert [int(x) for x in field.multiply(root, inverse)] == [1, 1, 1]


@given(
    rows=st.integers(1, 4), inner=st.integers(1, 40), columns=st.integers(1, 5), data=st.data()
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_arrays_are_added_up_as_whole_numbers_are(
    rows: int, inner: int, columns: int, data: st.DataObject
) -> None:
    """Long sums of the largest elements, which a sum that is reduced too late would not survive."""
    many = st.lists(elements, min_size=inner * rows, max_size=inner * rows)
    a = np.array(data.draw(many), np.uint64).reshape(rows, inner)
    b = np.full((inner, columns), PRIME - 1, np.uint64)
    b[:, 0] = np.array(data.draw(many), np.uint64)[:inner]
    exact = [
        [sum(int(a[i, k]) * int(b[k, j]) for k in range(inner)) % PRIME for j in range(columns)]
        for i in range(rows)
    ]
    assert field.matmul(a, b).tolist() == exact
    assert field.weighted_sum(a, b[:, 0]).tolist() == [row[0] for row in exact]
    assert field.multiply(a, b[:, 0]).tolist() == [
        [int(x) * int(y) % PRIME for x, y in zip(row, b[:, 0], strict=True)] for row in a
    ]
    assert field.negative(a).tolist() == [[-int(x) % PRIME for x in row] for row in a]
    assert subtract(a, b[:, 0]).tolist() == [
        [(int(x) - int(y)) % PRIME for x, y in zip(row, b[:, 0], strict=True)] for row in a
    ]


@given(st.lists(st.integers(1 - (1 << 60), (1 << 60) - 1), min_size=1, max_size=9))
def test_signed_numbers_are_elements_and_back(numbers: list[int]) -> None:
    encoded = field.encode(np.array(numbers))
    assert encoded.tolist() == [number % PRIME for number in numbers]
    assert field.decode(encoded).tolist() == numbers


@given(
    points=st.sets(st.integers(-9, 40), min_size=1, max_size=9), wanted=st.integers(-99, 99),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_lagrange_is_the_polynomial_through_the_points(
    points: set[int], wanted: int, data: st.DataObject
) -> None:
    size = len(points)
    polynomial = data.draw(st.lists(elements, min_size=size, max_size=size))

    def at(x: int) -> int:
        return sum(c * pow(x, i, PRIME) for i, c in enumerate(polynomial)) % PRIME

    known = sorted(points)
    values = np.array([[at(x)] for x in known], np.uint64)
    assert int(field.matmul(field.lagrange(known, [wanted]), values)[0, 0]) == at(wanted)


def test_uniform_elements_are_uniform() -> None:
    drawn = field.uniform(key(1), 64_000)
    assert int(drawn.max()) < PRIME
    counts = np.bincount((drawn >> np.uint64(55)).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3
    low = np.bincount((drawn & np.uint64(63)).astype(int), minlength=64)
    assert stats.chisquare(low).pvalue > 1e-3


@given(
    threshold=st.integers(1, 4), pack=st.integers(1, 3), more=st.integers(1, 3),
    length=st.integers(1, 7), word=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_degree_and_one_shares_reconstruct(
    threshold: int, pack: int, more: int, length: int, word: int
) -> None:
    scheme = Shamir(threshold + pack - 1 + more, threshold, pack)
    secrets = field.uniform(key(word), 2 * length).reshape(2, length)
    shares = scheme.share(secrets, key(word, 1))
    assert shares.shape == (scheme.holders, 2, -(-length // pack))
    for chosen in combinations(range(scheme.holders), scheme.degree + 1):
        order = list(chosen)[::-1]
        found = scheme.reconstruct(shares[order], order, length=length)
        assert (found == secrets).all()
    few = list(range(scheme.degree))
    with pytest.raises(UsageError, match=f"need {scheme.degree + 1}"):
        scheme.reconstruct(shares[few], few)


@pytest.mark.parametrize("pack", [1, 2])
def test_threshold_shares_are_uniform_whatever_the_secret(pack: int) -> None:
    """The joint law of two holders' shares of secrets that are always the same."""
    scheme, count = Shamir(5, 2, pack), 40_000
    for secret in (0, 5, PRIME - 1):
        secrets = np.full((count, pack), secret, np.uint64)
        shares = scheme.share(secrets if pack > 1 else secrets[:, 0], key(secret % 97))
        shares = shares.reshape(5, count)
        for one, other in ((0, 1), (1, 4), (3, 4)):
            high = [(shares[h] >> np.uint64(58)).astype(int) for h in (one, other)]
            counts = np.bincount(high[0] * 8 + high[1], minlength=64)
            assert stats.chisquare(counts).pvalue > 1e-4
    # The test has power: what threshold + 1 holders have between them is anything but uniform.
    if pack == 1:
        three = scheme.reconstruct(shares[:3], [0, 1, 2])
        counts = np.bincount((three >> np.uint64(58)).astype(int), minlength=8)
        assert stats.chisquare(counts).pvalue < 1e-9


def test_sums_products_and_constants_on_shares() -> None:
    scheme = Shamir(7, 3)
    a, b = field.uniform(key(1), 50), field.uniform(key(2), 50)
    x, y = scheme.share(a, key(3)), scheme.share(b, key(4))
    late = [6, 2, 3, 5]
    assert (scheme.reconstruct(field.add(x, y)[late], late) == field.add(a, b)).all()
    assert (
        scheme.reconstruct(field.multiply(x, array(7))[late], late) == field.multiply(a, array(7))
    ).all()
    assert (scheme.reconstruct(field.add(x, array(7))[late], late) == field.add(a, array(7))).all()
    product = field.multiply(x, y)
    assert (scheme.reconstruct(product, range(7), degree=6) == field.multiply(a, b)).all()


def test_wrong_shares_are_found() -> None:
    scheme = Shamir(6, 2)
    shares = scheme.share(field.uniform(key(1), 30), key(2))
    assert scheme.audit(shares, range(6), key(3))
    for holder in range(6):
        wrong = shares.copy()
        wrong[holder, 17] = field.add(wrong[holder, 17:18], array(1))[0]
        assert not scheme.audit(wrong, range(6), key(3))
        with pytest.raises(UsageError, match="do not lie on a polynomial of degree 2"):
            scheme.reconstruct(wrong, range(6))
    # A sharing of higher degree is none either.
    assert not scheme.audit(scheme.share(array(5), key(4), degree=3), range(6), key(3))


def dealt(proof: NormProof, *numbers: int) -> Dealing:
    return proof.deal(np.array(numbers, dtype=np.int64), key(9))


@given(st.lists(st.integers(-12, 12), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_exactly_vectors_within_the_norm_are_accepted(numbers: list[int]) -> None:
    proof = NormProof(Shamir(5, 2), dim=4, bound=10)
    dealing = dealt(proof, *numbers)
    fine = sum(number**2 for number in numbers) <= 100
    assert proof.check(dealing, range(5), key(8)) == fine
    if fine:
        opened = proof.scheme.reconstruct(proof.numbers(dealing), range(5))
        assert field.decode(opened).tolist() == numbers


def test_every_lie_about_the_norm_is_found() -> None:
    scheme = Shamir(6, 2)
    proof = NormProof(scheme, dim=3, bound=10)
    good = dealt(proof, 6, -8, 0)
    assert proof.check(good, range(6), key(1))
    assert proof.check(
        Dealing(good.bits[[0, 2, 3, 4, 5]], good.slack[[0, 2, 3, 4, 5]]), [0, 2, 3, 4, 5], key(1)
    ), "a holder may be missing"
    two = array(2)
    for name, lie in {
        # 2 in place of bits: the entry is longer than bits can say.
        "no bit": replace(good, bits=good.bits.copy()),
        "slack of no bits": replace(good, slack=good.slack.copy()),
        "false slack": replace(good, slack=dealt(proof, 1, 1, 1).slack),
        "another vector": replace(good, bits=dealt(proof, 9, 9, 9).bits),
    }.items():
        if name == "no bit":
            lie.bits[:, 1, 2] = scheme.share(two, key(5))[:, 0]
        if name == "slack of no bits":
            lie.slack[:, 0] = scheme.share(two, key(5))[:, 0]
        assert not proof.check(lie, range(6), key(1)), name
    # A bit that carries a whole element could make the square small modulo the prime.
    forged = replace(good, bits=good.bits.copy())
    forged.bits[:, 0, 0] = scheme.share(field.uniform(key(6), 1), key(7))[:, 0]
    assert not proof.check(forged, range(6), key(1))
    broken = replace(good, bits=good.bits.copy())
    broken.bits[3, 0, 0] = field.add(broken.bits[3:4, 0, 0], array(1))[0]
    assert not proof.check(broken, range(6), key(1)), "shares that are no sharing"
    above = replace(good, bits=good.bits + np.uint64(PRIME))
    assert not proof.check(above, range(6), key(1)), "numbers that are no elements"


def test_signs_are_fair_whoever_contributes_what() -> None:
    scheme, count = Shamir(5, 2), 20_000
    honest = field.uniform(key(1), count)
    for chosen in (None, [np.zeros(count, np.uint64), np.full(count, 3, np.uint64)], [honest] * 2):
        shares = joint_signs(scheme, count, key(2), 3, chosen)
        signs = field.decode(scheme.reconstruct(shares, range(5)))
        assert set(signs.tolist()) == {-1, 1}
        assert abs(signs.sum()) < 4 * math.sqrt(count)
        assert abs((signs[1:] * signs[:-1]).sum()) < 4 * math.sqrt(count)
        # Two holders' shares of signs are uniform too.
        high = [(shares[h] >> np.uint64(58)).astype(int) for h in (1, 3)]
        counts = np.bincount(high[0] * 8 + high[1], minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_joint_noise_has_its_variance_and_is_nearly_gaussian() -> None:
    scheme, law = Shamir(3, 1), JointNoise(bits=6)
    count = 50_000
    shares = law.shares(scheme, count, key(3), contributors=2)
    noise = field.decode(scheme.reconstruct(shares, range(3)))
    assert noise.var() == pytest.approx(law.deviation**2, rel=0.02)
    assert abs(noise.mean()) < 4 * law.deviation / math.sqrt(count)
    # Irwin and Hall's excess kurtosis is -6 / (5 draws).
    assert stats.kurtosis(noise) == pytest.approx(-0.1, abs=0.08)
    assert {int(x) % 2 for x in noise[:100]} == {0, 1}, "every whole number occurs"
    steps = stats.kstest((noise + 0.0) / law.deviation, "norm").statistic
    assert steps < law.distance() + 0.5 / law.deviation + 2.0 / math.sqrt(count)
    assert JointNoise(draws=48).distance() < JointNoise().distance() / 3


@given(dropped=st.sets(st.integers(0, 6), max_size=2), word=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_sum_is_that_of_accepted_vectors_and_noise(dropped: set[int], word: int) -> None:
    adder = SecureNoisySum(threshold=2, field=JointNoise(bits=8))
    vectors = keyed.normal(keyed.grid(keyed.grid(key(word), 7), 6), dtype=torch.float64).numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[3] *= 1.5
    deviation = 0.2
    unit = adder.unit(deviation)
    opened = adder(vectors, 1.0, deviation, key(word), sorted(dropped))
    assert opened.rejected == (3,)
    shares = adder.noise(7, 6, key(word))
    noise = field.decode(Shamir(7, 2).reconstruct(shares, range(7))) * unit
    exact = vectors[[0, 1, 2, 4, 5, 6]].sum(0) + noise
    assert np.abs(opened.total - exact).max() <= 6 * unit / 2 + 1e-12
    again = adder(vectors, 1.0, deviation, key(word))
    assert (again.total == opened.total).all(), "who drops out does not matter"


def test_what_is_no_vector_is_rejected() -> None:
    vectors = np.zeros((4, 2))
    vectors[0, 0], vectors[1, 1] = math.nan, math.inf
    adder = SecureNoisySum(threshold=1, field=JointNoise(bits=8))
    assert adder(vectors, 1.0, 0.1, key(1)).rejected == (0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shamir(2, 2), "holders=2, threshold=2"),
        (lambda: Shamir(3, 1).share(array(PRIME), key(1)), "is no element"),
        (lambda: Shamir(3, 1).share(array(1), key(1), degree=3), "degree=3; need 1 to 2"),
        (lambda: NormProof(Shamir(4, 2), 3, 5), "holders=4"),
        (lambda: NormProof(Shamir(5, 2), 3, 1 << 31), r"squared norms below 2\^60"),
        (lambda: joint_signs(Shamir(5, 2), 1, key(1), 2), "contributors=2"),
        (lambda: joint_signs(Shamir(4, 2), 1, key(1), 3), "holders=4"),
        (lambda: JointNoise(draws=13), "draws=13"),
        (lambda: SecureNoisySum(0), "threshold=0"),
        (lambda: SecureNoisySum(1).unit(0.0), "deviation=0.0"),
        (lambda: SecureNoisySum(1)(np.zeros((4, 2)), 0.0, 1.0, key(1)), "clip=0.0"),
        (
            lambda: SecureNoisySum(1)(np.zeros((4, 2)), 1.0, 1.0, key(1), dropped=(0, 1)),
            "2 of 4 clients are left",
        ),
        (lambda: field.encode(np.array([1 << 60])), r"2\^60"),
        (lambda: field.encode(np.array([-(1 << 63)])), r"2\^60"),
        (lambda: field.lagrange([1, 2, 1], [0]), "some twice"),
        (lambda: field.lagrange([0, PRIME], [1]), "some twice"),
        (lambda: Shamir(5, 2).reconstruct(array(1, 2, 2), [0, 3, 3]), "need each once, 0 to 4"),
        (lambda: Shamir(5, 2).reconstruct(array(1, 2, 3), [0, -1, 3]), "need each once, 0 to 4"),
        (lambda: Shamir(5, 2).reconstruct(array(1, 2, 3), [0, 5, 3]), "need each once, 0 to 4"),
        (lambda: field.roots(array(0)), "0 has no inverse"),
    ],
)
def test_errors_name_the_argument(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
