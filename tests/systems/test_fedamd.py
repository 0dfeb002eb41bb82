"""FedAMD: anchors, miners and the mean gradient, against closed forms and on the ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.rounds.strategy import Step
from shoal.systems.training.fedamd import AnchorSampling, State
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network

PEERS = 6


class Run:
    """Clients and their hub, moved by hand; everybody takes part in every round."""

    def __init__(self, strategy: AnchorSampling, task: Any, seed: int = 0) -> None:
        self.strategy, self.task = strategy, task
        self.hub = strategy.init(task.init(keyed.key_of(seed)))
        start = self.hub.params.expand(task.peers, -1)
        self.clients = strategy.init(start)
        self.round = 0

    def step(self, key: int = 5) -> Step:
        peers = self.task.peers
        keys = keyed.fold(keyed.grid(keyed.key_of(key), peers), self.round)
        given = {k: v.expand(peers, -1) for k, v in self.strategy.down(self.hub).items()}
        shards = self.task.shard(torch.arange(peers))
        return Step(
            self.round, self.task, shards, keys, torch.ones(peers).bool(), given=given, peers=peers
        )

    def advance(self) -> tuple[Any, torch.Tensor]:
        """(what was sent, who was an anchor)."""
        step = self.step()
        received = self.hub.params.expand(self.task.peers, -1)
        self.clients = self.strategy.adopt(self.clients, received, step)
        self.clients, parcel = self.strategy.local(self.clients, step)
        anchors = parcel.extra["anchor"] > 0
        mask = torch.ones(self.task.peers, dtype=torch.bool)
        share = torch.full((self.task.peers,), 1.0 / self.task.peers).double()
        heard = self.strategy.combine(
            self.hub, parcel.vector, mask, share, dict(parcel.extra), step
        )
        self.hub = self.strategy.apply(self.hub, heard, step)
        self.round += 1
        return parcel, anchors


def digits(**more: Any) -> Digits:
    return Digits(peers=PEERS, hidden=(8,), split="classes", classes_per_peer=1, **more)


def full_gradient(task: Digits, params: torch.Tensor, peer: int) -> torch.Tensor:
    shard = task.shard(peer)
    batch = next(iter(task.epoch(shard, keyed.key_of(9), int(shard.size))))
    return task.grad(params, batch)


@given(st.integers(0, 40))
@settings(max_examples=10, deadline=None)
def test_one_step_of_a_miner_is_along_the_mean(seed: int) -> None:
    run = Run(AnchorSampling(steps=1, lr=0.2, anchor=0.5), digits(), seed)
    run.advance()
    for _ in range(3):
        mean = run.hub.mean.clone()
        parcel, anchors = run.advance()
        for peer in (~anchors).nonzero().flatten():
            torch.testing.assert_close(parcel.vector[peer], 0.2 * mean, rtol=1e-4, atol=1e-6)


def test_all_anchors_then_all_miners_is_gradient_descent_at_half_speed() -> None:
    task = digits()
    run = Run(AnchorSampling(steps=1, lr=0.3, period=2), task)
    params = run.hub.params.clone()
    for _ in range(3):
        run.advance()
        torch.testing.assert_close(run.hub.params, params)
        run.advance()
        gradients = [full_gradient(task, params, peer) for peer in range(PEERS)]
        params = params - 0.3 * torch.stack(gradients).mean(0)
        torch.testing.assert_close(run.hub.params, params, rtol=1e-4, atol=1e-6)


def test_with_equal_clients_a_fresh_mean_and_all_data_miners_descend_exactly() -> None:
    """The differences telescope: the direction is the gradient at each step's own point."""
    whole = find("tasks", "digits")(peers=1, hidden=(8,), train_samples=60)

    class All:
        """Batches are all data, whatever the key."""

        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def batch(self, shard: Any, key: Any, size: int) -> Any:
            return next(iter(whole.epoch(shard, torch.zeros_like(key), 10_000)))

    run = Run(AnchorSampling(steps=5, lr=0.2, period=2), All())
    run.advance()
    params = run.hub.params.clone()
    run.advance()
    for _ in range(5):
        params = params - 0.2 * full_gradient(whole, params, 0)
    torch.testing.assert_close(run.hub.params, params, rtol=1e-4, atol=1e-6)


@given(st.floats(0.0, 1.0), st.integers(0, 40))
@settings(max_examples=15, deadline=None)
def test_the_hubs_mean_is_that_of_the_clients_gradients(anchor: float, seed: int) -> None:
    run = Run(AnchorSampling(steps=2, anchor=anchor, batch_size=4), digits(), seed)
    for _ in range(5):
        params, mean = run.hub.params.clone(), run.hub.mean.clone()
        _, anchors = run.advance()
        torch.testing.assert_close(run.hub.mean, run.clients.own.mean(0), rtol=1e-4, atol=1e-6)
        if anchors.all():
            assert torch.equal(run.hub.params, params), "no miner, so the model stays"
        if not anchors.any():
            torch.testing.assert_close(run.hub.mean, mean, rtol=1e-6, atol=1e-7)


def test_anchors_of_a_round_serve_from_the_next_one_on() -> None:
    run = Run(AnchorSampling(anchor=0.5, first_pass=False, steps=1, lr=1.0), digits())
    parcel, anchors = run.advance()
    assert anchors.any()
    assert not anchors.all()
    assert float(parcel.vector[~anchors].abs().max()) == 0.0, "the mean was still zero"


def test_a_broken_message_is_no_part_of_anything() -> None:
    strategy = AnchorSampling()
    rows = torch.tensor([[1.0, 1.0], [float("nan"), 0.0], [3.0, 5.0], [8.0, 8.0]])
    extra = {"anchor": torch.tensor([0, 0, 1, 1], dtype=torch.uint8)}
    mask = torch.tensor([True, True, True, False])
    state = strategy.init(torch.zeros(2))
    step = Step(1, digits(), digits().shard(0), keyed.key_of(0), mask[0], peers=10)
    heard = strategy.combine(state, rows, mask, mask.double() / 3, extra, step)
    assert heard.vector.tolist() == [1.0, 1.0]
    assert int(heard.count) == 1
    torch.testing.assert_close(heard.extra["mean"], torch.tensor([0.3, 0.5]))
    assert isinstance(strategy.apply(state, heard, step), State)


@pytest.mark.parametrize(
    "bad", [{"anchor": 1.2}, {"steps": 0}, {"large_batch": 4, "batch_size": 8}, {"period": -1}]
)
def test_wrong_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="AnchorSampling"):
        AnchorSampling(**bad)


@pytest.mark.parametrize("place", range(len(AnchorSampling.examples)))
def test_every_engine_does_the_same(place: int) -> None:
    task = digits(train_samples=120)
    exchange = find("exchange", "star")(PEERS, sample=4, whole_first=True)
    codec = find("transform", "identity")().bind(task.spec)
    method = Method(
        AnchorSampling(**AnchorSampling.examples[place]), task, exchange,
        find("aggregate", "mean")(), codec, 4, 5.0, seed=2,
    )  # fmt: skip
    world = Network(PEERS, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))
    check_strategy(method, world, live=place == 0)
