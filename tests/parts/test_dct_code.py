"""The DCT code: orthonormal, shifts by multiplication, exact location up to half of the checks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.dct_code import (
    DctCode,
    angles,
    first_kind,
    forget,
    times_x,
    top_rows,
    transform,
)
from shoal.tensor.threads import one_thread

N = 31


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    with one_thread():
        yield


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def codewords(code: DctCode, seed: int, dim: int, *lead: int) -> Tensor:
    """Polynomials of degree < dimension at the nodes, from coefficients in the Chebyshev basis."""
    orders = torch.arange(code.dimension, dtype=torch.float64)
    return torch.cos(angles(code.nodes)[:, None] * orders) @ normal(
        seed, *lead, code.dimension, dim
    )


def chosen(seed: int, count: int, *lead: int) -> Tensor:
    """`count` nodes at random, bool [..., N]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((*lead, N), generator=generator).argsort(-1)
    return torch.zeros((*lead, N), dtype=torch.bool).scatter(-1, order[..., :count], True)


@given(st.integers(2, 60))
@settings(max_examples=20, deadline=None)
def test_the_transform_is_orthonormal_and_scipys(count: int) -> None:
    T = transform(count)
    assert (T @ T.mT - torch.eye(count, dtype=torch.float64)).abs().max() < 1e-13
    x = normal(count, count)
    by_scipy = torch.from_numpy(fft.dct(x.numpy(), type=2, norm="ortho"))
    assert torch.allclose(T @ x, by_scipy, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 29))
@settings(max_examples=40, deadline=None)
def test_top_rows_are_sines_and_multiplication_by_the_node_shifts_them(
    seed: int, dimension: int
) -> None:
    code, V = DctCode(N, dimension), normal(seed, 1, N, 4)
    sigma = top_rows(code.syndrome(V), N)[0]
    m = torch.arange(1, code.checks + 1, dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(N) % 2).double()
    sines = torch.sin(m[:, None] * angles(N)) * sign
    assert torch.allclose(sigma, sines @ V[0], atol=1e-12)
    shifted = times_x(sigma[None])[0]
    assert len(shifted) == code.checks - 1
    assert torch.allclose(shifted, (sines @ (first_kind(N)[:, None] * V[0]))[:-1], atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_absent_nodes_leave_no_trace(seed: int, missing: int) -> None:
    """Whatever an absent node holds, the shortened sequence is the same."""
    code, V = DctCode(N, 15), normal(seed, 1, N, 3)
    absent = chosen(seed, missing, 1)
    other = torch.where(absent[..., None], normal(seed + 1, 1, N, 3), V)
    a, b = (forget(top_rows(code.syndrome(v), N), absent, missing, N) for v in (V, other))
    assert a.shape[1] == code.checks - missing
    assert torch.allclose(a, b, atol=1e-11)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_codewords_have_no_syndrome(seed: int, dimension: int) -> None:
    code = DctCode(N, dimension)
    V = codewords(code, seed, 6)
    assert code.syndrome(V).abs().max() < 1e-12 * max(1.0, float(V.abs().max()))
    found = code.locate(V)
    assert not found.errors.any()
    assert found.trusted


@pytest.mark.parametrize("dimension", [11, 13, 15, 17, 19, 21, 23, 25])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 100.0])
def test_half_of_the_checks_are_located(dimension: int, magnitude: float) -> None:
    code, trials = DctCode(N, dimension), 50
    V = codewords(code, dimension, 10, trials)
    wrong = chosen(dimension + 1, code.correctable(), trials)
    lies = magnitude * normal(dimension + 2, trials, N, 10)
    found = code.locate(V + lies * wrong[..., None])
    assert torch.equal(found.errors, wrong)
    assert found.trusted.all()
    assert (found.residual < 1e-10).all()


def test_errors_of_very_different_size_are_all_located() -> None:
    code = DctCode(N, 15)
    V, wrong = codewords(code, 5, 12, 40), chosen(6, 5, 40)
    size = 10.0 ** (8 * torch.rand((40, N, 1), generator=torch.Generator().manual_seed(7)) - 6)
    found = code.locate(V + size * normal(8, 40, N, 12) * wrong[..., None])
    assert torch.equal(found.errors, wrong)


def test_scalars_at_the_limit() -> None:
    """One number per worker and as many errors as the code can find: fewer rows than columns."""
    code = DctCode(N, 15)
    V, wrong = codewords(code, 1, 1, 50), chosen(2, 8, 50)
    found = code.locate(V + normal(3, 50, N, 1).sign() * wrong[..., None])
    assert torch.equal(found.errors, wrong)


