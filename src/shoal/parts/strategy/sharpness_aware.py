"""Sharpness-aware local training, then what was combined: DFedSAM's local half."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Batch, Task
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Vector

TINY = 1e-12


def sam_gradient(task: Task, params: Vector, batch: Batch, rho: float) -> Vector:
    """The gradient at the worst nearby point: grad(x + rho g / (|g| + 1e-12)), g = grad(x).

    params [..., dim]. Both gradients use the same batch; the norm is over all parameters of a row,
    never per layer (that is another algorithm) and never over rows. Costs two gradients; rho = 0
    is the plain gradient at the cost of one. As `gradient` of `descend` (with rho bound by
    `functools.partial`) it makes any strategy's local training sharpness-aware.
    Source: Foret et al. 2021, algorithm 1; Shi et al. 2023, algorithm 1, lines 6 to 8.
    """
    gradient = task.grad(params, batch)
    if rho == 0.0:
        return gradient
    return task.grad(params + ascent(gradient, rho), batch)


def ascent(gradient: Vector, rho: float) -> Vector:
    """rho times the direction of the gradient [..., dim]; zero where the gradient is zero.

    >>> ascent(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0.5)
    tensor([[0.3000, 0.4000],
            [0.0000, 0.0000]])
    """
    return gradient * (rho / (gradient.norm(dim=-1, keepdim=True) + TINY))


@dataclass(frozen=True)
class State:
    """params [..., dim]; spread [...]: squared length of what was sent minus that of the result."""

    params: Vector
    spread: Tensor


@dataclass(frozen=True)
class SharpnessAware:
    """Sharpness-aware SGD on own data for `steps` batches or `epochs` passes, then the mean.

    Without steps or epochs, 20 steps.

    rho: how far the perturbation goes (0 = plain SGD, bit for bit that of `LocalSteps`); lr_decay
    multiplies the learning rate after each round; momentum starts at zero in every round;
    weight_decay acts at the unperturbed point. by_samples: weigh by the sender's number of samples
    (under a hub). Each step takes two gradients, which `flops` counts.

    Each peer reports `spread_removed`, the squared length of the vector that it sent minus that of
    what the round ended with. While mixing keeps the peers' mean (doubly stochastic weights,
    nothing lost), its mean over the peers is by how much the exchange lowered the consistency
    (1/m) sum |x_i - mean|^2, so `consensus` + `spread_removed` is the consistency before it.
    Source: Shi et al. 2023, algorithm 1 (arXiv 2302.04083).

    >>> SharpnessAware(rho=0.05).batch_size
    16
    """

    rho: float = 0.1
    lr: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_decay: float = 0.995
    by_samples: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"epochs": 1, "batch_size": 8, "by_samples": True},
        {"rho": 0.0, "steps": 2, "batch_size": 4, "momentum": 0.9},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.rho < float("inf"):
            raise UsageError(
                f"SharpnessAware: rho={self.rho}; need a finite radius, 0 or more (0 = plain SGD)"
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"SharpnessAware: steps={self.steps} and epochs={self.epochs}; give one of them"
            )
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"SharpnessAware: lr_decay={self.lr_decay}; need a factor in (0, 1]")

    @property
    def _optimizer(self) -> SGD:
        return SGD(self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def init(self, params: Vector) -> State:
        return State(params, torch.zeros_like(params[..., 0], dtype=torch.float64))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = self._optimizer
        steps = self.steps or (None if self.epochs else 20)
        # Without a radius the steps are plain ones, which are made in another way.
        gradient = partial(sam_gradient, rho=self.rho) if self.rho else None
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=steps, epochs=self.epochs, batch_size=self.batch_size,
            scale=self.lr_decay**step.round, gradient=gradient,
        )  # fmt: skip
        weight = step.shard.size.to(torch.float64) if self.by_samples else None
        return State(params, state.spread), Parcel(params, weight)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        assert step.sent is not None
        spread = step.sent.double().square().sum(-1) - heard.vector.double().square().sum(-1)
        return State(heard.vector, spread)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.spread)

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        return {"spread_removed": state.spread}

    def params(self, state: State) -> Vector:
        return state.params
