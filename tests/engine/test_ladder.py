"""Every engine does the same with rounds: a quadratic problem under faults, losses and attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from shoal.parts import find, names
from shoal.parts.attack.base import clean_data
from shoal.rounds.method import Method
from shoal.rounds.strategy import Parcel
from shoal.rounds.task import Shard
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.testing.ladder import check_strategy
from shoal.world.device import Device
from shoal.world.faults import Crash, Hold, Join, Leave, Loss, Partition, Round, Slow
from shoal.world.links import Links
from shoal.world.network import Network

DIM = 5
PEERS = 12
LINKS = Links(
    latency_s=0.05, latency_spread=0.3, jitter_s=0.01, loss=0.05, uplink_bytes_per_s=1e5,
    downlink_bytes_per_s=2e5, seed=1,
)  # fmt: skip


class Quadratic:
    """Every peer has a centre of its own; float64, so that rounding cannot hide a difference."""

    peers = PEERS

    def __init__(self, seed: int = 0) -> None:
        self.spec = FlatSpec(("w",), ((DIM,),))
        key = keyed.key_of(seed, "centres")
        self.centres = keyed.normal(key, torch.arange(PEERS * DIM), dtype=torch.float64).reshape(
            PEERS, DIM
        )

    def init(self, key):
        return torch.zeros(*key.shape, DIM, dtype=torch.float64)

    def shard(self, peer):
        index = torch.as_tensor(peer)
        return Shard(index.unsqueeze(-1), torch.ones_like(index))


@dataclass(frozen=True)
class State:
    x: torch.Tensor


@dataclass(frozen=True)
class Noisy:
    """A noisy step, own weights when asked, and an extra that must be averaged too."""

    weighted: bool = False

    def init(self, params):
        return State(params)

    def local(self, state, step):
        peer = step.shard.index.squeeze(-1)
        noise = keyed.normal(
            keyed.fold(step.key, "noise").unsqueeze(-1), torch.arange(DIM), dtype=torch.float64
        )
        x = state.x - 0.3 * (state.x - step.task.centres[peer] + 0.1 * noise)
        weight = 1.0 + (peer % 3) if self.weighted else None
        return State(x), Parcel(x, weight, {"pair": 2.0 * x[..., :2]})

    def apply(self, state, heard, step):
        return State(heard.vector + 0.01 * heard.extra["pair"].sum(-1, keepdim=True))

    def params(self, state):
        return state.x


def regular(**settings):
    graph = find("topology", "random_regular")(PEERS, degree=4, seed=1)
    return find("exchange", "gossip")(graph, **settings)


def star(**settings):
    return find("exchange", "star")(PEERS, **settings)


def climb(exchange, *, faults=(), links=LINKS, rounds=10, live=False, **settings):
    task = Quadratic()
    strategy = Noisy(weighted=settings.pop("weighted", False))
    transform = settings.pop("transform", find("transform", "identity")()).bind(task.spec)
    rule = settings.pop("aggregator", find("aggregate", "mean")())
    method = Method(strategy, task, exchange, rule, transform, rounds, 3.0, seed=3, **settings)
    device = Device(flops_per_s=1e2, spread=0.3, overhead_s=0.05)
    return check_strategy(
        method, Network(PEERS, links=links, device=device, faults=faults), live=live
    )


EXCHANGES = {
    "gossip": lambda: regular(),
    "two hops": lambda: regular(steps=2),
    "star": lambda: star(),
    "sampled star": lambda: star(sample=5),
    "hub without data": lambda: star(hub=2, hub_works=False),
    "isolated": lambda: find("exchange", "isolated")(PEERS),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_agree(name, weighted):
    run = climb(EXCHANGES[name](), weighted=weighted)
    assert run.finished


FAULTS = {
    "crash": (Crash(who=(1, 2), at=7.3),),
    "crash at a round": (
        Crash(who=(1, 2), at=Round(4)),
        Slow(who=(3,), at=5.0, until=9.0, factor=3),
    ),
    "restart": (Crash(who=(1, 2), at=7.3, until=13.0),),
    "restart without store": (Crash(who=(1, 2), at=7.3, until=13.0, store="lost"),),
    "two crashes at once": (
        Crash(who=(1,), at=7.3, until=13.0),
        Crash(who=(1,), at=9.0, until=16.1),
    ),
    "restart at a round": (Crash(who=(5,), at=Round(4), until=Round(6)),),
    "join and leave": (Join(who=(4,), at=6.1), Leave(who=(7,), at=14.2, grace_s=0.5)),
    "join at a round": (Join(who=(4, 5), at=Round(3)),),
    "cut links": (
        Partition(who=(0, 1, 2, 3), at=Round(2), until=Round(5)),
        Loss(who=(9,), at=3.0, until=20.0, probability=0.5),
        Hold(who=(6,), at=4.0, until=7.9),
    ),
    "one way": (Partition(who=(0, 1), at=3.0, until=12.0, one_way=True),),
    "hub": (Crash(who=(0,), at=15.0),),
    "who comes first dies of it": (Crash(who=(4, 11), at=Round(7)), Crash(who=(0,), at=Round(8))),
    "never starts": (Crash(who=(6,), at=Round(0)), Join(who=(6,), at=18.4)),
    "joins while down": (Crash(who=(8,), at=4.1, until=13.0), Join(who=(8,), at=6.0)),
    "leaves while down": (Crash(who=(8,), at=4.1, until=13.0), Leave(who=(8,), at=6.0)),
    "hub restarts": (Crash(who=(0, 3), at=12.5, until=19.0),),
}


@pytest.mark.parametrize("checkpoint", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_mean_the_same(name, checkpoint):
    links = replace(LINKS, jitter_s=0.0)
    climb(regular(), faults=FAULTS[name], links=links, checkpoint_every=checkpoint)
    climb(star(), faults=FAULTS[name], links=links, checkpoint_every=checkpoint)


def of_vectors(name: str) -> bool:
    """Whether it leaves data alone: a quadratic has no labels, the catalogue climbs with others."""
    cls = find("attack", name)
    attack = cls(**cls.examples[0])
    return type(getattr(attack, "attack", attack)).poison is clean_data


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "nna"])
@pytest.mark.parametrize("attack", list(filter(of_vectors, names("attack"))))
def test_attacks_agree(attack, rule):
    cls, robust = find("attack", attack), find("aggregate", rule)
    climb(
        regular(weighted=False), rounds=5, attack=cls(**cls.examples[0]), byzantine=(2, 7),
        aggregator=robust(**robust.examples[0]),
    )  # fmt: skip


@pytest.mark.parametrize("name", names("transform"))
def test_transforms_agree(name):
    cls = find("transform", name)
    climb(regular(), rounds=4, transform=cls(**cls.examples[0]))


@pytest.mark.live
@pytest.mark.parametrize("name", ["gossip", "two hops", "star", "sampled star"])
def test_live_agrees_bit_for_bit(name):
    climb(EXCHANGES[name](), links=Links(latency_s=0.01), rounds=4, live=True)
