"""FedAdam and its kin: the mean update is a gradient to an adaptive optimiser at the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor import tree
from shoal.tensor.types import Vector

Rule = Literal["adam", "yogi", "adagrad"]


@dataclass(frozen=True)
class State:
    """params [..., dim]; momentum and second [..., dim]: moments of the mean updates, at the hub.

    second begins at `tau` squared, as in the source.
    """

    params: Vector
    momentum: Vector
    second: Vector


@dataclass(frozen=True)
class AdaptiveUpdates:
    """SGD on own data for `steps` batches; the hub moves by `server_lr m / (sqrt(v) + tau)`.

    m is the moving mean of the mean updates d (weight 1 - beta1 for the new one). `rule` says how
    v follows: "adam" v + (1 - beta2)(d^2 - v), "yogi" v - (1 - beta2) d^2 sign(v - d^2), "adagrad"
    v + d^2. tau keeps small coordinates from taking full steps: it counts in units of updates.
    Updates weigh as their senders have samples. No bias correction, as in the source. Without a hub
    every peer keeps moments of its own over what it heard, and peers drift apart.
    Source: Reddi et al. 2021, algorithm 2 (arXiv 2003.00295).

    >>> AdaptiveUpdates(rule="yogi").tau
    0.001
    """

    lr: float = 0.1
    steps: int = 10
    batch_size: int = 16
    server_lr: float = 0.01
    rule: Rule = "adam"
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    needs_hub: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"steps": 1, "batch_size": 8, "rule": "yogi"},
        {"steps": 2, "batch_size": 4, "rule": "adagrad", "beta1": 0.0},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"AdaptiveUpdates: steps={self.steps}, batch_size={self.batch_size}; need at "
                "least 1"
            )
        if self.rule not in ("adam", "yogi", "adagrad"):
            raise UsageError(
                f"AdaptiveUpdates: rule={self.rule!r}; need 'adam', 'yogi' or 'adagrad'"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError(
                f"AdaptiveUpdates: beta1={self.beta1}, beta2={self.beta2}; need factors in [0, 1)"
            )
        if not (self.server_lr > 0 and self.tau > 0):
            raise UsageError(
                f"AdaptiveUpdates: server_lr={self.server_lr}, tau={self.tau}; need more than 0"
            )

    def init(self, params: Vector) -> State:
        return State(params, torch.zeros_like(params), torch.full_like(params, self.tau**2))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        after, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip
        return state, Parcel(after - state.params, step.shard.size.to(torch.float64))

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        update = heard.vector
        momentum = torch.lerp(update, state.momentum, self.beta1)
        square = update.square()
        if self.rule == "adagrad":
            second = state.second + square
        elif self.rule == "adam":
            second = torch.lerp(square, state.second, self.beta2)
        else:
            sign = torch.sign(state.second - square)
            second = state.second - (1.0 - self.beta2) * square * sign
        params = state.params + self.server_lr * momentum / (second.sqrt() + self.tau)
        # Where nobody was heard, the hub itself included, the vector is no update.
        return tree.where(heard.count > 0, State(params, momentum, second), state)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.momentum, state.second)

    def params(self, state: State) -> Vector:
        return state.params
