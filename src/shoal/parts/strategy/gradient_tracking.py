"""Gradient tracking: peers follow the mean gradient of all, which they keep up by gossip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]; gradient: the last one of this peer; tracker: its estimate of the mean of
    everybody's last gradients."""

    params: Vector
    gradient: Vector
    tracker: Vector


@dataclass(frozen=True)
class GradientTracking:
    """A step along a tracked mean gradient, mixed with the neighbours' (adapt, then combine).

    Each round a peer takes the gradient g of a batch at its parameters x, updates its tracker
    y <- y + g - g_before, and sends x - lr y and y; both become weighted means of what it hears.
    The trackers' mean stays the mean of the last gradients, so differing data leaves no bias at a
    constant step size, where D-PSGD settles around a point of its own. Twice D-PSGD's bytes.
    Breaks under loss and restarts: what a lost tracker held is missing from the mean for good, and
    on weights that are not doubly stochastic.
    Source: Pu and Nedic 2021, equation 4 (arXiv 1805.11454); Di Lorenzo and Scutari 2016.

    >>> GradientTracking(lr=0.05).batch_size
    32
    """

    lr: float = 0.1
    batch_size: int = 32

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"batch_size": 4}, {"lr": 0.05})

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.batch_size < 1:
            raise UsageError(
                f"GradientTracking: lr={self.lr}, batch_size={self.batch_size}; need a positive "
                "learning rate and at least one sample"
            )

    def init(self, params: Vector) -> State:
        zero = torch.zeros_like(params)
        return State(params, zero, zero)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        batch = step.task.batch(step.shard, step.key, self.batch_size)
        gradient = step.task.grad(state.params, batch)
        tracker = state.tracker + gradient - state.gradient
        sent = torch.sub(state.params, tracker, alpha=self.lr)
        return State(state.params, gradient, tracker), Parcel(sent, extra={"tracker": tracker})

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.gradient, heard.extra["tracker"])

    def params(self, state: State) -> Vector:
        return state.params
