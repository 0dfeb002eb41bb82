"""Quadratic functions: gradients, curvature and the common minimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.tasks.quadratics import Quadratics
from shoal.rounds.task import Batch
from shoal.tensor import keyed


@given(
    st.integers(1, 7), st.integers(2, 8), st.floats(1.0, 1e4), st.sampled_from(["shared", "own"]),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_curvature_minimum_and_gradients(
    peers: int, dim: int, condition: float, axes: Any, seed: int
) -> None:
    task = Quadratics(peers=peers, dim=dim, condition=condition, axes=axes, seed=seed)
    values = torch.linalg.eigvalsh(task.matrices)
    torch.testing.assert_close(values[:, 0], torch.full((peers,), 1.0 / condition).double())
    torch.testing.assert_close(values[:, -1], torch.ones(peers).double())
    assert task.curvature == (1.0 / condition, 1.0)
    if axes == "shared":
        assert (task.matrices == task.matrices[0]).all()
    every = torch.arange(peers)
    shard = task.shard(every)
    (whole,) = task.epoch(shard, keyed.key_of(0), 32)
    at = task.minimum.expand(peers, dim)
    assert float(task.grad(at, whole).mean(0).abs().max()) < 1e-10
    x = task.init(keyed.grid(keyed.key_of(seed), peers)).requires_grad_()
    (slopes,) = torch.autograd.grad(task.loss(x, whole).sum(), x)
    torch.testing.assert_close(task.grad(x.detach(), whole), slopes)
    for peer in range(peers):
        (own,) = task.epoch(task.shard(peer), keyed.key_of(0), 1)
        torch.testing.assert_close(task.grad(x[peer].detach(), own), slopes[peer])
    told = task.evaluate(x.detach())
    away = x.detach().unsqueeze(-2) - task.centres
    mean = 0.5 * torch.einsum("...pi,pij,...pj->...p", away, task.matrices, away).mean(-1)
    torch.testing.assert_close(told["loss"], mean - task.least)
    assert bool((told["loss"] >= -1e-9).all())
    gap = (x.detach() - task.minimum).square().sum(-1)
    torch.testing.assert_close(told["distance"], gap)


def test_noise_is_keyed_unbiased_and_of_its_size() -> None:
    task = Quadratics(peers=3, noise=0.3, axes="own")
    shard = task.shard(torch.arange(3))
    batch = task.batch(shard, keyed.grid(keyed.key_of(1), 3), 20_000)
    away = batch.x - task.centres.unsqueeze(1)
    assert away.mean().abs() < 0.005
    assert float(away.std()) == pytest.approx(0.3, rel=0.02)
    again = task.batch(task.shard(1), keyed.grid(keyed.key_of(1), 3)[1], 20_000)
    assert torch.equal(batch.x[1], again.x)
    x = task.init(keyed.key_of(2))
    (exact,) = task.epoch(shard, keyed.key_of(0), 1)
    apart = task.grad(x, batch) - task.grad(x, exact)
    assert float(apart.abs().max()) < 0.02


def test_clipped_sums_bound_each_sample() -> None:
    task = Quadratics(peers=2, noise=1.0)
    batch = task.batch(task.shard(0), keyed.key_of(3), 50)
    x = task.init(keyed.key_of(4))
    total = task.clipped_grad_sum(x, batch, 0.1)
    assert float(total.norm()) <= 50 * 0.1 + 1e-12
    torch.testing.assert_close(task.clipped_grad_sum(x, batch, 1e9), 50 * task.grad(x, batch))
    with pytest.raises(UsageError, match="clip=0"):
        task.clipped_grad_sum(x, batch, 0)
    step = task.descended(x, batch, 0.5)
    torch.testing.assert_close(step, x - 0.5 * task.grad(x, batch))
    samples, mask = batch.x.clone(), batch.mask.clone()
    samples[7, 0], mask[7] = torch.inf, False
    broken = task.clipped_grad_sum(x, Batch(samples, batch.y, batch.mask), 0.1)
    without = task.clipped_grad_sum(x, Batch(batch.x, batch.y, mask), 0.1)
    torch.testing.assert_close(broken, without)


def test_joined_tasks_keep_their_functions() -> None:
    tasks = [Quadratics(peers=2, seed=seed) for seed in (0, 1)]
    joined = tasks[0].joined(tasks)
    assert joined.peers == 4
    x = torch.ones(6, dtype=torch.float64)
    for peer in range(4):
        one = tasks[peer // 2]
        (mine,) = one.epoch(one.shard(peer % 2), keyed.key_of(0), 1)
        (theirs,) = joined.epoch(joined.shard(peer), keyed.key_of(0), 1)
        assert torch.equal(one.grad(x, mine), joined.grad(x, theirs))
    with pytest.raises(UsageError, match="no common minimum"):
        joined.evaluate(x)
    with pytest.raises(UsageError, match="equal `dim`"):
        tasks[0].joined([tasks[0], Quadratics(peers=2, dim=3)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peers": 0}, "peers=0"),
        ({"peers": 2, "dim": 0}, "dim=0"),
        ({"peers": 2, "condition": 0.5}, "condition=0.5"),
        ({"peers": 2, "dim": 1}, "in 1 dimensions"),
        ({"peers": 2, "axes": "mine"}, "axes='mine'"),
        ({"peers": 2, "noise": -1.0}, "noise=-1.0"),
    ],
)
def test_quadratics_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Quadratics(**settings)
