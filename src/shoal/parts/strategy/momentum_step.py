"""One stochastic gradient, Polyak's momentum, one step: MoNNA's local half and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.strategy._decay import check_decay, check_weight_decay, half_decay
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim] and momentum [..., dim], which starts at zero."""

    params: Vector
    momentum: Vector


@dataclass(frozen=True)
class _Polyak:
    """Momentum damped by 1 - beta, as an optimiser; the learning rate is its `scale`."""

    beta: float
    weight_decay: float

    plain_lr: ClassVar[None] = None

    def init(self, params: Vector) -> Vector:
        return torch.zeros_like(params)

    def step(
        self, params: Vector, grad: Vector, state: Vector, scale: Tensor | float = 1.0, *,
        donate: bool = False,
    ) -> tuple[Vector, Vector]:  # fmt: skip
        if self.weight_decay:
            grad = torch.add(grad, params, alpha=self.weight_decay)
        momentum = torch.lerp(grad, state, self.beta)
        return torch.add(params, momentum, alpha=-float(scale)), momentum


@dataclass(frozen=True)
class MomentumStep:
    """m <- beta m + (1 - beta) g, then params - rate * m goes out and what was combined comes in.

    The gradient g is that of `batch_size` samples drawn with replacement, plus `weight_decay` times
    the parameters. Damped by 1 - beta, m is a mean of gradients, whatever beta: with torch's
    undamped momentum the same `lr` would move 1/(1 - beta) times as far. The momentum stays at its
    peer, only parameters are exchanged. The rate in round t is
    lr / (1 + t' / half_life), t' the last multiple of `decay_every`. beta = 0 is plain D-SGD.
    A peer without samples takes no step.
    Source: Farhadkhani et al. 2023, algorithm 1 and section 6 (arXiv 2209.10931).

    >>> step = MomentumStep(lr=0.5)
    >>> step.rate(0), step.rate(49), step.rate(50)
    (0.5, 0.5, 0.25)
    """

    lr: float = 0.5
    beta: float = 0.99
    batch_size: int = 1
    weight_decay: float = 1e-4
    half_life: int = 50
    decay_every: int = 50

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"lr": 0.1, "batch_size": 4},
        {"lr": 0.1, "beta": 0.0, "batch_size": 2, "half_life": 3, "decay_every": 1},
    )

    def __post_init__(self) -> None:
        check_decay("MomentumStep", self.lr, self.half_life, self.decay_every)
        check_weight_decay("MomentumStep", self.weight_decay)
        if not 0.0 <= self.beta < 1.0:
            raise UsageError(f"MomentumStep: beta={self.beta}; need 0 <= beta < 1 (0 = none)")
        if self.batch_size < 1:
            raise UsageError(f"MomentumStep: batch_size={self.batch_size}; need at least 1 sample")

    def rate(self, round: int) -> float:
        """The learning rate of a round."""
        return half_decay(self.lr, round, self.half_life, self.decay_every)

    def init(self, params: Vector) -> State:
        return State(params, torch.zeros_like(params))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        params, momentum = descend(
            step.task, _Polyak(self.beta, self.weight_decay), state.params, state.momentum, step,
            steps=1, batch_size=self.batch_size, scale=self.rate(step.round),
        )  # fmt: skip
        return State(params, momentum), Parcel(params)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.momentum)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.momentum)

    def params(self, state: State) -> Vector:
        return state.params
