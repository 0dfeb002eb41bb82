"""The Flag Aggregator: its invariants, and its Gram form against explicit subspaces."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.aggregate._flag_subspace import SMOOTHING
from shoal.parts.aggregate.flag import Flag

SEEDS = st.integers(0, 10_000)


def rows_of(seed: int, count: int = 7, dim: int = 12) -> torch.Tensor:
    """Rows around a common direction, with a few outliers."""
    random = np.random.default_rng(seed)
    x = random.normal(size=dim) + random.uniform(0.2, 3.0) * random.normal(size=(count, dim))
    x[: count // 4] = 5.0 * random.uniform(size=dim)
    return torch.tensor(x * random.uniform(0.1, 10.0, size=(count, 1)))


def here(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def run(rule: Flag, x: torch.Tensor) -> torch.Tensor:
    return rule(x, mask=here(x))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def sines(basis: np.ndarray, unit_rows: np.ndarray) -> np.ndarray:
    """1 - v^2 of each row, by explicit projection."""
    return 1 - ((unit_rows @ basis) ** 2).sum(-1)


def objective(basis: np.ndarray, x: np.ndarray, regulariser: float, eps: float) -> float:
    """The spec's smoothed A(Y), term by term."""
    p = len(x)
    total = np.sqrt(np.maximum(sines(basis, x), 0) + eps).sum()
    for i in range(p):
        for j in range(p):
            d = x[i] - x[j]
            if i != j and d @ d > 1e-12:
                inside = ((d @ basis) ** 2).sum() / (d @ d)
                total += regulariser / (p * (p - 1)) * math.sqrt(max(0.0, 1 - inside) + eps)
    return float(total)


def explicit(x: np.ndarray, dim: int, regulariser: float, iterations: int) -> tuple[Any, list]:
    """(update, objectives) by singular vectors of the weighted columns themselves."""
    p = len(x)
    unit_rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    columns = unit_rows.T
    bases, worth = [], []
    for _ in range(iterations + 1):
        basis = np.linalg.svd(columns, full_matrices=False)[0][:, :dim]
        bases.append(basis)
        worth.append(objective(basis, unit_rows, regulariser, SMOOTHING))
        weights = (np.maximum(sines(basis, unit_rows), 0) + SMOOTHING) ** -0.5
        parts = [np.sqrt(w) * row for w, row in zip(weights, unit_rows, strict=True)]
        for i in range(p):
            for j in range(p):
                d = unit_rows[i] - unit_rows[j]
                square = d @ d
                if i == j or regulariser == 0 or square <= 1e-12:
                    continue
                inside = ((d @ basis) ** 2).sum() / square
                w = regulariser / (p * (p - 1)) / math.sqrt(max(0.0, 1 - inside) + SMOOTHING)
                parts.append(math.sqrt(w / square) * d)
        columns = np.stack(parts, axis=1)
    best = bases[int(np.argmin(worth))]
    return best @ (best.T @ unit_rows.mean(0)), worth


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 4.0]), st.sampled_from([None, 2]))
def test_the_basis_is_orthonormal_and_the_update_turns_with_space(seed, regulariser, dim) -> None:
    x = rows_of(seed)
    rule = Flag(dim=dim, regulariser=regulariser)
    found = rule.detail(x, here(x))
    axes = unit(x).mT @ found.basis
    width = 4 if dim is None else dim
    expected = torch.diag((axes.norm(dim=0) > 0.5).double())
    assert int(expected.sum()) == width
    torch.testing.assert_close(axes.mT @ axes, expected, rtol=0, atol=1e-9)
    inside = (unit(x) @ axes).norm(dim=-1)
    torch.testing.assert_close(found.values, inside, rtol=0, atol=1e-9)
    turn = torch.linalg.qr(torch.tensor(np.random.default_rng(seed).normal(size=(12, 12)))).Q
    torch.testing.assert_close(run(rule, x @ turn.mT), run(rule, x) @ turn.mT, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 4.0]))
