"""Berrut's code: an interpolant without poles, decoding with the missing and the wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BarycentricInterpolator
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.berrut_code import BerrutCode, berrut_weights
from shoal.parts.coding.code_dimension import Trials, choose_dimension, relative_error
from shoal.parts.coding.dct_code import first_kind
from shoal.parts.coding.lagrange_code import LagrangeCode
from shoal.parts.coding.replication_code import ReplicationCode
from shoal.tensor.threads import one_thread

SIZES = st.tuples(st.integers(1, 9), st.integers(0, 30)).map(lambda s: (s[0], s[0] + s[1]))
FIRST, PLAIN = BerrutCode(5, 31, code_dim=15), BerrutCode(5, 31, code_dim=None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    with one_thread():
        yield


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# The interpolant.


@given(SIZES, st.sampled_from(["chebyshev1", "chebyshev2"]), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_weights_sum_to_one_and_constants_are_kept(
    sizes: tuple[int, int], nodes: Any, seed: int
) -> None:
    code = BerrutCode(*sizes, nodes=nodes, code_dim=None)
    everybody = torch.ones(code.K, dtype=torch.bool)
    weights = berrut_weights(code.workers_at(), code.inputs_at(), everybody)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    constant = normal(seed, 1, 4).expand(code.K, 4)
    assert torch.allclose(code.encode(constant), constant[:1].expand(code.N, 4), atol=1e-12)
    # The curve runs through the inputs.
    at_inputs = berrut_weights(code.inputs_at(), code.inputs_at(), everybody)
    assert torch.equal(at_inputs, torch.eye(code.K, dtype=torch.float64))


@given(st.integers(2, 40), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_survivors_leave_the_interpolant_without_poles(count: int, seed: int) -> None:
    """Signs alternate over who is left: no weight explodes, at whatever points."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(count, generator=generator) < 0.6
    present[torch.randint(count, (1,), generator=generator)] = True
    at = torch.linspace(-1, 1, 400, dtype=torch.float64)
    weights = berrut_weights(at, first_kind(count), present)
    assert weights.isfinite().all()
    assert (weights[:, ~present] == 0).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-10
    # With the old signs, some gap of an odd number of missing nodes makes the denominator change
    # sign; with these it never does.
    sign = 1.0 - 2.0 * ((present.cumsum(0) - 1) % 2).double()
    middle = at[(at[:, None] - first_kind(count)).abs().min(-1).values > 1e-9]
    terms = torch.where(present, sign, 0.0) / (middle[:, None] - first_kind(count))
    nodes = first_kind(count)[present]
    between = (middle < nodes.max()) & (middle > nodes.min())
    side = (middle[:, None] > nodes).sum(-1) % 2
    assert len(set((terms.sum(-1).sign() * (1 - 2 * side))[between].tolist())) <= 1


def test_it_is_barycentric_interpolation_with_alternating_weights() -> None:
    nodes, at = first_kind(9), torch.linspace(-0.99, 0.98, 50, dtype=torch.float64)
    weights = berrut_weights(at, nodes, torch.ones(9, dtype=torch.bool))
    values = normal(0, 9)
    theirs = BarycentricInterpolator(nodes.numpy(), values.numpy())
    theirs.wi = (-1.0) ** np.arange(9)  # Berrut's weights in scipy's formula
    assert np.allclose((weights @ values).numpy(), theirs(at.numpy()), atol=1e-10)


def test_shares_that_meet_an_input_are_that_input() -> None:
    """N = 3 K: every third node of the first kind, from the second on, is an input's."""
    code, X = BerrutCode(5, 15, code_dim=None), normal(0, 5, 7)
    U = code.encode(X)
    assert torch.equal(U[1::3], X)
    result = code.decode(range(15), U)
    assert torch.equal(result.Y, X)
    # Without the share itself the result is interpolated.
    kept = [i for i in range(15) if i != 4]
    again = code.decode(kept, U[kept]).Y
    assert torch.equal(again[[0, 2, 3, 4]], X[[0, 2, 3, 4]])
    assert again.isfinite().all()
    assert not torch.equal(again[1], X[1])


def test_nodes_of_the_second_kind_are_those_of_the_first_paper() -> None:
    places = BerrutCode(5, 31, nodes="chebyshev2").workers_at()
    assert places.tolist() == pytest.approx([math.cos(i * math.pi / 31) for i in range(31)])
    gaps = (places[:, None] - first_kind(5)).abs()
    assert gaps.min() > 1e-3, "no share is an input, which would make the error 0"


# Decoding.


