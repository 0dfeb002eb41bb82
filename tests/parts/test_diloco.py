"""DiLoCo against torch's optimisers, its special case, and on every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.engine.event import simulate
from shoal.engine.lockstep import run_lockstep
from shoal.parts import find
from shoal.parts.aggregate.mean import Mean
from shoal.parts.strategy.diloco import DiLoCo
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.tasks.digits import Digits
from shoal.rounds.adapter import Rounds
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Step
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy, difference
from shoal.world.device import Device
from shoal.world.faults import Crash, Loss
from shoal.world.links import Links
from shoal.world.network import Network

PEERS = 5


def full(**settings):
    return find("exchange", "gossip")(find("topology", "full")(PEERS), **settings)


def star(**settings):
    return find("exchange", "star")(PEERS, **settings)


def sparse():
    return find("exchange", "gossip")(find("topology", "ring")(PEERS))


def method_of(strategy, exchange=None, rounds=4, transform="identity", **settings) -> Method:
    task = Digits(peers=PEERS, hidden=(8,), split="dirichlet", alpha=0.5)
    codec = find("transform", transform)().bind(task.spec)
    return Method(
        strategy, task, exchange or full(), Mean(), codec, rounds, 5.0, seed=3, **settings
    )


def network(*faults) -> Network:
    return Network(PEERS, links=Links(latency_s=0.02), device=Device(flops_per_s=1e8),
                   faults=faults)  # fmt: skip


def torch_diloco(method: Method, strategy: DiLoCo) -> torch.Tensor:
    """The outer parameters after all rounds, by torch's AdamW and SGD, on the same batches."""
    outer = torch.nn.Parameter(method.initial.clone())
    inners = [torch.nn.Parameter(outer.detach().clone()) for _ in range(PEERS)]
    adams = [
        torch.optim.AdamW([p], lr=strategy.lr, weight_decay=strategy.weight_decay) for p in inners
    ]
    sgd = torch.optim.SGD([outer], strategy.outer_lr, momentum=strategy.outer_momentum,
                          nesterov=True)  # fmt: skip
    for round in range(method.rounds):
        for peer, (inner, adam) in enumerate(zip(inners, adams, strict=True)):
            inner.data.copy_(outer.data)
            for i in range(strategy.steps):
                key = keyed.fold(method.keys(round)[peer], i)
                batch = method.task.batch(method.shard(peer), key, strategy.batch_size)
                inner.grad = method.task.grad(inner.detach(), batch)
                adam.step()
        outer.grad = torch.stack([outer.detach() - inner.detach() for inner in inners]).mean(0)
        sgd.step()
    return outer.detach()


