"""The field's reference methods against closed forms, and on the ladder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.lockstep import run_lockstep
from shoal.parts import find
from shoal.parts.strategy.adaptive_updates import AdaptiveUpdates
from shoal.parts.strategy.compressed_gossip import CompressedGossip
from shoal.parts.strategy.control_variates import ControlVariates
from shoal.parts.strategy.gradient_tracking import GradientTracking
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.parts.strategy.local_updates import LocalUpdates
from shoal.parts.strategy.proximal_steps import ProximalSteps
from shoal.parts.tasks.digits import Digits
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Step
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network

PEERS, DIM = 6, 3


class Bowls:
    """Peer i's loss is `curve_i / 2 |x - centre_i|^2`; batches hold the peer's number and no noise.

    The mean loss is least at the mean of centres, weighted by the curves; methods that take local
    steps and average have another fixed point when the curves differ.
    """

    peers = PEERS

    def __init__(self) -> None:
        self.spec = FlatSpec(("w",), ((DIM,),))
        key = keyed.key_of(7, "bowls")
        self.centre = keyed.normal(keyed.grid(keyed.grid(key, PEERS), DIM), dtype=torch.float64)
        self.curve = 0.5 + keyed.uniform(keyed.grid(keyed.fold(key, "curve"), PEERS)).double()
        self.x = self.centre

    @property
    def best(self) -> Tensor:
        return (self.curve.unsqueeze(-1) * self.centre).sum(0) / self.curve.sum()

    def init(self, key: Tensor) -> Tensor:
        return torch.zeros(*key.shape, DIM, dtype=torch.float64)

    def shard(self, peer: Any) -> Shard:
        index = torch.as_tensor(peer)
        return Shard(index.unsqueeze(-1), torch.ones_like(index))

    def batch(self, shard: Shard, key: Tensor, size: int) -> Batch:
        return Batch(shard.index, shard.index, torch.ones_like(shard.index, dtype=torch.bool))

    def epoch(self, shard: Shard, key: Tensor, size: int) -> Iterator[Batch]:
        yield self.batch(shard, key, size)

    def grad(self, params: Tensor, batch: Batch) -> Tensor:
        peer = batch.x.squeeze(-1)
        return self.curve[peer].unsqueeze(-1) * (params - self.centre[peer])

    def descended(
        self, params: Tensor, batch: Batch, rate: float, *, donate: bool = False
    ) -> Tensor:
        return params - rate * self.grad(params, batch)

    def walked(
        self, params: Tensor, batches: Batch, rate: float, drift: Tensor | None = None
    ) -> Tensor:
        for batch in map(Batch, batches.x, batches.y, batches.mask):
            grad = self.grad(params, batch)
            params = params - rate * (grad if drift is None else grad + drift)
        return params

    def evaluate(self, params: Tensor) -> dict[str, Tensor]:
        return {"loss": ((params - self.best) ** 2).sum(-1)}


def bowls() -> Any:
    """What the strategies use of a task."""
    return Bowls()


def method_of(
    strategy: Any, *, hub: bool, rounds: int, transform: Any = None, topology: str = "ring",
    **exchange: Any,
) -> Method:  # fmt: skip
    task = bowls()
    graph = find("topology", topology)(PEERS)
    way = find("exchange", "star")(PEERS, **exchange) if hub else find("exchange", "gossip")(graph)
    codec = (transform or find("transform", "identity")()).bind(task.spec)
    return Method(strategy, task, way, find("aggregate", "mean")(), codec, rounds, 3.0, seed=3)


def network() -> Network:
    return Network(
        PEERS, find("topology", "ring")(PEERS), Links(latency_s=0.05), Device(overhead_s=0.01)
    )


def final(method: Method) -> Tensor:
    run = run_lockstep([method], [network()])[0]
    return torch.stack([run.final[p] for p in range(PEERS)])


def away(params: Tensor) -> float:
    return float((params - bowls().best).norm(dim=-1).max())


def test_fedprox_without_a_pull_is_fedavg() -> None:
    plain = LocalSteps(lr=0.1, steps=4, by_samples=True)
    pulled = ProximalSteps(lr=0.1, steps=4, mu=0.0)
    rounds = {"hub": True, "rounds": 5}
    torch.testing.assert_close(
        final(method_of(pulled, **rounds)), final(method_of(plain, **rounds))
    )


@given(st.floats(0.01, 5.0), st.floats(0.05, 0.3))
@settings(max_examples=20, deadline=None)
def test_fedprox_ends_where_loss_and_pull_balance(mu: float, lr: float) -> None:
    """Many steps on curve/2 (w - c)^2 + mu/2 (w - s)^2 lead to (curve c + mu s) / (curve + mu)."""
    task = bowls()
    start = torch.ones(PEERS, DIM, dtype=torch.float64)
    # As many as leave e^-25 of the distance; long steps go to and fro.
    left = float((1.0 - lr * (task.curve + mu)).abs().max())
    steps = math.ceil(25.0 / -math.log(left))
    strategy = ProximalSteps(lr=lr, steps=steps, mu=mu)
    keys = keyed.grid(keyed.key_of(1), PEERS)
    step = Step(0, task, task.shard(torch.arange(PEERS)), keys, torch.ones(PEERS).bool())
    _, parcel = strategy.local(strategy.init(start), step)
    curve = task.curve.unsqueeze(-1)
    expected = (curve * task.centre + mu * start) / (curve + mu)
    torch.testing.assert_close(parcel.vector, expected, rtol=1e-6, atol=1e-6)


def test_scaffold_reaches_the_optimum_that_fedavg_misses() -> None:
    averaged = final(method_of(LocalUpdates(lr=0.3, steps=8), hub=True, rounds=300))
    corrected = final(method_of(ControlVariates(lr=0.3, steps=8), hub=True, rounds=300))
    assert away(averaged[:1]) > 0.05
    assert away(corrected[:1]) < 1e-9


def test_the_hubs_variate_is_the_mean_of_the_clients() -> None:
    strategy, task = ControlVariates(lr=0.2, steps=3), bowls()
    everybody = torch.arange(PEERS)
    hub = strategy.init(task.init(keyed.key_of(0)))
    clients = strategy.init(task.init(keyed.grid(keyed.key_of(0), PEERS)))
    for round in range(12):
        keys = keyed.fold(keyed.grid(keyed.key_of(5), PEERS), round)
        step = Step(
            round, task, task.shard(everybody), keys, torch.ones(PEERS).bool(), peers=PEERS,
            given={k: v.expand(PEERS, -1) for k, v in strategy.down(hub).items()},
        )  # fmt: skip
        clients = strategy.adopt(clients, hub.params.expand(PEERS, -1), step)
        # Only some of them take part; the others keep what they had.
        on = torch.rand(PEERS, generator=torch.Generator().manual_seed(round)) < 0.6
        worked, parcel = strategy.local(clients, step)
        clients = type(clients)(
            *(torch.where(on.unsqueeze(-1), new, old) for new, old in
              zip(vars(worked).values(), vars(clients).values(), strict=True))
        )  # fmt: skip
        count = on.sum()
        if not count:
            continue
        share = on.double() / count
        hub = strategy.apply(
            hub, Heard(share @ parcel.vector, count, {"control": share @ parcel.extra["control"]}),
            step,
        )  # fmt: skip
        torch.testing.assert_close(hub.shared, clients.own.mean(0))


def test_fedadam_is_adam_without_bias_correction() -> None:
    strategy = AdaptiveUpdates(server_lr=0.1, beta1=0.8, beta2=0.9, tau=0.01)
    state = strategy.init(torch.zeros(2, dtype=torch.float64))
    m, v, x = torch.zeros(2).double(), torch.full((2,), 1e-4).double(), torch.zeros(2).double()
    step: Any = None
    d = torch.zeros(2)
    for round in range(5):
        d = torch.tensor([0.3, -0.1 * round], dtype=torch.float64)
        state = strategy.apply(state, Heard(d, torch.tensor(3)), step)
        m, v = 0.8 * m + 0.2 * d, 0.9 * v + 0.1 * d * d
        x = x + 0.1 * m / (v.sqrt() + 0.01)
        torch.testing.assert_close(state.params, x)
    after = strategy.apply(state, Heard(d, torch.tensor(0)), step)
    assert torch.equal(after.params, state.params), "nobody was heard"


def test_fedadagrad_is_torchs_adagrad() -> None:
    """With beta1 = 0, and torch's eps and initial accumulator at tau and tau^2."""
    strategy = AdaptiveUpdates(server_lr=0.1, beta1=0.0, tau=0.02, rule="adagrad")
    state = strategy.init(torch.ones(3, dtype=torch.float64))
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adagrad([x], lr=0.1, initial_accumulator_value=0.02**2, eps=0.02)
    for round in range(6):
        d = torch.linspace(-1, 1, 3).double() * (round + 1)
        x.grad = -d
        theirs.step()
        state = strategy.apply(state, Heard(d, torch.tensor(2)), None)  # type: ignore[arg-type]
        torch.testing.assert_close(state.params, x.detach())


