"""Strategies of several systems against their written-out recursions, and on the ladder."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.engine.lockstep import run_lockstep
from shoal.parts import find
from shoal.parts.aggregate.mean import Mean
from shoal.parts.strategy.learn import Learn
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.strategy.local_updates import LocalUpdates
from shoal.parts.strategy.momentum_step import MomentumStep
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Step
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network

PEERS = 6


def digits(split: str = "iid", **settings) -> Digits:
    return Digits(peers=PEERS, hidden=(8,), split=split, **settings)


def step_of(task: Digits, round: int) -> Step:
    keys = keyed.fold(keyed.key_of(5), torch.arange(PEERS), "round", round)
    return Step(round, task, task.shard(torch.arange(PEERS)), keys, torch.ones(PEERS).bool())


def heard(vector: torch.Tensor) -> Heard:
    return Heard(vector, torch.full(vector.shape[:-1], PEERS))


def method_of(strategy, transform=None, exchange=None, rounds=3, task=None) -> Method:
    task = task or digits("dirichlet", alpha=0.5)
    transform = (transform or find("transform", "identity")()).bind(task.spec)
    exchange = exchange or find("exchange", "star")(PEERS)
    return Method(strategy, task, exchange, Mean(), transform, rounds, 5.0, seed=2)


def network() -> Network:
    return Network(PEERS, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_momentum_is_a_damped_mean_of_gradients(beta: float) -> None:
    task = digits()
    strategy = MomentumStep(lr=0.4, beta=beta, batch_size=3, weight_decay=0.01, half_life=2,
                            decay_every=2)  # fmt: skip
    params = task.init(keyed.key_of(0)).expand(PEERS, -1).clone()
    state, momentum = strategy.init(params), torch.zeros_like(params)
    for round in range(5):
        step = step_of(task, round)
        state, parcel = strategy.local(state, step)
        batch = task.batch(step.shard, keyed.fold(step.key, 0), 3)
        momentum = beta * momentum + (1 - beta) * (task.grad(params, batch) + 0.01 * params)
        params = params - 0.4 / (1 + round // 2 * 2 / 2) * momentum
        torch.testing.assert_close(parcel.vector, params, rtol=1e-5, atol=1e-6)
        params = params.mean(0).expand(PEERS, -1)
        state = strategy.apply(state, heard(params), step)
        torch.testing.assert_close(state.momentum, momentum, rtol=1e-5, atol=1e-6)


def test_momentum_with_the_mean_is_momentum_sgd_on_the_pooled_batch() -> None:
    task = digits()
    strategy = MomentumStep(lr=0.5, beta=0.9, batch_size=2, weight_decay=0.0)
    pooled = task.init(keyed.key_of(0))
    state = strategy.init(pooled.expand(PEERS, -1).clone())
    momentum = torch.zeros_like(pooled)
    rule = find("aggregate", "nna")(byzantine=0)
    for round in range(6):
        step = step_of(task, round)
        state, parcel = strategy.local(state, step)
        batch = task.batch(step.shard, keyed.fold(step.key, 0), 2)
        whole = type(batch)(batch.x.flatten(0, 1), batch.y.flatten(), batch.mask.flatten())
        momentum = 0.9 * momentum + 0.1 * task.grad(pooled, whole)
        pooled = pooled - strategy.rate(round) * momentum
        agreed = rule.everyone(parcel.vector, torch.ones(PEERS).bool())
        state = strategy.apply(state, heard(agreed), step)
        for own in state.params:
            torch.testing.assert_close(own, pooled, rtol=1e-4, atol=1e-6)


def test_a_peer_without_samples_takes_no_step() -> None:
    task = digits(holders=(0, 1))
    strategy = MomentumStep(lr=0.5, beta=0.9)
    params = task.init(keyed.key_of(0)).expand(PEERS, -1).clone()
    state, parcel = strategy.local(strategy.init(params), step_of(task, 0))
    moved = (parcel.vector != params).any(-1)
    assert moved.tolist() == [True, True] + [False] * (PEERS - 2)
    assert (state.momentum[2:] == 0).all()


def test_learn_with_the_mean_is_sgd_with_growing_batches() -> None:
    task = digits()
    strategy = Learn(lr=0.3, batch_growth=1.0, weight_decay=0.0, half_life=3, decay_every=3)
    params = task.init(keyed.key_of(0))
    state = strategy.init(params.expand(PEERS, -1).clone())
    for t in range(5):
        step = step_of(task, 2 * t)
        state, parcel = strategy.local(state, step)
        batch = task.batch(step.shard, keyed.fold(step.key, 0), t + 1)
        gradient = task.grad(params.expand(PEERS, -1), batch)
        torch.testing.assert_close(parcel.vector, gradient, rtol=1e-5, atol=1e-7)
        mean = gradient.mean(0)
        state = strategy.apply(state, heard(mean.expand(PEERS, -1)), step)
        params = params - 0.3 / (1 + t // 3) * mean
        step = step_of(task, 2 * t + 1)
        state, parcel = strategy.local(state, step)
        torch.testing.assert_close(parcel.vector[0], params, rtol=1e-5, atol=1e-6)
        state = strategy.apply(state, heard(parcel.vector), step)
    assert strategy.gradients(5) == 1 + 2 + 3 + 4 + 5


def test_updates_without_loss_are_federated_averaging() -> None:
    updates = LocalUpdates(lr=0.2, steps=3, batch_size=8)
    params = LocalSteps(lr=0.2, steps=3, batch_size=8, by_samples=True)
    runs = [run_lockstep([method_of(each)], [network()])[0] for each in (updates, params)]
    for peer, final in runs[0].final.items():
        torch.testing.assert_close(final, runs[1].final[peer], rtol=1e-4, atol=1e-5)
    assert not torch.equal(runs[0].final[0], runs[0].final[1])  # the hub has moved on


def test_updates_stay_where_they_are_when_nobody_is_heard() -> None:
    strategy = LocalUpdates()
    state = strategy.init(torch.ones(2, 3))
    after = strategy.apply(
        state, Heard(torch.full((2, 3), 5.0), torch.tensor([0, 2])), step=step_of(digits(), 0)
    )
    assert after.params.tolist() == [[1.0] * 3, [6.0] * 3]


@pytest.mark.parametrize(
    ("strategy", "exchange"),
    [
        (MomentumStep(lr=0.1, batch_size=4), "first_come"),
        (Learn(lr=0.1), "first_come"),
        (LocalUpdates(steps=2, batch_size=4), "star"),
    ],
)
def test_engines_agree(strategy, exchange: str) -> None:
    check_strategy(
        method_of(strategy, exchange=find("exchange", exchange)(PEERS)), network(), live=False
    )


@pytest.mark.parametrize("feedback", [False, True])
def test_engines_agree_on_updates_in_bytes(feedback: bool) -> None:
    settings = {"z": 0.1, "raw_entries": 4}
    transform = find("transform", "fedzip")(**settings)
    if feedback:
        transform = find("transform", "error_feedback")("fedzip", settings)
    check_strategy(method_of(LocalUpdates(steps=2, batch_size=4), transform), network())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MomentumStep(lr=0.0), "lr=0.0"),
        (lambda: MomentumStep(beta=1.0), "beta=1.0"),
        (lambda: MomentumStep(batch_size=0), "batch_size=0"),
        (lambda: MomentumStep(half_life=0), "half_life=0"),
        (lambda: Learn(batch_growth=-1.0), "batch_growth=-1.0"),
        (lambda: Learn(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: LocalUpdates(steps=0), "steps=0"),
        (lambda: LocalUpdates(server_lr=0.0), "server_lr=0.0"),
    ],
)
def test_bad_settings_say_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()
