"""LEARN: agreement on gradients and on models, with batches that grow instead of momentum."""

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
    """params [..., dim]."""

    params: Vector


@dataclass(frozen=True)
class _Gradient:
    """An optimiser that stays where it is and keeps the gradient as its state."""

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
        return params, grad


@dataclass(frozen=True)
class Learn:
    """One step takes two rounds: peers agree on gradients and step, then they agree on models.

    In round 2t everybody sends the gradient of t + 1 samples (batch_growth times t, rounded down,
    plus one) and takes a step along what was combined; in round 2t + 1 everybody sends the
    parameters and takes what was combined. Robust to f of n > 3f faulty peers with a robust rule
    (the paper: a trimmed mean, several waves a round) and honest data that is alike; the variance
    of gradients is driven down by batches alone, so T steps cost about T^2/2 gradients a peer.
    The rate is that of `MomentumStep`. A peer without samples sends a gradient of zero.
    Source: El-Mhamdi et al. 2021, algorithm 3 (Collaborative Learning in the Jungle).

    >>> learn = Learn()
    >>> learn.batch_size(0), learn.batch_size(9), learn.gradients(10)
    (1, 10, 55)
    """

    lr: float = 0.5
    batch_growth: float = 1.0
    weight_decay: float = 1e-4
    half_life: int = 50
    decay_every: int = 50

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"lr": 0.1},
        {"lr": 0.1, "batch_growth": 0.5, "half_life": 3, "decay_every": 1},
    )

    def __post_init__(self) -> None:
        check_decay("Learn", self.lr, self.half_life, self.decay_every)
        check_weight_decay("Learn", self.weight_decay)
        if not 0 <= self.batch_growth < float("inf"):
            raise UsageError(
                f"Learn: batch_growth={self.batch_growth}; need 0 or more (0 = always one sample)"
            )

    def batch_size(self, step: int) -> int:
        """Samples for the gradient of a step."""
        return int(self.batch_growth * step) + 1

    def gradients(self, steps: int) -> int:
        """What the first `steps` steps cost: gradients of single samples, for each peer."""
        return sum(self.batch_size(step) for step in range(steps))

    def init(self, params: Vector) -> State:
        return State(params)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        if step.round % 2:
            return state, Parcel(state.params)
        nothing = torch.zeros_like(state.params)
        _, gradient = descend(
            step.task, _Gradient(self.weight_decay), state.params, nothing, step,
            steps=1, batch_size=self.batch_size(step.round // 2),
        )  # fmt: skip
        return state, Parcel(gradient)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        if step.round % 2:
            return State(heard.vector)
        rate = half_decay(self.lr, step.round // 2, self.half_life, self.decay_every)
        return State(torch.add(state.params, heard.vector, alpha=-rate))

    def params(self, state: State) -> Vector:
        return state.params
