"""Aggregators against plain loops over numpy arrays, independent libraries and closed forms."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.stats import trim_mean

from shoal.base.errors import UsageError
from shoal.parts.aggregate.centered_clipping import CenteredClipping
from shoal.parts.aggregate.geometric_median import GeometricMedian
from shoal.parts.aggregate.krum import Krum
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.median import Median
from shoal.parts.aggregate.multi_krum import MultiKrum
from shoal.parts.aggregate.nna import NNA, estimate_reduction, nearest_neighbor_average, nna_all
from shoal.parts.aggregate.nnm import NNM
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.parts.attack.alie import ALIE
from shoal.parts.attack.gaussian import Gaussian
from shoal.parts.attack.inner_product import InnerProduct
from shoal.rounds.attack import View
from shoal.tensor import keyed
from shoal.tensor.distances import distances_to, squared_distances
from shoal.tensor.ordered import ordered_mean
from shoal.tensor.stack import nearest


def here(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:-1], dtype=torch.bool)


@st.composite
def stacks(draw, least: int = 1, most: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Rows [k, dim] whose pairwise distances differ, some of them absent or not finite."""
    count, dim = draw(st.integers(least, most)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, dim)) * draw(st.sampled_from([1e-3, 1.0, 1e4]))
    mask = random.random(count) < draw(st.sampled_from([0.6, 1.0]))
    mask[0] = True
    bad = random.random(count) < draw(st.sampled_from([0.0, 0.2]))
    bad[0] = False
    x[bad, 0] = random.choice([np.nan, np.inf, -np.inf])
    return x, mask


def run(rule, x: np.ndarray, mask: np.ndarray, center: np.ndarray | None = None) -> np.ndarray:
    own = None if center is None else torch.tensor(center)
    return rule(torch.tensor(x), mask=torch.tensor(mask), center=own).numpy()


def finite(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return x[mask & np.isfinite(x).all(-1)]


def by_distance(rows: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.argsort(((rows - point) ** 2).sum(-1), kind="stable")


def check(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(stacks())
def test_mean_and_median(case) -> None:
    x, mask = case
    check(run(Mean(), x, mask), finite(x, mask).mean(0))
    check(run(Median(), x, mask), np.median(finite(x, mask), axis=0))


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 4))
def test_trimmed_mean(case, trim: int) -> None:
    x, mask = case
    rows = finite(x, mask)
    if 2 * trim < len(rows):
        expected = trim_mean(rows, (trim + 1e-9) / len(rows), axis=0)
    else:
        expected = np.median(rows, axis=0)
    check(run(TrimmedMean(trim), x, mask), expected)


def krum_scores(rows: np.ndarray, received: int, byzantine: int) -> np.ndarray:
    scores = []
    for i in range(len(rows)):
        apart = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(len(rows)) if j != i)
        scores.append(sum(apart[: max(1, received - byzantine - 2)]))
    return np.array(scores)


@settings(max_examples=30, deadline=None)
@given(stacks(least=6, most=11), st.integers(0, 2), st.sampled_from([None, 1, 3]))
def test_krum_and_multi_krum(case, byzantine: int, keep: int | None) -> None:
    x, mask = case
    rows = finite(x, mask)
    if mask.sum() - byzantine - 2 < 2 or len(rows) < 3:
        return  # With one neighbour the two nearest rows tie exactly.
    scores = krum_scores(rows, int(mask.sum()), byzantine)
    check(run(Krum(byzantine), x, mask), rows[scores.argmin()])
    count = max(1, int(mask.sum()) - byzantine - 2) if keep is None else keep
    best = rows[np.argsort(scores, kind="stable")[:count]]
    check(run(MultiKrum(byzantine, keep), x, mask), best.mean(0))


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 3))
def test_nna(case, byzantine: int) -> None:
    x, mask = case
    rows = finite(x, mask)
    keep = max(1, int(mask.sum()) - byzantine)
    expected = rows[by_distance(rows, x[0])[:keep]].mean(0)
    check(run(NNA(byzantine), x, mask, x[0]), expected)


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 3))
def test_nnm_then_median(case, byzantine: int) -> None:
    x, mask = case
    rows = finite(x, mask)
    keep = max(1, int(mask.sum()) - byzantine)
    means = [rows[by_distance(rows, row)[:keep]].mean(0) for row in rows]
    check(run(NNM(byzantine, then="median"), x, mask), np.median(means, axis=0))


