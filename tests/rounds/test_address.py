"""What strategies tell single receivers, and who sent what: the same on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from round_methods import Bare, counting
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import simulate
from shoal.engine.lockstep import run_lockstep
from shoal.parts import find
from shoal.parts.attack.zero import Zero
from shoal.rounds.adapter import Rounds
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.testing.ladder import check_strategy, difference
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.network import Network


@dataclass(frozen=True)
class Whispering:
    """Peers tell each neighbour 100 * own number + the neighbour's, and keep what they heard.

    Parameters: the sum of (told + 1000 * source) over those heard, in each coordinate.
    """

    peers: int = 0

    def fitted(self, spec: Any, peers: int) -> Whispering:
        return replace(self, peers=peers)

    def init(self, params: Tensor) -> Tensor:
        return params

    def local(self, state: Tensor, step: Step) -> tuple[Tensor, Parcel]:
        return state, Parcel(state, None, {"hello": torch.ones_like(state[..., 0])})

    def address(self, state: Tensor, to: Tensor, step: Step) -> dict[str, Tensor]:
        assert step.own is not None
        own = step.own.unsqueeze(-1)
        told = torch.where(to >= 0, 100 * own + to, -1)
        return {"told": told, "pair": torch.stack((told, told + 1), -1).to(state.dtype)}

    def combine(
        self, state: Tensor, rows: Tensor, mask: Tensor, share: Tensor,
        extra: Mapping[str, Tensor], step: Step,
    ) -> Heard:  # fmt: skip
        source = extra["source"]
        assert bool((source[..., 0] == step.shard.index.squeeze(-1)).all())
        heard = mask[..., 1:]
        assert bool(((source[..., 1:] >= 0) == heard).all())
        told = extra["told"][..., 1:] + 1000 * source[..., 1:]
        assert bool((extra["pair"][..., 1:, 1] - extra["told"][..., 1:])[heard].eq(1).all())
        total = torch.where(heard, told, 0).sum(-1)
        hellos = torch.where(mask, extra["hello"], 0.0).sum(-1)
        vector = state + (total + hellos / 10).unsqueeze(-1)
        return Heard(vector, mask.sum(-1), {})

    def apply(self, state: Tensor, heard: Heard, step: Step) -> Tensor:
        return heard.vector

    def params(self, state: Tensor) -> Tensor:
        return state


class _Lying(Zero):
    def tells(self, said: Mapping[str, Tensor], state: Tensor) -> dict[str, Tensor]:
        assert said["told"].shape[:-1] == state.shape[:-1]
        return {name: value + 7 for name, value in said.items()}


def whispering(peers: int = 5, rounds: int = 2, **settings: Any) -> Method:
    made = counting(peers, rounds, **settings)
    graph = find("topology", "from_edges")(peers, ((0, 1), (1, 2), (2, 3), (3, 4), (1, 3)))
    return replace(made, strategy=Whispering(), exchange=find("exchange", "gossip")(graph))


def network(peers: int = 5, **settings: Any) -> Network:
    return Network(peers, links=Links(latency_s=0.05), **settings)


def once(method: Method) -> list[float]:
    """What each peer ends with after one round."""
    run = run_lockstep([replace(method, rounds=1)], [network()])[0]
    return [float(run.final[peer][0]) for peer in range(method.peers)]


def test_each_neighbour_is_told_its_own_and_knows_by_whom() -> None:
    method = whispering()
    expected = []
    for peer in range(5):
        near = method.exchange.topology.neighbors(peer)  # type: ignore[attr-defined]
        told = sum(100 * source + peer + 1000 * source for source in near)
        expected.append(told + (1 + len(near)) / 10)
    assert once(method) == pytest.approx(expected)


def test_every_engine_tells_the_same() -> None:
    run = check_strategy(whispering(), network())
    assert run.messages_delivered == 2 * 10
    lossy = Network(5, links=Links(latency_s=0.05, loss=0.3))
    check_strategy(whispering(rounds=4), lossy)
    check_strategy(whispering(rounds=4), network(faults=(Crash(who=(1,), at=0.12),)))


@pytest.mark.live
def test_sockets_tell_the_same() -> None:
    check_strategy(replace(whispering(), round_s=20.0), network(), live=True)


def test_byzantine_peers_tell_what_their_attack_says() -> None:
    method = whispering(attack=_Lying(), byzantine=(1, 4))
    check_strategy(method, network())
    fair, lied = once(whispering()), once(method)
    # 1 is heard by 0, 2 and 3; 4 by 3.
    assert [b - a for a, b in zip(fair, lied, strict=True)] == pytest.approx([7, 0, 7, 14, 0])
    # Without a say in the matter they tell the truth.
    assert once(whispering(attack=Zero(), byzantine=(1, 4))) == pytest.approx(fair)


def test_seeds_that_run_together_tell_as_if_alone() -> None:
    class Joinable(Bare):
        def joined(self, tasks: Any) -> Any:
            return _Repeated(tasks)

    class _Repeated(Joinable):
        def __init__(self, tasks: Any) -> None:
            super().__init__(sum(task.peers for task in tasks))
            self.each = tasks[0].peers

        def shard(self, peer: Any) -> Any:
            return super().shard(torch.as_tensor(peer) % self.each)

    def seed(number: int, edges: Any) -> Method:
        graph = find("topology", "from_edges")(5, edges)
        exchange = find("exchange", "gossip")(graph)
        method = whispering(seed=number)
        return replace(method, task=Joinable(5), exchange=exchange, _waves={})

    star = ((0, 1), (0, 2), (0, 3), (0, 4))
    line = ((0, 1), (1, 2), (2, 3), (3, 4))
    methods = [seed(1, star), seed(2, line)]
    together = run_lockstep(methods, [network(), network()])
    for method, run in zip(methods, together, strict=True):
        alone = run_lockstep([method], [network()])[0]
        assert difference(alone, run) == 0.0
        assert alone.bytes_sent == run.bytes_sent
        assert difference(simulate(Rounds.of(method), network(), seed=method.seed), run) == 0.0


def test_who_has_a_hub_or_several_waves_cannot_whisper() -> None:
    made = whispering()
    for exchange in (
        find("exchange", "star")(5),
        find("exchange", "gossip")(find("topology", "ring")(5), steps=2),
    ):
        with pytest.raises(UsageError, match="something else to each neighbour"):
            replace(made, exchange=exchange, _waves={})
