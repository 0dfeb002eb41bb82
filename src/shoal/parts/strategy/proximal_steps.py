"""FedProx: local training that is held back to where it started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]."""

    params: Vector


@dataclass(frozen=True)
class ProximalSteps:
    """SGD on `loss(w) + mu/2 |w - w_start|^2` for `steps` batches or `epochs` passes.

    w_start is what a peer began the round with. mu = 0 is plain local training; a large mu keeps
    peers with differing data together and makes their steps shorter. by_samples: weigh parameters
    by the sender's number of samples, otherwise the exchange's mixing weights count.
    Breaks with lr * mu >= 2, where the pull alone overshoots; refused.
    Source: Li et al. 2020, algorithm 2 (arXiv 1812.06127), with SGD as the inexact solver.

    >>> ProximalSteps(mu=0.1, epochs=1).mu
    0.1
    """

    lr: float = 0.1
    mu: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    by_samples: bool = True

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 3, "batch_size": 4, "mu": 0.5}, {"epochs": 1, "batch_size": 8, "mu": 0.0},
        {"steps": 2, "batch_size": 4, "mu": 1.0, "by_samples": False},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"ProximalSteps: steps={self.steps} and epochs={self.epochs}; give one of them"
            )
        if not (self.mu >= 0 and self.lr * self.mu < 2):
            raise UsageError(
                f"ProximalSteps: mu={self.mu} with lr={self.lr}; need mu >= 0 and lr * mu < 2 "
                "(lower one of them)"
            )

    def init(self, params: Vector) -> State:
        return State(params)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        steps = self.steps or (None if self.epochs else 1)
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step, steps=steps,
            epochs=self.epochs, batch_size=self.batch_size,
            correct=self._pulled if self.mu else None, context=state.params if self.mu else None,
        )  # fmt: skip
        weight = step.shard.size.to(torch.float64) if self.by_samples else None
        return State(params), Parcel(params, weight)

    def _pulled(self, params: Vector, grad: Vector, start: Tensor) -> Vector:
        return torch.add(grad, params - start, alpha=self.mu)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector)

    def params(self, state: State) -> Vector:
        return state.params