@settings(max_examples=25, deadline=None)
@given(stacks(), st.sampled_from([0.1, 3.0]), st.integers(1, 3))
def test_centered_clipping(case, radius: float, iterations: int) -> None:
    x, mask = case
    rows = finite(x, mask)
    point = x[0] + 0.01
    expected = point.copy()
    for _ in range(iterations):
        clipped = [d * (radius / max(radius, np.linalg.norm(d))) for d in rows - expected]
        expected = expected + np.mean(clipped, axis=0)
    check(run(CenteredClipping(radius, iterations), x, mask, point), expected)
    start = run(CenteredClipping(radius, iterations), x, mask)
    check(start, run(CenteredClipping(radius, iterations), x, mask, np.median(rows, axis=0)))


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_minimises_the_sum_of_distances(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(9, 3))
    x[:2] += 40.0

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(x - point, axis=-1).sum())

    options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(total, np.median(x, axis=0), method="Nelder-Mead", options=options)
    out = run(GeometricMedian(1e-9, 300), x, np.ones(9, dtype=bool))
    np.testing.assert_allclose(out, best.x, atol=1e-5)
    # Each step goes down, and the default is near the bottom.
    totals = [total(run(GeometricMedian(1e-9, n), x, np.ones(9, dtype=bool))) for n in range(1, 9)]
    assert all(later <= sooner + 1e-12 for sooner, later in itertools.pairwise(totals))
    assert totals[-1] < best.fun * 1.001


def test_geometric_median_of_a_square_and_of_a_majority_point() -> None:
    square = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    torch.testing.assert_close(GeometricMedian()(square, mask=here(square)), torch.ones(2))
    majority = torch.tensor([[1.0], [1.0], [1.0], [5.0], [-9.0]])
    out = GeometricMedian()(majority, mask=here(majority))
    assert abs(out.item() - 1.0) < 1e-6


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mix_is_the_mixing_matrix_times_the_stack(layout: str, dtype: torch.dtype) -> None:
    ring = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        ring[i, [i, (i + 1) % 6, (i - 1) % 6]] = 1 / 3
    x = torch.cos(torch.arange(48.0, dtype=torch.float64)).reshape(2, 6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        weight = ring.to_sparse_csr() if layout == "csr" else ring
    expected = torch.einsum("rs,bsd->brd", ring, x).to(dtype)
    torch.testing.assert_close(Mean().mix(weight, x.to(dtype)), expected)
    torch.testing.assert_close(Mean().mix(weight, x[0].to(dtype)), expected[0])
    # A sender that is not finite is absent for its two neighbours and itself; others do not notice.
    bad = x[0].to(dtype).clone()
    bad[0, 1] = float("nan")
    out = Mean().mix(weight, bad)
    torch.testing.assert_close(out[2:5], expected[0, 2:5])
    torch.testing.assert_close(out[1], ((x[0, 1] + x[0, 2]) / 2).to(dtype))
    lonely = Mean().mix(weight, torch.full_like(bad, float("nan")), bad)
    torch.testing.assert_close(lonely, bad, equal_nan=True, rtol=0, atol=0)
    # Without weights a link is a link.
    plain = Mean(weighted=False).mix(weight, x[0].to(dtype))
    torch.testing.assert_close(plain, expected[0])


# Nearest-neighbour averaging: the hand cases and invariants of MoNNA's specification.


def test_nna_hand_case_with_a_far_fault() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [100.0]])
    torch.testing.assert_close(nna_all(x, 1)[:3], torch.ones(3, 1))
    for i in range(3):
        rest = torch.cat((x[:i], x[i + 1 :]))
        assert nearest_neighbor_average(x[i], rest, 1).item() == 1.0


def test_nna_hand_case_with_a_near_fault_and_a_tie() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [0.5]])
    torch.testing.assert_close(nna_all(x, 1)[:3].flatten(), torch.tensor([0.5, 0.5, 3.5 / 3]))


def test_nna_without_faults_is_the_mean_at_every_node() -> None:
    x = torch.sin(torch.arange(60.0)).reshape(12, 5)
    torch.testing.assert_close(nna_all(x, 0), x.mean(0).expand(12, 5))


@given(st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e30, float("nan")]))
@settings(max_examples=30, deadline=None)
def test_nna_of_equal_honest_vectors_is_that_vector(f: int, seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    honest = torch.tensor(random.normal(size=(1, 3))).expand(f + 1, 3)
    x = torch.cat((honest, size * torch.tensor(random.normal(size=(f, 3)))))
    torch.testing.assert_close(nna_all(x, f)[: f + 1], honest, rtol=1e-12, atol=0)


def test_nna_keeps_the_own_vector_beside_near_copies_with_lower_index() -> None:
    # 20 copies within rounding of the own vector, which comes last; only one row is kept.
    own = torch.full((1, 50), 1e3)
    x = torch.cat((own * (1 + 1e-7), own.expand(19, 50) * (1 + 2e-7), own))
    assert torch.equal(NNA(20).everyone(x, here(x))[-1], x[-1])


def test_nna_refuses_a_minority() -> None:
    with pytest.raises(UsageError, match="f=2 of 4 vectors"):
        nna_all(torch.zeros(4, 1), 2)
    with pytest.raises(UsageError, match="f=-1"):
        nearest_neighbor_average(torch.zeros(1), torch.zeros(3, 1), -1)


def test_nna_serves_each_receiver_its_own_faulty_vectors() -> None:
    honest = torch.tensor([[0.0], [1.0], [2.0]])
    faulty = torch.tensor([[-1.0], [1.0], [50.0]])
    stack = torch.stack([torch.cat((honest, faulty[i : i + 1])) for i in range(3)])
    out = NNA(1)(stack, mask=here(stack), center=honest)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 2 / 3, 1.0]))


