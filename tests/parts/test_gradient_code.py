"""Gradient codes: every set of survivors, large codes, what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.coding.gradient_code import GradientCode


def test_every_set_of_survivors_decodes_to_rounding() -> None:
    code = GradientCode.cyclic(6, 2)
    gradients = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 40)))
    sent = torch.stack([code.encode(i, gradients[list(code.plan(i))]) for i in range(6)])
    for ids in itertools.combinations(range(6), 4):
        decoded = code.decode(ids, sent[list(ids)])
        assert torch.allclose(decoded, gradients.sum(0), rtol=0, atol=1e-12)
    for ids in itertools.combinations(range(6), 3):
        assert not code.enough(ids)
        with pytest.raises(UsageError, match="wait for 4"):
            code.decode(ids, sent[list(ids)])


def test_rows_have_the_cyclic_support_and_span_the_ones() -> None:
    code = GradientCode.cyclic(11, 3)
    for worker in range(11):
        held = set(np.flatnonzero(code.matrix[worker]).tolist())
        assert held == set(code.plan(worker)) == {(worker + j) % 11 for j in range(4)}
        assert code.matrix[worker, worker] == 1.0
    assert np.linalg.matrix_rank(code.matrix, tol=1e-9) == 11 - 3
    assert code.load == 4 / 11


@given(st.integers(2, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_any_code_any_survivors(n: int, data: st.DataObject) -> None:
    s = data.draw(st.integers(0, n - 1))
    missing = data.draw(st.sets(st.integers(0, n - 1), max_size=s))
    code = GradientCode.cyclic(n, s)
    ids = [i for i in range(n) if i not in missing]
    weights = code.weights(ids)
    assert np.abs(weights @ code.matrix[ids] - 1.0).max() < 1e-9


@pytest.mark.parametrize(("n", "s"), [(256, 3), (256, 15), (256, 27)])
def test_large_codes_are_well_conditioned(n: int, s: int) -> None:
    code = GradientCode.cyclic(n, s)
    draw = np.random.default_rng(5)
    sets = [np.sort(draw.permutation(n)[: n - s]) for _ in range(12)]
    sets += [np.sort((np.arange(n - s) + first) % n) for first in range(0, n, 43)]
    gradients = torch.from_numpy(draw.normal(size=(n, 3)))
    sent = torch.stack([code.encode(i, gradients[list(code.plan(i))]) for i in range(n)])
    for ids in sets:
        assert code.amplification(ids.tolist()) < 1e7
        error = (code.decode(ids.tolist(), sent[ids]) - gradients.sum(0)).abs().max()
        assert float(error) < 1e-8 * float(gradients.sum(0).abs().max() + 1)


def test_fractional_decodes_with_one_of_each_group() -> None:
    code = GradientCode.fractional(6, 2)
    assert code.plan(4) == (3, 4, 5)
    assert code.enough([2, 3])
    assert not code.enough([0, 1, 2])
    gradients = torch.arange(6.0, dtype=torch.float64)
    sent = torch.stack([code.encode(i, gradients[list(code.plan(i))]) for i in range(6)])
    assert float(code.decode([5, 0, 1], sent[[5, 0, 1]])) == 15.0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="stragglers=4 of workers=4"):
        GradientCode.cyclic(4, 4)
    with pytest.raises(UsageError, match="must divide"):
        GradientCode.fractional(7, 2)
    with pytest.raises(UsageError, match="kind='random'"):
        GradientCode(4, 1, "random")
    code = GradientCode.cyclic(4, 1)
    with pytest.raises(UsageError, match="worker 4 of 4"):
        code.plan(4)
    with pytest.raises(UsageError, match="different ones"):
        code.weights([0, 1, 1])
    with pytest.raises(UsageError, match="2 rows"):
        code.encode(0, torch.zeros(3, 5))
    with pytest.raises(UsageError, match="one row for each"):
        code.decode([0, 1, 2], torch.zeros(4, 5))


def test_a_residual_is_never_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    code = GradientCode.cyclic(8, 3)
    damaged = code.matrix.copy()
    damaged[0] *= 0.0
    damaged[1] *= 0.0
    monkeypatch.setitem(code.__dict__, "matrix", damaged)
    with pytest.raises(UsageError, match="residual"):
        code.weights([0, 1, 2, 3, 4])
