"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.base import Decay, check_rate, per_row, start_count
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class AdamWState:
    """Moving averages of gradients and of their squares [..., dim], and steps done [...]."""

    mean: Tensor
    square: Tensor
    count: Tensor


@dataclass(frozen=True)
class AdamW:
    """Adam whose weight decay acts on the parameters directly, as `torch.optim.AdamW`.

    Source: Loshchilov and Hutter 2019, algorithm 2 (arXiv 1711.05101).

    >>> adam = AdamW(lr=0.1, weight_decay=0.0)
    >>> params = torch.tensor([1.0])
    >>> adam.step(params, torch.tensor([3.0]), adam.init(params))[0]
    tensor([0.9000])
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: tuple[str | float, ...] = ("constant",)
    """settings of `base.Decay`: kind, steps, rate, warmup"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", tuple(self.decay))
        Decay.of(self.decay)
        check_rate("adamw", lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise UsageError(
                f"adamw: beta1={self.beta1}, beta2={self.beta2}; both must lie in [0, 1)"
            )

    @cached_property
    def schedule(self) -> Decay:
        return Decay.of(self.decay)

    @property
    def plain_lr(self) -> None:
        """No plain step: there are moving averages to keep."""

    def init(self, params: Vector) -> AdamWState:
        return AdamWState(torch.zeros_like(params), torch.zeros_like(params), start_count(params))

    def step(
        self,
        params: Vector,
        grad: Vector,
        state: AdamWState,
        scale: Tensor | float = 1.0,
        *,
        donate: bool = False,
    ) -> tuple[Vector, AdamWState]:
        count = state.count + 1
        if donate:
            mean = state.mean.lerp_(grad, 1 - self.beta1)
            square = state.square.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        else:
            mean = torch.lerp(state.mean, grad, 1 - self.beta1)
            square = (state.square * self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        rate = self.lr * scale * self.schedule.factor(state.count)
        # The bias corrections are powers of numbers near 1: they are taken in double precision.
        first = rate / (1 - self.beta1**count)
        second = (1 - self.beta2**count).rsqrt()
        size = square.sqrt().mul_(per_row(second, square)).add_(self.eps)
        move = mean.div(size).mul_(per_row(first, mean))
        keep = per_row(1 - rate * self.weight_decay, params)
        moved = params.mul_(keep) if donate else params * keep
        return moved.sub_(move), AdamWState(mean, square, count)