@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from(["tanh", "sin", "relu"]))
@settings(max_examples=40, deadline=None)
def test_without_errors_it_is_plain_decoding(seed: int, missing: int, name: str) -> None:
    V = getattr(torch, name)(FIRST.encode(normal(seed, 5, 50)))
    order = torch.rand(31, generator=torch.Generator().manual_seed(seed)).argsort()
    kept = order[missing:].sort().values
    result = FIRST.decode(kept, V[kept])
    if not result.errors.any():
        assert torch.equal(result.Y, PLAIN.decode(kept, V[kept]).Y)
    assert result.errors.sum() <= (1 if name == "relu" else 0)
    assert result.trusted


@pytest.mark.parametrize(("wrong", "missing"), [(1, 0), (3, 0), (2, 2), (3, 4)])
def test_liars_are_left_out(wrong: int, missing: int) -> None:
    draws = Trials.drawn(wrong, 60, 5, 31, 50)
    liars, present = draws.liars(wrong), draws.present(wrong, missing)
    honest = torch.sigmoid(FIRST.encode(draws.inputs))
    result = FIRST.decode_all(honest + 10 * draws.lies * liars.unsqueeze(-1), present)
    exact = (result.errors == liars).all(-1)
    assert exact.double().mean() >= 0.95
    kept = PLAIN.decode_all(honest, present & ~liars).Y
    assert torch.allclose(result.Y[exact], kept[exact], atol=1e-12)
    assert relative_error(result.Y, torch.sigmoid(draws.inputs)).median() < 0.03


def test_answers_that_are_no_numbers_are_missing() -> None:
    V = torch.sigmoid(FIRST.encode(normal(0, 5, 50)))
    broken = V.clone()
    broken[3, 7], broken[12] = math.nan, math.inf
    kept = [i for i in range(31) if i not in (3, 12)]
    expected = FIRST.decode(kept, V[kept])
    assert torch.equal(FIRST.decode(range(31), broken).Y, expected.Y)
    complex_ones = V.to(torch.complex128)
    complex_ones[3, 7] += 1j
    complex_ones[12] += 2j
    assert torch.equal(FIRST.decode(range(31), complex_ones).Y, expected.Y)


def test_leading_axes_are_independent() -> None:
    X = normal(0, 2, 3, 5, 20)
    V = torch.tanh(FIRST.encode(X))
    V[0, 1, 4] += 3.0 * normal(1, 20)
    V[1, 2, 9] = math.nan
    both = FIRST.decode_all(V)
    assert both.Y.shape == (2, 3, 5, 20)
    for i in range(2):
        for j in range(3):
            one = FIRST.decode_all(V[i, j])
            assert torch.allclose(one.Y, both.Y[i, j], atol=1e-13)
            assert torch.equal(one.errors, both.errors[i, j])
    assert both.errors.nonzero().tolist() == [[0, 1, 4]]


def test_correcting_in_place_of_leaving_out() -> None:
    """On a codeword the located values are restored; the interpolation is that of all nodes."""
    places = FIRST.workers_at()[:, None] ** torch.arange(8, dtype=torch.float64)
    V = places @ normal(0, 8, 10)
    wrong = torch.zeros(31, dtype=torch.bool)
    wrong[[2, 17, 30]] = True
    present = torch.ones(31, dtype=torch.bool)
    present[5] = False
    lied = V + normal(1, 31, 10) * wrong[:, None]
    lied[5] = math.nan
    assert torch.allclose(FIRST.corrected(lied, wrong, present), V, atol=1e-10)
    with pytest.raises(UsageError, match="no DCT code"):
        PLAIN.corrected(V, wrong)


def test_too_many_liars_are_said_and_groups_vote() -> None:
    X = normal(0, 5, 50)
    V = torch.sigmoid(FIRST.encode(X))
    code = BerrutCode(5, 31, code_dim=25)
    # All in two of the five groups.
    liars = [0, 1, 5, 6, 10, 11, 15, 16]
    V[liars] += 50 * normal(1, 8, 50)
    result = code.decode(range(31), V)
    assert not result.trusted
    plain = relative_error(PLAIN.decode(range(31), V).Y, torch.sigmoid(X))
    assert relative_error(result.Y, torch.sigmoid(X)) < 0.5 < plain


