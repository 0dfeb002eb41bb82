"""Local training, then whatever the exchange and the aggregator do: the field's common ground.

With a star and all clients this is FedAvg; with gossip and one step D-PSGD; with gossip and more
steps DFedAvg; without an exchange it is local training.
"""

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
    """params [..., dim]; optimizer: momentum, kept between rounds when asked."""

    params: Vector
    optimizer: Any


@dataclass(frozen=True)
class LocalSteps:
    """SGD on own data for `steps` batches (default 1) or `epochs` passes, then what was combined.

    lr_decay multiplies the learning rate after each round. keep_momentum: carry the momentum over
    to the next round instead of starting it at zero. by_samples: weigh parameters by the sender's
    number of samples (FedAvg); otherwise the exchange's mixing weights count.
    Source: McMahan et al. 2017, algorithm 1; Lian et al. 2017, algorithm 1.

    >>> LocalSteps(steps=5, lr=0.05).epochs is None
    True
    """

    lr: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_decay: float = 1.0
    by_samples: bool = False
    keep_momentum: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"epochs": 1, "batch_size": 8, "by_samples": True},
        {"steps": 2, "batch_size": 4, "momentum": 0.9, "keep_momentum": True},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"LocalSteps: steps={self.steps} and epochs={self.epochs}; give one of them"
            )
        if not 0 < self.lr_decay <= 1:
            raise UsageError(f"LocalSteps: lr_decay={self.lr_decay}; need a factor in (0, 1]")

    @property
    def _optimizer(self) -> SGD:
        return SGD(self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def init(self, params: Vector) -> State:
        return State(params, self._optimizer.init(params))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = self._optimizer
        start = state.optimizer if self.keep_momentum else optimizer.init(state.params)
        steps = self.steps or (None if self.epochs else 1)
        params, after = descend(
            step.task, optimizer, state.params, start, step, steps=steps, epochs=self.epochs,
            batch_size=self.batch_size, scale=self.lr_decay**step.round,
        )  # fmt: skip
        weight = step.shard.size.to(torch.float64) if self.by_samples else None
        return State(params, after if self.keep_momentum else start), Parcel(params, weight)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, state.optimizer)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.optimizer)

    def params(self, state: State) -> Vector:
        return state.params