@given(st.integers(0, 10**6), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_missing_and_wrong_ones_together(seed: int, missing: int) -> None:
    code = DctCode(N, 13)
    V, count = codewords(code, seed, 10), code.correctable(missing)
    order = torch.rand(N, generator=torch.Generator().manual_seed(seed)).argsort()
    wrong = torch.zeros(N, dtype=torch.bool).index_fill(0, order[:count], True)
    present = torch.ones(N, dtype=torch.bool).index_fill(0, order[count : count + missing], False)
    lied = V + normal(seed + 1, N, 10) * wrong[:, None]
    lied[~present] = math.nan
    found = code.locate(lied, present)
    assert torch.equal(found.errors, wrong)
    assert found.trusted
    # Rows that are no numbers are missing, said or not.
    assert torch.equal(code.locate(lied).errors, wrong)


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_scale_and_order_of_entries_do_not_matter(seed: int, scale: float) -> None:
    code = DctCode(N, 15)
    V, wrong = codewords(code, seed, 8) + 1e-3 * normal(seed, N, 8), chosen(seed, 3)
    lied = V + normal(seed + 1, N, 8) * wrong[:, None]
    plain = code.locate(lied)
    scaled = code.locate(scale * lied.flip(-1))
    assert torch.equal(plain.errors, scaled.errors)
    assert float(scaled.residual) == pytest.approx(float(plain.residual), rel=1e-6)


@pytest.mark.parametrize("magnitude", [1e7, 1e10, 1e38, 1e200])
def test_lies_beyond_all_measure_do_not_drown_others(magnitude: float) -> None:
    code = DctCode(N, 15)
    V, wrong, huge = codewords(code, 0, 10), chosen(1, 4), chosen(2, 2)
    lied = V + 1e-2 * normal(3, N, 10) * wrong[:, None]
    lied[huge] = magnitude
    found = code.locate(lied)
    assert torch.equal(found.errors, wrong | huge)
    assert found.trusted


def test_batches_are_single_cases() -> None:
    code = DctCode(N, 17)
    V = codewords(code, 0, 30, 3, 4) + 1e-3 * normal(1, 3, 4, N, 30)
    V = V + normal(2, 3, 4, N, 30) * chosen(3, 3, 3, 4)[..., None]
    present = ~(chosen(4, 2, 3, 4) & (torch.arange(12).view(3, 4, 1) % 3 > 0))
    both = code.locate(V, present)
    assert both.errors.shape == (3, 4, N)
    for i in range(3):
        for j in range(4):
            one = code.locate(V[i, j], present[i, j])
            assert torch.equal(one.errors, both.errors[i, j])
            assert float(one.residual) == pytest.approx(float(both.residual[i, j]), rel=1e-9)


def test_fewer_errors_than_there_are_is_not_trusted() -> None:
    code = DctCode(N, 15)
    V, wrong = codewords(code, 0, 10), chosen(1, 5)
    found = code.locate(V + 10 * normal(2, N, 10) * wrong[:, None], max_errors=3)
    assert int(found.errors.sum()) <= 3
    assert not found.trusted


def test_more_errors_than_checks_can_tell_are_not_trusted() -> None:
    code = DctCode(N, 21)
    V, wrong = codewords(code, 0, 20, 20), chosen(1, 12, 20)
    found = code.locate(V + 5 * normal(2, 20, N, 20) * wrong[..., None])
    assert not found.trusted.any()


def test_a_stated_noise_decides_what_is_an_error() -> None:
    V = codewords(DctCode(N, 15), 0, 40) + 1e-2 * normal(1, N, 40)
    level = float(DctCode(N, 15).locate(V, max_errors=0).residual)
    wrong = chosen(2, 2)
    lied = V + normal(3, N, 40) * wrong[:, None]
    assert torch.equal(DctCode(N, 15, noise=level).locate(lied).errors, wrong)
    blind = DctCode(N, 15, noise=100 * level).locate(lied)
    assert not blind.errors.any()
    assert blind.trusted
    strict = DctCode(N, 15, noise=level / 100).locate(lied)
    assert not strict.trusted


def test_without_checks_left_nothing_is_trusted() -> None:
    code = DctCode(8, 5)
    V = torch.ones(8, 2, dtype=torch.float64)
    present = torch.arange(8) < 5
    found = code.locate(V, present)
    assert not found.errors.any()
    assert found.residual.isnan()
    assert not found.trusted


def test_liars_who_send_another_smooth_function_are_found() -> None:
    code = DctCode(N, 15)
    V, other, wrong = codewords(code, 0, 10), codewords(code, 1, 10), chosen(2, 6)
    assert torch.equal(code.locate(torch.where(wrong[:, None], other, V)).errors, wrong)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nodes": 8, "dimension": 8}, "dimension=8 of 8"),
        ({"nodes": 8, "dimension": 0}, "dimension=0"),
        ({"nodes": 8, "dimension": 3, "noise": -1.0}, "noise=-1.0"),
        ({"nodes": 8, "dimension": 3, "noise": math.nan}, "noise=nan"),
    ],
)
def test_codes_that_cannot_be(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DctCode(**settings)  # type: ignore[arg-type]


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"values \(7, 2\)"):
        DctCode(8, 3).locate(torch.ones(7, 2))