def test_neither_order_nor_positive_scale_of_rows_matters(seed, regulariser) -> None:
    x = rows_of(seed)
    random = np.random.default_rng(seed)
    order = torch.tensor(random.permutation(len(x)))
    scale = torch.tensor(10.0 ** random.uniform(-30, 30, size=(len(x), 1)))
    rule = Flag(regulariser=regulariser)
    plain, moved = rule.detail(x, here(x)), rule.detail((scale * x)[order], here(x))
    torch.testing.assert_close(moved.update, plain.update, rtol=0, atol=1e-7)
    torch.testing.assert_close(moved.values, plain.values[order], rtol=0, atol=1e-7)
    assert (run(rule, -x) + plain.update).abs().max() < 1e-7


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 4.0]))
def test_equal_rows_give_their_direction(seed, dtype, regulariser) -> None:
    x = rows_of(seed)[:1].expand(9, 12).to(dtype)
    found = Flag(regulariser=regulariser).detail(x, here(x))
    torch.testing.assert_close(found.update, unit(x[0]))
    torch.testing.assert_close(found.values, torch.ones(9, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.booleans(), st.sampled_from([0.0, 4.0]))
def test_a_subspace_of_full_rank_gives_the_mean_of_directions(
    seed, rank, more, regulariser
) -> None:
    random = np.random.default_rng(seed)
    x = torch.tensor(random.normal(size=(7, rank)) @ random.normal(size=(rank, 12)))
    rule = Flag(dim=rank + more, regulariser=regulariser)
    torch.testing.assert_close(run(rule, x), unit(x).mean(0), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 1.0, 8.0, 64.0]), st.sampled_from([1, 3, 4]), st.booleans())
def test_the_objective_never_rises(seed, regulariser, dim, exact) -> None:
    x = rows_of(seed)
    steps = [
        Flag(dim=dim, regulariser=regulariser, iterations=t, exact=exact).detail(x, here(x))
        for t in range(6)
    ]
    worth = [float(step.objective) for step in steps]
    assert all(b <= a + 1e-9 * abs(a) for a, b in pairwise(worth))
    if exact:
        return
    found = steps[-1]
    axes = (unit(x).mT @ found.basis).numpy()
    assert objective(axes, unit(x).numpy(), regulariser, SMOOTHING) == pytest.approx(
        worth[-1], abs=1e-5
    )
    # Each step by itself, not the best so far: explicit, since the rule keeps the best.
    _, path = explicit(x.numpy(), dim, regulariser, 5)
    assert all(b <= a + 1e-9 * a for a, b in pairwise(path))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 2.0, 16.0]), st.integers(1, 4), st.integers(0, 5))
def test_gram_form_equals_explicit_singular_vectors(seed, regulariser, dim, iterations) -> None:
    x = rows_of(seed, count=6, dim=40)
    expected, worth = explicit(x.numpy(), dim, regulariser, iterations)
    found = Flag(dim=dim, regulariser=regulariser, iterations=iterations).detail(x, here(x))
    np.testing.assert_allclose(found.update.numpy(), expected, rtol=0, atol=1e-6)
    assert float(found.objective) == pytest.approx(min(worth), abs=1e-6)


def test_two_alike_against_one_keep_their_direction() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for iterations in (0, 1, 5):
        found = Flag(dim=1, iterations=iterations).detail(x, here(x))
        torch.testing.assert_close(found.update, torch.tensor([2 / 3, 0.0], dtype=torch.float64))
        torch.testing.assert_close(found.values, torch.tensor([1.0, 1.0, 0.0]).double())


def test_reweighting_changes_the_answer_of_principal_components() -> None:
    # Four rows near one axis; three spread rows whose sum of squares wins the equal-weight vote.
    angles = torch.tensor([0.0, 0.01, -0.01, 0.0, 1.2, 1.3, 1.25, 1.4], dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), -1)
    first, last = Flag(dim=1, iterations=0), Flag(dim=1, iterations=20)
    start, end = first.detail(x, here(x)), last.detail(x, here(x))
    assert float(end.objective) < float(start.objective) - 0.05
    assert float(end.values[:4].min()) > 0.99 > float(start.values[:4].max())


def test_zero_and_absent_rows_do_not_count() -> None:
    x = rows_of(3)
    expected = run(Flag(), x)
    more = torch.cat((x, torch.zeros(2, 12, dtype=torch.float64), torch.full((1, 12), math.nan)))
    found = Flag().detail(more, here(more))
    torch.testing.assert_close(found.update, expected, rtol=0, atol=1e-12)
    assert (found.values[7:] == 0).all()
    assert (run(Flag(), torch.zeros(3, 12)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_lengths_are_directions_like_others(dtype) -> None:
    x = rows_of(5).to(dtype)
    limit = torch.finfo(dtype)
    big, small = 0.9 * limit.max, 100 * limit.tiny
    top = x.abs().amax(-1, keepdim=True)
    extreme = torch.cat((x[:2] / top[:2] * big, x[2:4] / top[2:4] * small, x[4:]))
    torch.testing.assert_close(run(Flag(), extreme), run(Flag(), x), rtol=0, atol=1e-4)


def test_the_median_length_gives_back_the_scale() -> None:
    x = rows_of(4, count=6)
    plain, scaled = run(Flag(), x), run(Flag(rescale="median_norm"), x)
    torch.testing.assert_close(scaled, plain * np.median(x.norm(dim=-1).numpy()))
    huge = x.clone()
    huge[:2] *= 1e9
    assert run(Flag(rescale="median_norm"), huge).norm() <= x.norm(dim=-1).max() * (1 + 1e-9)


def test_a_pair_weight_counts_its_distance() -> None:
    # Without 1/|d|^2 the reweighted subspace would be another, and often a worse one.
    x = rows_of(11, count=6, dim=40)
    strong = Flag(dim=2, regulariser=64.0)
    expected, _ = explicit(x.numpy(), 2, 64.0, 5)
    np.testing.assert_allclose(run(strong, x).numpy(), expected, atol=1e-6)
    assert (run(Flag(dim=2), x) - torch.tensor(expected)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dim": 0}, "dim=0"),
        ({"iterations": -1}, "iterations=-1"),
        ({"regulariser": -1.0}, "regulariser=-1.0"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"beta": 1.0}, "not both 1"),
        ({"rescale": "mean"}, "rescale='mean'"),
    ],
)
def test_bad_settings_say_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Flag(**given)


