"""Bristle on the engines: no messages, refused ones, late peers, and who sends to whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.base.errors import UsageError
from shoal.lab.fuzz import target
from shoal.lab.launch import launch, method_of
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.tasks import task_of
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.quadratics import Quadratics
from shoal.parts.tasks.transfer_digits import TransferDigits
from shoal.rounds.strategy import Step
from shoal.systems.robust import _bristle_claims as claims
from shoal.systems.robust._bristle_strategy import Bristle, columns
from shoal.systems.robust.bristle import SYSTEM
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.testing.ladder import check_strategy

TINY = shoal.Scenario(
    peers=6, rounds=4, topology="full", exchange={"name": "gossip", "weighted": False},
    task={"name": "transfer_digits", "pretraining": 20, "classes_per_peer": 4},
    links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def world(**changes: Any) -> shoal.Scenario:
    return TINY.with_settings(changes)


def climb(strategy: Any = None, **changes: Any):
    method, network, *_ = method_of(strategy or Bristle(), world(**changes), 2)
    return check_strategy(replace(method, round_s=4.0 * method.round_s), network)


def test_without_messages_it_is_local_sgd() -> None:
    runs = [
        launch(strategy, world(exchange="isolated"), seed=1)
        for strategy in (Bristle(lr=0.3), LocalSteps(lr=0.3, steps=1, batch_size=20))
    ]
    for peer in range(6):
        assert torch.equal(runs[0].final[peer], runs[1].final[peer])
    # All lost on the way is as good as none sent.
    lost = [{"kind": "loss", "fraction": 1.0, "at": 0.0, "probability": 1.0}]
    cut = launch(Bristle(lr=0.3), world(faults=lost), seed=1)
    for peer in range(6):
        assert torch.equal(runs[0].final[peer], cut.final[peer])


@pytest.mark.parametrize("classes", ["announced", "count"])
def test_engines_agree_with_few_classes_and_liars(classes: str) -> None:
    climb(Bristle(classes=classes, k=3), byzantine=2, attack={"name": "label_flip"})


@pytest.mark.parametrize("choice", ["random", "turns", "ring"])
def test_engines_agree_whoever_sends_to_whom(choice: str) -> None:
    run = climb(topology={"name": "one_target", "choice": choice}, rounds=5)
    assert run.messages_sent == 6 * 5


@pytest.mark.parametrize(
    "faults",
    [
        [{"kind": "join", "count": 2, "at": {"round": 2}}],
        [{"kind": "loss", "fraction": 1.0, "at": 0.0, "probability": 0.3}],
        [{"kind": "crash", "fraction": 0.3, "at": {"round": 1}}],
    ],
)
def test_engines_agree_under_faults(faults: list[dict[str, Any]]) -> None:
    climb(faults=faults)


def test_engines_agree_on_a_whole_network_and_on_several_waves() -> None:
    climb(task={"name": "digits", "hidden": [6], "own_tests": 10, "train_samples": 200})
    climb(exchange={"name": "gossip", "steps": 2})


def test_who_comes_late_catches_up() -> None:
    late = [{"kind": "join", "who": [1, 4], "at": {"round": 8}}]
    run = launch(Bristle(), world(faults=late, rounds=20, eval_every=20), seed=3)
    task = method_of(Bristle(), world(rounds=20), 3)[0].task
    accuracy = task.evaluate(torch.stack([run.final[peer] for peer in range(6)]))["accuracy"]
    on_time = accuracy[[0, 2, 3, 5]].mean()
    assert float(accuracy[[1, 4]].min()) > float(on_time) - 0.1
    alone = launch(Bristle(), world(exchange="isolated", rounds=20), seed=3)
    trained = task.evaluate(torch.stack([alone.final[peer] for peer in range(6)]))["accuracy"]
    # More than its own four classes: 0.4 is all that it could get by itself.
    assert float(trained.max()) < 0.42
    assert float(accuracy.min()) > 0.45


def prepared(task: Any, strategy: Bristle, count: int = 4):
    """(state, rows, mask, extra, step) of peer 0 that heard peers 1 to count - 1."""
    every = torch.arange(count)
    keys = keyed.grid(keyed.key_of(7), count)
    alive = torch.ones(count, dtype=torch.bool)
    _, parcel = strategy.local(
        strategy.init(task.init(keys)), Step(0, task, task.shard(every), keys, alive)
    )
    own = Step(0, task, task.shard(0), keys[0], alive[0])
    first = strategy.init(parcel.vector[0])
    return first, parcel.vector, alive, dict(parcel.extra), own


TASK = TransferDigits(peers=4, pretraining=20, classes_per_peer=5)


def test_models_on_other_features_are_refused() -> None:
    strategy = Bristle()
    state, rows, mask, extra, step = prepared(TASK, strategy)
    share = mask.double() / 4
    assert extra["features"].tolist() == [float(TASK.fingerprint)] * 4
    heard = strategy.combine(state, rows, mask, share, extra, step)
    assert not torch.equal(heard.vector, rows[0])
    assert strategy.report(strategy.apply(state, heard, step), step.task.spec)["refused"] == 0
    extra["features"][2] += 1
    without = mask.clone()
    without[2] = False
    fewer = strategy.combine(state, rows, without, share, extra, step)
    refusing = strategy.combine(state, rows, mask, share, extra, step)
    assert torch.equal(refusing.vector, fewer.vector)
    report = strategy.report(strategy.apply(state, refusing, step), step.task.spec)
    assert (int(report["refused"]), int(report["tested"])) == (1, 2)
    extra["features"][1:] += 1
    nobody = strategy.combine(state, rows, mask, share, extra, step)
    assert torch.equal(nobody.vector, rows[0])


def test_columns_of_unknown_classes_stay_where_nobody_is_trusted() -> None:
    strategy = Bristle()
    state, rows, mask, extra, step = prepared(TASK, strategy)
    # The own model is perfect on what it knows; the others say the same to everything.
    for _ in range(40):
        batch = TASK.batch(step.shard, step.key, 60)
        rows[0] = TASK.descended(rows[0], batch, 1.0)
    rows[1:] = 0.0
    heard = strategy.combine(state, rows, mask, mask.double() / 4, extra, step)
    assert torch.equal(heard.vector, rows[0])


def test_what_a_sender_knows_reaches_columns_that_the_receiver_cannot_test() -> None:
    """A peer that is as good on the shared classes hands on those that only it has."""
    strategy = Bristle()
    state, rows, mask, extra, step = prepared(TASK, strategy)
    column = columns(TASK.spec, 10)
    rows[1] = rows[0]
    unknown = torch.isin(column, (extra["classes"][0] == 0).nonzero().flatten())
    rows[1, unknown] += 0.01
    mask[2:] = False
    heard = strategy.combine(state, rows, mask, mask.double() / 2, extra, step)
    moved = heard.vector - rows[0]
    assert float(moved[~unknown].abs().max()) < 1e-6
    weight = moved[unknown] / 0.01
    torch.testing.assert_close(weight, weight[:1].expand_as(weight), rtol=1e-3, atol=1e-4)
    assert 0.0 <= float(weight[0]) <= 6 / 7


def test_a_task_must_have_classes_tests_and_a_linear_end() -> None:
    plain = Digits(peers=2, hidden=(4,))
    with pytest.raises(UsageError, match="set own_tests"):
        prepared(plain, Bristle(), 2)
    with pytest.raises(UsageError, match="Quadratics has no samples"):
        prepared(Quadratics(peers=2), Bristle(), 2)
    x, y = torch.zeros(4, 3), torch.zeros(4)
    shard = shoal.rounds.task.Shard(
        torch.arange(4).view(2, 2), torch.tensor([2, 2]), held=torch.zeros(2, 1).long()
    )
    regression = task_of(nn.Linear(3, 1), "mse", (x, y), (x, y), shard)
    with pytest.raises(UsageError, match="no `classes`"):
        prepared(regression, Bristle(), 2)
    with pytest.raises(UsageError, match="ends in parameters of shapes"):
        columns(FlatSpec(("weight", "bias"), ((10, 3), (9,))), 10)
    with pytest.raises(UsageError, match="steps=0"):
        Bristle(steps=0)
    with pytest.raises(UsageError, match="alpha=-1"):
        Bristle(alpha=-1)


def test_a_user_s_own_network_and_data() -> None:
    """Any network with a linear end, any samples: three peers with two of three classes each."""
    key = keyed.key_of(4)
    y = torch.arange(90) % 3
    x = keyed.normal(keyed.grid(keyed.grid(key, 90), 5)) + 2.0 * nn.functional.one_hot(y, 5)
    index = torch.stack([torch.arange(60)[(y != peer)[:60]] for peer in range(3)])
    held = torch.stack([60 + torch.arange(30)[(y != peer)[60:]] for peer in range(3)])
    shard = shoal.rounds.task.Shard(index, torch.full((3,), 40), held=held)
    task = task_of(nn.Linear(5, 3), "cross_entropy", (x, y), (x[60:], y[60:]), shard)
    both = []
    for exchange in ("gossip", "isolated"):
        scenario = shoal.Scenario(
            peers=3, rounds=40, topology="full", exchange=exchange, task=task, eval_every=40
        )
        run = launch(Bristle(lr=0.2), scenario, seed=1)
        final = torch.stack([run.final[peer] for peer in range(3)])
        both.append(float(task.evaluate(final)["accuracy"].mean()))
    assert both[0] > both[1] + 0.1


@pytest.mark.slow
def test_fault_lists_break_nothing() -> None:
    found = target("bristle").explore(20)
    assert not found.failures


def test_every_arm_is_one_of_the_specification() -> None:
    arms = set(SYSTEM.arms)
    for rule in claims.BASELINES:
        for net in claims.RATES:
            for trouble in ("calm", *claims.IID) if net == "head" else claims.IID_WHOLE:
                assert f"{rule} {net} iid {trouble}" in arms
            for trouble in claims.FEW:
                assert f"{rule} {net} few {trouble}" in arms
