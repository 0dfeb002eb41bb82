"""A task without data and a strategy that counts, for tests of rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.parts import find
from shoal.rounds.method import Method
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Shard
from shoal.tensor.flat import FlatSpec

DIM = 3


class Bare:
    """Peers without samples; parameters start at 0 and are worth their sum."""

    def __init__(self, peers: int) -> None:
        self.peers = peers
        self.spec = FlatSpec(("w",), ((DIM,),))
        self.evaluated: list[int] = []

    def init(self, key: Tensor) -> Tensor:
        return torch.zeros(*key.shape, DIM, dtype=torch.float64)

    def shard(self, peer: Any) -> Shard:
        index = torch.as_tensor(peer)
        return Shard(index.unsqueeze(-1), torch.ones_like(index))

    def evaluate(self, params: Tensor) -> dict[str, Tensor]:
        self.evaluated.append(params.reshape(-1, DIM).shape[0])
        return {"loss": params.sum(-1)}


@dataclass(frozen=True)
class State:
    params: Tensor
    worked: Tensor


@dataclass(frozen=True)
class Counting:
    """Each round adds the peer's number + 1 to its parameters, and counts."""

    def init(self, params: Tensor) -> State:
        return State(params, torch.zeros_like(params[..., 0]))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        params = state.params + 1.0 + step.shard.index
        return State(params, state.worked + 1.0), Parcel(params)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.worked)

    def params(self, state: State) -> Tensor:
        return state.params

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        return {"worked": state.worked}


def counting(peers: int = 4, rounds: int = 10, rule: Any = None, **settings: Any) -> Method:
    """Rounds of three seconds at most on a ring."""
    task = Bare(peers)
    exchange = find("exchange", "gossip")(find("topology", "ring")(peers))
    transform = find("transform", "identity")().bind(task.spec)
    rule = rule or find("aggregate", "mean")()
    return Method(Counting(), task, exchange, rule, transform, rounds, 3.0, **settings)