def spread_out(basis: np.ndarray, sparsity: float) -> float:
    """The L1 term: lengths of the basis's rows, over the root of their number."""
    lengths = np.sqrt((basis**2).sum(-1) + SMOOTHING)
    return float(sparsity / math.sqrt(len(basis)) * lengths.sum())


def explicit_sparse(
    x: np.ndarray, dim: int, sparsity: float, iterations: int
) -> tuple[Any, list[float]]:
    """(update, objectives), with the n x n scatter compressed to the rows' span in full."""
    unit_rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    span = np.linalg.qr(unit_rows.T)[0]
    basis = np.linalg.svd(unit_rows.T, full_matrices=False)[0][:, :dim]
    bases, worth = [], []
    for _ in range(iterations + 1):
        bases.append(basis)
        worth.append(objective(basis, unit_rows, 0.0, SMOOTHING) + spread_out(basis, sparsity))
        weights = 0.5 * (np.maximum(sines(basis, unit_rows), 0) + SMOOTHING) ** -0.5
        lengths = np.sqrt((basis**2).sum(-1) + SMOOTHING)
        scatter = (unit_rows.T * weights) @ unit_rows
        scatter -= np.diag(0.5 * sparsity / math.sqrt(x.shape[1]) / lengths)
        basis = span @ np.linalg.eigh(span.T @ scatter @ span)[1][:, -dim:]
    best = bases[int(np.argmin(worth))]
    return best @ (best.T @ unit_rows.mean(0)), worth


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.3, 2.0, 20.0]), st.integers(1, 4), st.integers(0, 5))
def test_sparse_subspaces_in_gram_form_equal_explicit_ones(seed, sparsity, dim, iterations) -> None:
    x = rows_of(seed, count=6, dim=40)
    expected, worth = explicit_sparse(x.numpy(), dim, sparsity, iterations)
    assert all(b <= a + 1e-9 * abs(a) for a, b in pairwise(worth))
    rule = Flag(dim=dim, sparsity=sparsity, iterations=iterations)
    found = rule.detail(x, here(x))
    assert float(found.objective) == pytest.approx(min(worth), abs=1e-6)
    np.testing.assert_allclose(found.update.numpy(), expected, rtol=0, atol=1e-5)


def test_sparsity_prefers_directions_of_few_coordinates() -> None:
    random = np.random.default_rng(2)
    few, many = np.zeros(64), np.full(64, 1 / 8)
    few[5] = 1.0
    noise = 0.06 * random.normal(size=(9, 64))
    x = torch.tensor(np.stack([few] * 4 + [many] * 5) + noise)
    plain, sparse = (Flag(dim=1, sparsity=by, iterations=50).detail(x, here(x)) for by in (0, 8))
    assert float(plain.values[4:].min()) > 0.8 > float(plain.values[:4].max())
    assert float(sparse.values[:4].min()) > 0.8 > float(sparse.values[4:].max())


def test_sparsity_counts_only_what_the_rows_span() -> None:
    x = rows_of(6, count=3, dim=12)
    more = torch.cat((x, 2 * x[:1], torch.zeros(1, 12, dtype=torch.float64)))
    found = Flag(dim=2, sparsity=3.0).detail(more, here(more))
    axes = unit(more[:4]).mT @ found.basis[:4]
    assert int((axes.norm(dim=0) > 0.5).sum()) == 2
    torch.testing.assert_close(
        (axes.mT @ axes).diagonal().sort().values[-2:], torch.ones(2, dtype=torch.float64)
    )
