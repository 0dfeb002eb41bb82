"""RQM as a system: matched settings, sums in place of messages, bytes of the codes."""

from __future__ import annotations

import pytest
import torch

import shoal
from shoal.lab.launch import launch
from shoal.parts.exchange.star import Star
from shoal.parts.privacy.accountant import gaussian_renyi
from shoal.parts.privacy.modular_sum import ModularSum
from shoal.parts.strategy.local_updates import LocalUpdates
from shoal.parts.tasks.digits import Digits
from shoal.parts.transform.pbm import Pbm
from shoal.parts.transform.rqm import Rqm
from shoal.rounds.strategy import Step
from shoal.systems.privacy._rqm_measures import accountant
from shoal.systems.privacy.rqm import PAIRS, SYSTEM, _host
from shoal.tensor import keyed

TINY = shoal.Scenario(
    peers=7, rounds=3, task={"name": "digits", "hidden": [], "train_samples": 140},
    exchange={"name": "star", "hub_works": False, "sample": 4},
    links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def spent(arm: str) -> float:
    """Order 2, sums of 40."""
    card = SYSTEM.arms[arm]
    if card.system is None:
        return accountant(Rqm(**card.set), 40).renyi(2.0)
    settings = dict(card.scenario["transform"])
    name = settings.pop("name")
    if name == "pbm":
        return accountant(Pbm(**settings), 40).renyi(2.0)
    return gaussian_renyi(2.0, clip=1.5, noise=settings["noise"], clients=40)


def test_arms_that_are_compared_spend_the_same() -> None:
    for ours, theirs in (*PAIRS, ("rqm", "gauss")):
        assert spent(ours) == pytest.approx(spent(theirs), rel=3e-3)
    for points in SYSTEM.plots[0].lines.values():
        for divergence, arm in points:
            assert spent(arm) == pytest.approx(divergence, rel=3e-3)


def test_the_hub_needs_no_more_than_the_masked_sum() -> None:
    """A round by hand through masks gives the step that the run takes."""
    run = launch(
        LocalUpdates(**_host(2.0)),
        TINY.with_settings({"rounds": 1, "transform": {"name": "rqm", "clients": 4}}),
        seed=5,
    )
    task = Digits(peers=7, seed=5, hidden=(), train_samples=140)
    exchange = Star(7, sample=4, hub_works=False)
    clients = exchange.active(0, 5).nonzero().flatten()
    assert len(clients) == 4
    keys = keyed.fold(keyed.key_of(5, "peer"), clients, "round", 0)
    initial = task.init(keyed.key_of(5, "init"))
    strategy = LocalUpdates(**_host(2.0))
    state = strategy.init(initial.expand(4, -1))
    step = Step(0, task, task.shard(clients), keys, torch.ones(4, dtype=torch.bool))
    codec = Rqm(clients=4)
    payload, _ = codec.encode(
        strategy.local(state, step)[1].vector, None, keyed.fold(keys, "encode", 0)
    )
    group = ModularSum(16, 4)
    total = group.total(group.masked(payload.codes, keyed.key_of(5, "secret")))
    expected = initial + 2.0 / 32.0 * codec.decode_sum(total, 4).float()
    torch.testing.assert_close(run.final[0], expected, rtol=1e-5, atol=1e-6)


def test_unequal_amounts_of_data_weigh_the_same() -> None:
    task = Digits(peers=3, split="sizes", hidden=(), train_samples=90)
    step = Step(
        0, task, task.shard(torch.arange(3)), torch.arange(3), torch.ones(3, dtype=torch.bool)
    )
    params = task.init(torch.tensor(1)).expand(3, -1)
    for by_samples in (True, False):
        strategy = LocalUpdates(steps=1, by_samples=by_samples)
        weight = strategy.local(strategy.init(params), step)[1].weight
        assert (weight is not None) == by_samples


def test_bytes_are_those_of_the_codes() -> None:
    """Per message: a byte of flags and 650 codes; the frame around it is the same for all."""
    sent = {}
    for name, transform in {
        "dense": {"name": "identity"}, "alone": {"name": "rqm"},
        "summed": {"name": "rqm", "clients": 40}, "pbm": {"name": "pbm", "clients": 40},
    }.items():  # fmt: skip
        world = TINY.with_settings({"transform": transform})
        sent[name] = launch(LocalUpdates(by_samples=False), world, seed=1).bytes_by_kind["Update"]
    messages = 4 * 3
    padded = {
        name: -(-size // 8) * 8
        for name, size in {
            "dense": 2600,
            "alone": 1 + 325,
            "summed": 1 + 813,
            "pbm": 1 + 813,
        }.items()
    }
    for name, size in sent.items():
        assert sent["dense"] - size == messages * (padded["dense"] - padded[name])


def test_learning_goes_on_under_all_mechanisms() -> None:
    world = TINY.with_settings({"rounds": 30, "eval_every": 30, "exchange.sample": 6})
    for transform in ({"name": "rqm"}, {"name": "pbm"}, {"name": "clip_entries", "noise": 0.68}):
        run = launch(
            LocalUpdates(**_host(1.0)), world.with_settings({"transform": transform}), seed=1
        )
        assert run.series("mean_model_accuracy")[-1].value > 0.6