@pytest.mark.parametrize("send", ["params", "update"])
@pytest.mark.parametrize("exchange", [full, star], ids=["full", "star"])
def test_is_torchs_adamw_inside_torchs_nesterov(send: str, exchange) -> None:
    strategy = DiLoCo(lr=0.01, steps=3, batch_size=8, send=send)
    method = method_of(strategy, exchange())
    run = run_lockstep([method], [network()])[0]
    # Under a hub the clients' last parameters are those that the last round began with.
    at = method.exchange.hub or 0
    torch.testing.assert_close(run.final[at], torch_diloco(method, strategy), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("exchange", [full, star, sparse], ids=["full", "star", "ring"])
def test_one_plain_step_is_plain_averaging(exchange) -> None:
    diloco = DiLoCo(
        lr=0.2, steps=1, batch_size=8, weight_decay=0.0, inner="sgd", outer_lr=1.0,
        outer_momentum=0.0,
    )  # fmt: skip
    plain = LocalSteps(lr=0.2, steps=1, batch_size=8)
    runs = [run_lockstep([method_of(s, exchange())], [network()])[0] for s in (diloco, plain)]
    for peer, final in runs[0].final.items():
        torch.testing.assert_close(final, runs[1].final[peer], rtol=1e-4, atol=1e-6)


def test_the_inner_optimisers_state_stays_and_the_outer_one_is_shared() -> None:
    strategy = DiLoCo(steps=2, batch_size=4)
    method = method_of(strategy)
    keys = torch.stack(method.keys(0))
    peers = torch.arange(PEERS)
    step = Step(0, method.task, method.task.shard(peers), keys, torch.ones(PEERS).bool())
    state = strategy.init(method.initial.expand(PEERS, -1).clone())
    state, parcel = strategy.local(state, step)
    assert state.inner.count.tolist() == [2.0] * PEERS
    assert not torch.equal(state.inner.mean[0], state.inner.mean[1])
    mean = parcel.vector.mean(0).expand(PEERS, -1)
    after = strategy.apply(state, Heard(mean, torch.full((PEERS,), PEERS)), step)
    assert after.inner is state.inner
    assert torch.equal(after.outer.velocity[0], after.outer.velocity[-1])
    adopted = strategy.adopt(after, torch.zeros_like(after.params), step)
    assert adopted.inner is state.inner
    assert (adopted.params == 0).all()


@pytest.mark.parametrize("send", ["params", "update"])
def test_nobody_heard_is_no_pseudo_gradient(send: str) -> None:
    strategy = DiLoCo(send=send)
    method = method_of(strategy)
    state = strategy.init(torch.ones(2, 3))
    heard = Heard(torch.full((2, 3), 0.5), torch.tensor([0, 2]))
    after = strategy.apply(state, heard, Step(0, method.task, method.shard(0), None, None))
    assert after.params[0].tolist() == [1.0] * 3
    assert (after.outer.velocity[0] == 0).all()
    assert (after.params[1] != 1.0).all()


def test_parameters_bring_a_late_peer_back_and_updates_do_not() -> None:
    """A peer that was away for three rounds and starts anew from nothing."""
    apart = {}
    for send in ("params", "update"):
        strategy = DiLoCo(lr=0.01, steps=2, batch_size=8, send=send)
        # Rounds hardly longer than what they take: the schedule does not run away from the peer.
        method = replace(method_of(strategy, rounds=40), round_s=0.1)
        away = Crash(who=(2,), at=0.21, until=0.55)
        run = simulate(Rounds.of(method), network(away), seed=method.seed)
        gap = (run.final[2] - run.final[0]).norm() / (run.final[0] - method.initial).norm()
        apart[send] = float(gap)
    assert apart["params"] < 1e-3
    assert apart["update"] > 0.2


@pytest.mark.parametrize("send", ["params", "update"])
@pytest.mark.parametrize("exchange", [full, star, sparse], ids=["full", "star", "ring"])
def test_engines_agree(exchange, send: str) -> None:
    strategy = DiLoCo(steps=2, batch_size=4, send=send)
    check_strategy(method_of(strategy, exchange(), transform="quantise"), network())
    check_strategy(method_of(strategy, star(hub=2, hub_works=False), rounds=3), network())


def test_engines_agree_under_faults() -> None:
    faults = (Crash(who=(2,), at=7.3, until=13.0), Loss(who=(1,), at=2.0, probability=0.4))
    method = method_of(DiLoCo(steps=2, batch_size=4), full(), rounds=5, checkpoint_every=1)
    check_strategy(method, network(*faults))


@pytest.mark.live
@pytest.mark.parametrize("exchange", [full, star], ids=["full", "star"])
def test_live_agrees_bit_for_bit(exchange) -> None:
    method = method_of(DiLoCo(steps=2, batch_size=4), exchange(), rounds=3)
    world = Network(PEERS, links=Links(latency_s=0.01))
    check_strategy(method, world, live=True)


def test_seeds_run_together() -> None:
    one, two = (method_of(DiLoCo(steps=2, batch_size=4)) for _ in range(2))
    methods = [one, replace(two, seed=9)]
    stacked = run_lockstep(methods, [network()] * 2)
    for method, run in zip(methods, stacked, strict=True):
        alone = run_lockstep([method], [network()])[0]
        assert difference(run, alone) < 1e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps=0"), ({"inner": "adam"}, "inner='adam'"),
        ({"send": "model"}, "send='model'"), ({"outer_momentum": 1.0}, "momentum=1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DiLoCo(**settings)
