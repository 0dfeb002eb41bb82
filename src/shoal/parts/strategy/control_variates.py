"""SCAFFOLD: local steps along gradients that are corrected by what all clients see."""

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
    """params [..., dim]; own: this client's control variate; shared: the hub's, their mean."""

    params: Vector
    own: Vector
    shared: Vector


@dataclass(frozen=True)
class ControlVariates:
    """`steps` steps along `grad - own + shared` from the hub's parameters.

    A client's control variate is the mean gradient of its last time here (option II: what it went,
    over steps * lr, without the correction); `shared` is the mean over all clients of the run, so
    the correction takes out what is peculiar to a client's data. Down go parameters and `shared`,
    up go both displacements: twice the bytes of FedAvg each way. The hub adds the mean displacement
    times `server_lr`, and moves `shared` by the mean displacement of variates times the part of the
    clients that took part. A client that dies with its variate begins again at zero while `shared`
    still holds the old one, which biases it from then on.
    Source: Karimireddy et al. 2020, algorithm 1, option II (arXiv 1910.06378).

    >>> ControlVariates(steps=5).needs_hub
    True
    """

    lr: float = 0.1
    steps: int = 10
    batch_size: int = 16
    server_lr: float = 1.0

    needs_hub: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"steps": 3, "batch_size": 4, "server_lr": 0.5},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"ControlVariates: steps={self.steps}, batch_size={self.batch_size}; need at "
                "least 1"
            )
        if not 0 < self.server_lr < float("inf"):
            raise UsageError(
                f"ControlVariates: server_lr={self.server_lr}; need a finite number above 0"
            )

    def init(self, params: Vector) -> State:
        zero = torch.zeros_like(params)
        return State(params, zero, zero)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        after, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps, batch_size=self.batch_size, drift=state.shared - state.own,
        )  # fmt: skip
        moved = after - state.params
        has = step.shard.size > 0
        fresh = state.own - state.shared - moved / (self.steps * self.lr)
        own = torch.where(has.unsqueeze(-1), fresh, state.own)
        parcel = Parcel(moved, has.to(torch.float64), {"control": own - state.own})
        return State(state.params, own, state.shared), parcel

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        some = (heard.count > 0).unsqueeze(-1)
        params = torch.add(state.params, heard.vector, alpha=self.server_lr)
        part = (heard.count / step.peers).unsqueeze(-1).to(params.dtype)
        shared = state.shared + part * heard.extra["control"]
        return State(
            torch.where(some, params, state.params), state.own,
            torch.where(some, shared, state.shared),
        )  # fmt: skip

    def down(self, state: State) -> dict[str, Vector]:
        return {"control": state.shared}

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.own, step.given["control"])

    def params(self, state: State) -> Vector:
        return state.params