def test_yogi_moves_the_second_moment_by_the_sign() -> None:
    strategy = AdaptiveUpdates(rule="yogi", beta2=0.9, tau=0.1)
    state = strategy.init(torch.zeros(2))
    state = strategy.apply(state, Heard(torch.tensor([1.0, 0.01]), torch.tensor(1)), None)  # type: ignore[arg-type]
    # v was 0.01; 1 is above it and pulls up by a tenth of itself, 0.0001 below it pulls down.
    torch.testing.assert_close(state.second, torch.tensor([0.11, 0.00999]))


def test_trackers_keep_the_mean_gradient_and_lead_to_the_optimum() -> None:
    strategy = GradientTracking(lr=0.2)
    tracked = final(method_of(strategy, hub=False, rounds=400))
    assert away(tracked) < 1e-9
    assert away(final(method_of(LocalSteps(lr=0.2), hub=False, rounds=400))) > 0.02


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_mean_tracker_is_the_mean_gradient(seed: int) -> None:
    strategy, task = GradientTracking(lr=0.1), bowls()
    mixing = find("topology", "ring")(PEERS).weights().to_dense()
    start = torch.randn(PEERS, DIM, generator=torch.Generator().manual_seed(seed)).double()
    state = strategy.init(start)
    for round in range(6):
        keys = keyed.fold(keyed.grid(keyed.key_of(seed), PEERS), round)
        step = Step(round, task, task.shard(torch.arange(PEERS)), keys, torch.ones(PEERS).bool())
        state, parcel = strategy.local(state, step)
        torch.testing.assert_close(state.tracker.mean(0), state.gradient.mean(0))
        state = strategy.apply(
            state,
            Heard(mixing @ parcel.vector, keys, {"tracker": mixing @ parcel.extra["tracker"]}),
            step,
        )


