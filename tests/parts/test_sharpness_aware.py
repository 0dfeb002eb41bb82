"""Sharpness-aware gradients, local training and flatness, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.measure.flatness import Flatness, top_eigenvalue
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.strategy.sharpness_aware import SharpnessAware, sam_gradient
from shoal.parts.tasks.digits import Digits
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch
from shoal.tensor import keyed

NOTHING = Batch(torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool))


class Bowl:
    """f(x) = x^T A x / 2, whatever the batch."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def grad(self, params: torch.Tensor, batch: Any) -> torch.Tensor:
        return params @ self.matrix


@given(st.integers(0, 10_000), st.floats(1e-3, 2.0))
@settings(max_examples=30, deadline=None)
def test_quadratic(seed: int, rho: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=draws, dtype=torch.float64)
    matrix = root @ root.T
    x = torch.randn(3, 5, generator=draws, dtype=torch.float64)
    found = sam_gradient(Bowl(matrix), x, NOTHING, rho)  # type: ignore[arg-type]
    for row, got in zip(x, found, strict=True):  # the norm is that of each peer
        ascent = rho * (matrix @ row) / (matrix @ row).norm()
        torch.testing.assert_close(got, matrix @ (row + ascent), rtol=1e-9, atol=1e-9)


def test_zero_gradient_is_no_nan() -> None:
    found = sam_gradient(Bowl(torch.eye(4)), torch.zeros(2, 4), NOTHING, 0.1)  # type: ignore[arg-type]
    assert torch.equal(found, torch.zeros(2, 4))


@pytest.fixture(scope="module")
def task() -> Digits:
    return Digits(
        peers=4, split="dirichlet", alpha=0.3, hidden=(8,), train_samples=60, holders=(0, 1, 3)
    )


def step_of(task: Digits, round: int = 3) -> Step:
    peers = torch.arange(4)
    keys = keyed.fold(keyed.key_of(1, "peer"), peers, "round", round)
    return Step(round, task, task.shard(peers), keys, torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("amount", [{"steps": 3}, {"epochs": 2}])
def test_rho_zero_is_plain_training_bit_for_bit(
    task: Digits, momentum: float, amount: dict[str, int]
) -> None:
    common = {"batch_size": 4, "momentum": momentum, "lr": 0.2, "lr_decay": 0.9, **amount}
    start = task.init(keyed.key_of(0, "init")).expand(4, -1).clone()
    step = step_of(task)
    sam = SharpnessAware(rho=0.0, **common)
    plain = LocalSteps(**common)
    _, ours = sam.local(sam.init(start), step)
    _, theirs = plain.local(plain.init(start), step)
    assert torch.equal(ours.vector, theirs.vector)
    _, other = SharpnessAware(rho=0.1, **common).local(sam.init(start), step)
    assert not torch.equal(other.vector, theirs.vector)
    assert torch.equal(other.vector[2], start[2])  # a peer without samples takes no step


def test_rows_do_not_influence_each_other(task: Digits) -> None:
    start = task.init(keyed.key_of(0, "init")).expand(4, -1).clone()
    sam = SharpnessAware(rho=0.1, steps=2, batch_size=4)
    step = step_of(task)
    _, base = sam.local(sam.init(start), step)
    start[0] += 1.0
    _, moved = sam.local(sam.init(start), step)
    torch.testing.assert_close(moved.vector[1:], base.vector[1:])
    assert not torch.allclose(moved.vector[0], base.vector[0])


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match=r"rho=-0.1; need a finite radius"):
        SharpnessAware(rho=-0.1)
    with pytest.raises(UsageError, match="give one of them"):
        SharpnessAware(steps=2, epochs=1)
    with pytest.raises(UsageError, match="radius=0"):
        Flatness(radius=0)


def test_top_eigenvalue_of_a_known_spectrum() -> None:
    basis = torch.linalg.qr(
        torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    matrix = basis @ torch.diag(torch.tensor([-5.0, 2.0, 1.0, 0.5, 0.1, 3.0]).double()) @ basis.T
    found = top_eigenvalue(lambda x: matrix @ x, torch.ones(6, dtype=torch.float64), 60)
    assert math.isclose(found, -5.0, rel_tol=1e-4)


def test_flatness_pools_the_samples_of_all_peers(task: Digits) -> None:
    params = task.init(keyed.key_of(0, "init")).double()
    found = Flatness()(task, params)
    owned = torch.cat([task.shard(p).index[: int(task.shard(p).size)] for p in range(4)])
    batch = Batch(task.x[owned], task.y[owned], torch.ones(len(owned), dtype=torch.bool))
    gradient = task.grad(params, batch)
    loss = float(task.loss(params, batch))
    above = float(task.loss(params + 0.05 * gradient / gradient.norm(), batch))
    assert found["sharpness"] == pytest.approx(above - loss, abs=1e-9)
    test_loss = float(task.evaluate(params)["loss"])
    assert found["generalisation_gap"] == pytest.approx(test_loss - loss, abs=1e-9)
    # For a small step the increase is |g| r + r^2 H / 2: the first order alone is close.
    small = Flatness(radius=1e-4)(task, params)["sharpness"]
    assert small == pytest.approx(1e-4 * float(gradient.norm()), rel=1e-2)