@pytest.mark.parametrize(
    "adversary",
    [
        ALIE(factor="search"),
        InnerProduct(factor="search"),
        Gaussian(1.0, add=True),
        Gaussian(0.5),
        ALIE(z=1.5),
        InnerProduct(1.1),
    ],
)
def test_nna_contracts_as_proven_with_eleven_times_as_many_nodes(adversary) -> None:
    n, f, dim = 22, 2, 10
    keys = keyed.grid(keyed.key_of(5, "reduction"), 170)
    plain = keyed.normal(keyed.grid(keyed.grid(keys, n - f), dim), dtype=torch.float64)
    # From equal spread to a few peers far out.
    spread = torch.exp(keyed.normal(keyed.grid(keyed.fold(keys, "spread"), n - f)))
    honest = plain * spread.to(torch.float64)[..., None]
    measured = estimate_reduction(lambda x: nna_all(x, f), honest, f, adversary, keys)
    assert measured.alpha.max() < 9.88 * f / (n - f)
    assert measured.lam.max() < 9 * f / (n - f)
    assert measured.alpha.max() > 1e-4  # the adversary did something


def test_the_mean_does_not_contract_the_honest_mean() -> None:
    honest = torch.sin(torch.arange(60.0)).reshape(20, 3)

    def far(view: View, key: torch.Tensor) -> torch.Tensor:
        return torch.full_like(view.own, 1e3)

    measured = estimate_reduction(
        lambda x: Mean().everyone(x, here(x)), honest, 2, far, keyed.key_of(0)
    )
    assert measured.alpha.item() == pytest.approx(0.0, abs=1e-6)
    assert measured.lam.item() > 100


# The algebra beneath.


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 140), st.integers(1, 5), st.integers(0, 2**31))
def test_ordered_mean_finds_every_place_among_the_rows_that_count(
    count: int, dim: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(-5, 5, size=(2, count, dim)).astype(np.float32)
    rows = random.random((2, count)) < 0.7
    places = torch.eye(count).unsqueeze(1)  # one place at a time: a leading axis that x lacks
    out = ordered_mean(torch.tensor(x), torch.tensor(rows).expand(count, 2, count), places).numpy()
    for world in range(2):
        expected = np.sort(x[world][rows[world]], axis=0)
        np.testing.assert_array_equal(out[: len(expected), world], expected)
        assert np.isposinf(out[len(expected) :, world]).all()
    halves = (torch.arange(count) < 2).to(torch.float64)
    if rows.sum(-1).min() >= 2:
        pair = ordered_mean(torch.tensor(x), torch.tensor(rows), halves).numpy()
        for world in range(2):
            two = np.sort(x[world][rows[world]], axis=0)[:2]
            np.testing.assert_allclose(pair[world], two.mean(0))


@pytest.mark.parametrize("dim", [1, 7, 300, 70_000])
def test_squared_distances_match_scipy(dim: int) -> None:
    random = np.random.default_rng(dim)
    x = random.normal(size=(5, dim)) + 1e6
    apart = squared_distances(torch.tensor(x), torch.ones(5, dtype=torch.bool)).numpy()
    np.testing.assert_allclose(apart, cdist(x, x, "sqeuclidean"), rtol=1e-9)
    single = x.astype(np.float32)
    apart = squared_distances(torch.tensor(single), torch.ones(5, dtype=torch.bool)).numpy()
    exact = cdist(single.astype(np.float64), single.astype(np.float64), "sqeuclidean")
    np.testing.assert_allclose(apart, exact, rtol=1e-9)


def test_rows_that_do_not_count_have_no_distance() -> None:
    x = torch.tensor([[0.0], [3.0], [4.0]])
    rows = torch.tensor([True, False, True])
    apart = squared_distances(x, rows)
    assert apart[0, 2] == 16.0
    assert apart[1].isnan().all()
    assert apart[:, 1].isnan().all()
    assert distances_to(x, rows, x[0]).isnan().tolist() == [False, True, False]


def test_nearest_breaks_ties_by_index_and_never_takes_what_does_not_count() -> None:
    inf, nan = float("inf"), float("nan")
    apart = torch.tensor([[1.0, inf, 1.0, nan], [nan, nan, inf, inf]])
    assert nearest(apart, 1).tolist() == [[True, False, False, False], [False, False, True, False]]
    kept = nearest(apart, torch.tensor([4, 3]))
    assert kept.tolist() == [[True, True, True, False], [False, False, True, True]]