def test_the_error_falls_with_more_workers() -> None:
    """At least like 1 / N for a fixed number of missing ones, for a smooth function.

    Means over ten sizes: the error also depends on how near shares happen to be to inputs.
    """
    X = normal(3, 20, 5, 50)
    truth = torch.sigmoid(X)
    for missing in (0, 2):
        means = []
        for start in (15, 60, 240):
            errors = []
            for workers in range(start, start + 10):
                code = BerrutCode(5, workers, code_dim=None)
                present = torch.ones(workers, dtype=torch.bool)
                present[workers // 3 : workers // 3 + missing] = False
                Y = code.decode_all(torch.sigmoid(code.encode(X)), present).Y
                errors.append(workers * float(relative_error(Y, truth).median()))
            means.append(sum(errors) / len(errors))
        assert means[1] <= 1.05 * means[0], means
        assert means[2] <= 1.05 * means[1], means


def test_first_kind_nodes_cost_little() -> None:
    X = normal(4, 40, 5, 50)
    for f in (torch.exp, torch.sigmoid, torch.sin, torch.relu):
        first, second = (
            float(relative_error(c.decode_all(f(c.encode(X))).Y, f(X)).median())
            for c in (PLAIN, BerrutCode(5, 31, nodes="chebyshev2"))
        )
        assert first <= 1.5 * second


@pytest.mark.parametrize("size", [1.0, 1e160, 1e308])
def test_a_liar_among_zeros_is_left_out_and_breaks_nothing(size: float) -> None:
    """Where most answers are zero, as a ReLU's may be, the others say how large answers are."""
    for code in (BerrutCode(5, 31), BerrutCode(3, 9), LagrangeCode(3, 11, 2)):
        V = torch.zeros(code.N, 4, dtype=torch.float64)
        V[code.N // 2] = size
        result = code.decode(range(code.N), V)
        assert result.errors.nonzero().flatten().tolist() == [code.N // 2]
        assert torch.equal(result.Y, torch.zeros_like(result.Y))
        assert result.trusted


def test_liars_whose_squares_overflow_are_not_trusted_for_that() -> None:
    V = torch.tanh(FIRST.encode(normal(0, 5, 4)))
    V[:16] = 1e160 * normal(1, 16, 4).sign()
    assert not FIRST.decode(range(31), V).trusted


# Errors.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"K": 5, "N": 4}, "K=5, N=4"),
        ({"K": 0, "N": 4}, "K=0, N=4"),
        ({"K": 3, "N": 9, "nodes": "legendre"}, "nodes='legendre'"),
        ({"K": 3, "N": 9, "code_dim": 9}, "code_dim=9; need 3 to 8"),
        ({"K": 3, "N": 9, "code_dim": 2}, "code_dim=2"),
        ({"K": 3, "N": 9, "code_dim": 5, "nodes": "chebyshev2"}, "second kind"),
    ],
)
def test_codes_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BerrutCode(**settings)


def test_what_cannot_be_encoded_or_decoded() -> None:
    code = BerrutCode(3, 9)
    with pytest.raises(UsageError, match=r"inputs \(4, 2\)"):
        code.encode(torch.ones(4, 2))
    with pytest.raises(UsageError, match="need real"):
        code.encode(torch.ones(3, 2, dtype=torch.complex64))
    with pytest.raises(UsageError, match="1 of 9 answers are left"):
        code.decode([2], torch.ones(1, 4))
    with pytest.raises(UsageError, match="1 of 9 answers are left"):
        code.decode([2, 3], torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(UsageError, match="need different ones"):
        code.decode([2, 2], torch.ones(2, 4))
    with pytest.raises(UsageError, match="from 0 to 8"):
        code.decode([2, 9], torch.ones(2, 4))
    with pytest.raises(UsageError, match="answers"):
        code.decode([2, 3], torch.ones(3, 4))


def test_as_many_workers_as_inputs_check_nothing() -> None:
    code, X = BerrutCode(4, 4), normal(0, 4, 3)
    result = code.decode(range(4), code.encode(X).tanh())
    assert torch.allclose(result.Y, X.tanh(), atol=1e-12)
    assert result.residual.isnan()
    assert not result.trusted


# The dimension.


def test_the_dimension_is_a_matter_of_precision_against_errors() -> None:
    """ReLU's coefficients fall slowly, so that liars are taken for others by the zeros of the
    locator alone where the dimension is small; where it is large there are no checks for 4."""
    found = choose_dimension(
        torch.relu, 5, 31, 4, trials=12, dimensions=(7, 11, 15, 17, 19, 23, 27, 29)
    )
    assert found.best <= 23
    assert found.located[found.best] >= 0.75
    assert found.located[15] > found.located[27]
    assert found.located[29] == 0.0
    assert found.errors[29] > 3 * found.errors[found.best]
    with pytest.raises(UsageError, match="need one dimension"):
        choose_dimension(torch.relu, 5, 31, 4, dimensions=())
    with pytest.raises(UsageError, match="neither lie nor are missing"):
        choose_dimension(torch.relu, 5, 31, 20, S=10)


def test_own_inputs_and_functions_of_another_size() -> None:
    found = choose_dimension(
        lambda x: x[..., :2].tanh(), 3, 12, 1, inputs=normal(0, 6, 3, 5), dimensions=(5, 7)
    )
    assert set(found.errors) == {5, 7}


def test_trials_are_drawn_by_key() -> None:
    a, b, other = (Trials.drawn(seed, 30, 3, 12, 40) for seed in (1, 1, 2))
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.order, b.order)
    assert not torch.equal(a.inputs, other.inputs)
    assert abs(float(a.inputs.mean())) < 0.1
    assert float(a.inputs.std()) == pytest.approx(1.0, abs=0.05)
    assert (a.liars(3).sum(-1) == 3).all()
    assert ((~a.present(3, 2)).sum(-1) == 2).all()
    assert not (a.liars(3) & ~a.present(3, 2)).any()


# What it is compared with.


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_lagrange_is_exact_for_polynomials(seed: int, K: int, degree: int, wrong: int) -> None:
    missing = 2
    N = (K - 1) * degree + 1 + missing + 2 * wrong + (wrong > 0)
    code, X = LagrangeCode(K, N, degree), normal(seed, K, 10)
    coefficients = normal(seed + 1, degree + 1)

    def f(x: Tensor) -> Tensor:
        return sum((c * x**power for power, c in enumerate(coefficients)), torch.zeros_like(x))

    order = torch.rand(N, generator=torch.Generator().manual_seed(seed)).argsort()
    V = f(code.encode(X))
    scale = float(V.abs().max())
    V[order[:wrong]] += scale * normal(seed + 2, wrong, 10)
    present = torch.ones(N, dtype=torch.bool).index_fill(0, order[wrong : wrong + missing], False)
    result = code.decode_all(V, present)
    assert sorted(result.errors.nonzero().flatten().tolist()) == sorted(order[:wrong].tolist())
    assert (result.Y - f(X)).abs().max() <= 1e-7 * scale


def test_lagrange_says_when_more_lie_than_it_corrects() -> None:
    code = LagrangeCode(5, 21, 3)
    X = normal(0, 40, 5, 6)
    honest = X**3 - 2 * X
    for wrong in range(9):
        draws = Trials.drawn(wrong, 40, 5, 21, 6)
        V = code.encode(X)
        V = V**3 - 2 * V + 5 * draws.lies * draws.liars(wrong).unsqueeze(-1)
        result = code.decode_all(V)
        right = (result.Y - honest).abs().amax((-2, -1)) < 1e-6
        assert (right == result.trusted).all(), wrong
        assert right.all() == (wrong <= code.corrects())


def test_lagrange_says_when_float64_is_not_enough() -> None:
    """Thirteen neighbours are missing: inside what is there, or at its end."""
    code, X = LagrangeCode(16, 100, 4), normal(0, 16, 6)
    V = code.encode(X)
    V, truth = V**4 - 2 * V, X**4 - 2 * X
    for gone, trusted in ((range(87, 100), False), (range(40, 53), True)):
        present = torch.ones(100, dtype=torch.bool)
        present[list(gone)] = False
        result = code.decode_all(V, present)
        assert bool(result.trusted) == trusted
        off = float((result.Y - truth).abs().max() / truth.abs().max())
        assert (off < 1e-9) == trusted
        assert (float(code.amplification(present)) < 4e6) == trusted


def test_votes_that_are_ties_are_not_trusted() -> None:
    code = ReplicationCode(2, 4)
    V = code.encode(normal(0, 2, 3))
    assert code.decode_all(V).trusted
    V[3] += 1.0
    result = code.decode_all(V)
    assert not result.trusted
    assert not result.errors.any()
    present = torch.tensor([True, True, True, False])
    assert not code.decode_all(V, present).trusted, "a single copy is checked by nobody"
    with pytest.raises(UsageError, match="none of 4 answers"):
        code.decode_all(V, ~torch.ones(4, dtype=torch.bool))


def test_lagrange_needs_its_answers() -> None:
    with pytest.raises(UsageError, match=r"need N >= \(K - 1\) degree \+ 1 = 9"):
        LagrangeCode(5, 8, 2)
    code = LagrangeCode(3, 7, 2)
    with pytest.raises(UsageError, match="4 of 7 answers are left; need 5"):
        code.decode_all(torch.ones(7, 2), torch.arange(7) < 4)
    with pytest.raises(UsageError, match="inputs"):
        code.encode(torch.ones(4, 2))


def test_votes_hold_until_half_of_the_copies_lie() -> None:
    code, X = ReplicationCode(5, 31), normal(0, 5, 8)
    V = code.encode(X).exp()
    lied = V.clone()
    lied[[0, 5, 1, 6]] += 100.0
    assert torch.equal(code.decode_all(lied).Y, X.exp())
    lied[[10, 15, 20]] += 100.0
    assert not torch.equal(code.decode_all(lied).Y, X.exp())
    present = torch.ones(31, dtype=torch.bool)
    present[2::5] = False
    lost = code.decode_all(V, present)
    assert not lost.trusted
    assert (lost.Y[2] == 0).all()
    assert torch.equal(lost.Y[[0, 1, 3, 4]], X[[0, 1, 3, 4]].exp())
    with pytest.raises(UsageError, match="K=5, N=4"):
        ReplicationCode(5, 4)
