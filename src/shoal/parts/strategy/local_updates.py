"""Local training, of which only the displacement is sent: what compression is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]: the model that updates are relative to."""

    params: Vector


@dataclass(frozen=True)
class LocalUpdates:
    """SGD on own data for `steps` batches; params after minus params before goes out.

    What was combined is added to the parameters, times `server_lr`. Under a hub this is FedAvg with
    the same result as sending parameters, as long as nothing is lost on the way: an update is small
    and mostly noise, so it survives a lossy transform that parameters would not. Weighted by the
    sender's number of samples; with by_samples=False all count alike, as they must where only the
    sum of what they send is known (secure aggregation). Without a hub peers that hear other updates
    drift apart, since nobody ever sends parameters.
    Source: McMahan et al. 2017, algorithm 1; Reddi et al. 2021, algorithm 1 with server SGD.

    >>> LocalUpdates(steps=5).server_lr
    1.0
    """

    lr: float = 0.1
    steps: int = 10
    batch_size: int = 16
    server_lr: float = 1.0
    by_samples: bool = True

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"steps": 1, "batch_size": 8, "server_lr": 0.5},
        {"steps": 2, "batch_size": 4, "by_samples": False},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"LocalUpdates: steps={self.steps}, batch_size={self.batch_size}; need at least 1"
            )
        if not 0 < self.server_lr < float("inf"):
            raise UsageError(
                f"LocalUpdates: server_lr={self.server_lr}; need a finite number above 0 (1 adds "
                "the mean update as it is)"
            )

    def init(self, params: Vector) -> State:
        return State(params)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        after, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip
        weight = step.shard.size.to(torch.float64) if self.by_samples else None
        return state, Parcel(after - state.params, weight)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        moved = torch.add(state.params, heard.vector, alpha=self.server_lr)
        # Nobody heard, the own update included: the vector is no update then.
        some = (heard.count > 0).unsqueeze(-1)
        return State(torch.where(some, moved, state.params))

    def params(self, state: State) -> Vector:
        return state.params
