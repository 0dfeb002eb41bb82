"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.base import Decay, check_rate, per_row, start_count
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class SGDState:
    """velocity [..., dim] with momentum; count [...] of steps where the settings need it."""

    velocity: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, weight decay and Nesterov's form, as `torch.optim.SGD`.

    Source: Sutskever et al. 2013, section 2, in torch's form (the rate is outside the velocity).

    >>> sgd = SGD(lr=0.5)
    >>> params = torch.tensor([2.0])
    >>> sgd.step(params, torch.tensor([1.0]), sgd.init(params))[0]
    tensor([1.5000])
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    decay: tuple[str | float, ...] = ("constant",)
    """settings of `base.Decay`: kind, steps, rate, warmup"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", tuple(self.decay))
        Decay.of(self.decay)
        check_rate("sgd", lr=self.lr, weight_decay=self.weight_decay, dampening=self.dampening)
        if not 0.0 <= self.momentum < 1.0 or self.dampening > 1.0:
            raise UsageError(
                f"sgd: momentum={self.momentum}, dampening={self.dampening}; need "
                "0 <= momentum < 1 and dampening <= 1"
            )
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise UsageError("sgd: nesterov needs momentum above 0 and dampening=0 (set them)")

    @cached_property
    def schedule(self) -> Decay:
        return Decay.of(self.decay)

    @property
    def plain_lr(self) -> float | None:
        plain = self.momentum == 0 and self.weight_decay == 0 and self.schedule.constant
        return self.lr if plain else None

    def init(self, params: Vector) -> SGDState:
        counted = not self.schedule.constant or (self.momentum > 0 and self.dampening > 0)
        return SGDState(
            torch.zeros_like(params) if self.momentum else None,
            start_count(params) if counted else None,
        )

    def step(
        self,
        params: Vector,
        grad: Vector,
        state: SGDState,
        scale: Tensor | float = 1.0,
        *,
        donate: bool = False,
    ) -> tuple[Vector, SGDState]:
        if self.weight_decay:
            grad = torch.add(grad, params, alpha=self.weight_decay)
        velocity, count = state.velocity, state.count
        if velocity is not None:
            grad, velocity = self._momentum(grad, velocity, count, donate)
        rate: Tensor | float = self.lr * scale
        if count is not None:
            rate = rate * self.schedule.factor(count)
            count = count + 1
        if isinstance(rate, Tensor):
            move = grad * per_row(rate, grad)
            moved = params.sub_(move) if donate else params - move
        elif donate:
            moved = params.add_(grad, alpha=-rate)
        else:
            moved = torch.add(params, grad, alpha=-rate)
        return moved, SGDState(velocity, count)

    def _momentum(
        self, grad: Tensor, velocity: Tensor, count: Tensor | None, donate: bool
    ) -> tuple[Tensor, Tensor]:
        fresh = grad
        if count is not None and self.dampening:
            # torch's first velocity is the gradient itself, whatever the dampening.
            damp = torch.where(count == 0, 1.0, 1.0 - self.dampening)
            fresh = grad * per_row(damp, grad)
        if donate:
            velocity = velocity.mul_(self.momentum).add_(fresh)
        else:
            velocity = torch.add(fresh, velocity, alpha=self.momentum)
        if not self.nesterov:
            return velocity, velocity
        return torch.add(grad, velocity, alpha=self.momentum), velocity