def test_choco_without_compression_is_dpsgd() -> None:
    plain = final(method_of(LocalSteps(lr=0.1), hub=False, rounds=6))
    public = final(method_of(CompressedGossip(lr=0.1, gamma=1.0), hub=False, rounds=6))
    torch.testing.assert_close(public, plain)


def test_choco_agrees_where_bare_compression_does_not() -> None:
    """A learning rate of almost nothing: what is left is gossip of differing models."""
    one = find("transform", "top_k")(fraction=0.3)
    strategy = CompressedGossip(lr=1e-12, gamma=0.3, start="zero")
    method = method_of(strategy, hub=False, rounds=400, transform=one)
    object.__setattr__(method, "independent", True)
    spread = torch.randn(PEERS, DIM, generator=torch.Generator().manual_seed(1)).double()
    method.task.init = lambda key: spread[_place(method, key)]  # type: ignore[method-assign]
    ended = final(method)
    torch.testing.assert_close(ended, spread.mean(0).expand(PEERS, -1), rtol=1e-5, atol=1e-5)


def _place(method: Method, key: Tensor) -> int:
    known = [int(keyed.key_of(method.seed, "init", p)) for p in range(PEERS)]
    return known.index(int(key)) if int(key) in known else 0


@pytest.mark.parametrize("strategy", [ControlVariates(), AdaptiveUpdates()])
def test_who_needs_a_hub_is_refused_without_one(strategy: Any) -> None:
    with pytest.raises(UsageError, match=r"needs a hub, and Gossip has none.*exchange = 'star'"):
        method_of(strategy, hub=False, rounds=1)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (ProximalSteps, {"mu": -1.0}), (ProximalSteps, {"mu": 30.0}),
        (ProximalSteps, {"steps": 1, "epochs": 1}), (AdaptiveUpdates, {"rule": "sgd"}),
        (AdaptiveUpdates, {"beta2": 1.0}), (AdaptiveUpdates, {"tau": 0.0}),
        (ControlVariates, {"steps": 0}), (ControlVariates, {"server_lr": 0.0}),
        (GradientTracking, {"lr": 0.0}), (CompressedGossip, {"gamma": 1.5}),
        (CompressedGossip, {"start": "random"}),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(kind: type, bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=kind.__name__):
        kind(**bad)


HUBS = (ControlVariates, AdaptiveUpdates, ProximalSteps)


@pytest.mark.parametrize(
    "kind", [*HUBS, GradientTracking, CompressedGossip], ids=lambda kind: kind.__name__
)
def test_every_engine_does_the_same(kind: Any) -> None:
    task = Digits(peers=PEERS, hidden=(8,), split="dirichlet", alpha=0.5)
    hub = kind in HUBS
    graph = find("topology", "ring")(PEERS)
    way = find("exchange", "star")(PEERS, sample=4) if hub else find("exchange", "gossip")(graph)
    transform = find("transform", "quantise")() if kind is CompressedGossip else None
    codec = (transform or find("transform", "identity")()).bind(task.spec)
    for place, chosen in enumerate(kind.examples):
        method = Method(
            kind(**chosen), task, way, find("aggregate", "mean")(), codec, 3, 5.0, seed=2
        )  # fmt: skip
        world = Network(PEERS, links=Links(latency_s=0.05), device=Device(flops_per_s=1e8))
        check_strategy(method, world, live=place == 0)
