"""Stochastic gradient push: averages on graphs on which a peer knows only whom it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.flat import FlatSpec
from shoal.tensor.stack import combine
from shoal.tensor.types import Mask, Scalar, Stack, Vector


@dataclass(frozen=True)
class State:
    """mass [..., dim] and weight [...], whose quotient is the model; optimizer: momentum, kept
    between rounds when asked."""

    mass: Vector
    weight: Scalar
    optimizer: Any


@dataclass(frozen=True)
class PushSum:
    """SGD in which each peer divides its mass and weight among itself and those who hear it.

    Each round a peer makes `steps` local steps from its model z = mass / weight, adds what they
    moved to its mass, and sends mass and weight; everybody adds up its shares of what it hears. The
    sums over all peers of masses and of weights stay what they were but for the gradients, so that
    without those every model becomes the mean, on any graph, directed or changing, whose arcs
    connect everybody again and again; plain means of what one hears lead elsewhere unless as
    many hear a peer as it hears. The paper's momentum is `momentum=0.9, nesterov=True,
    keep_momentum=True`.
    A lost message takes its mass and its weight along, so that models stay weighted means; a peer
    that dies takes its own. Breaks where a transform spoils masses and not weights.
    Source: Assran et al. 2019, algorithms 1 and 2 (arXiv 1811.10792).

    >>> PushSum(lr=0.05).steps
    1
    """

    lr: float = 0.1
    steps: int = 1
    batch_size: int = 32
    momentum: float = 0.0
    nesterov: bool = False
    keep_momentum: bool = False

    pushes: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 4},
        {"steps": 2, "batch_size": 4, "momentum": 0.9, "nesterov": True, "keep_momentum": True},
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"PushSum: steps={self.steps}, batch_size={self.batch_size}; need at least 1"
            )
        _ = self._optimizer

    @property
    def _optimizer(self) -> SGD:
        return SGD(self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def init(self, params: Vector) -> State:
        weight = torch.ones(params.shape[:-1], dtype=torch.float64, device=params.device)
        return State(params, weight, self._optimizer.init(params))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer, model = self._optimizer, self.params(state)
        start = state.optimizer if self.keep_momentum else optimizer.init(model)
        moved, after = descend(
            step.task, optimizer, model, start, step, steps=self.steps, batch_size=self.batch_size
        )
        mass = state.mass + (moved - model)
        state = State(mass, state.weight, after if self.keep_momentum else start)
        return state, Parcel(mass, extra={"weight": state.weight})

    def combine(
        self, state: State, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        """Sums of shares: Heard.vector is the new mass."""
        # In the place of who was not heard anything may stand, and zero times infinity is no zero.
        # What is no share of anything (damaged on its way) counts as lost.
        told = extra["weight"].to(share.dtype)
        mask = mask & rows.isfinite().all(-1) & told.isfinite() & (told > 0)
        mask[..., 0] = True
        rows = torch.where(mask.unsqueeze(-1), rows, rows.new_zeros(()))
        weight = torch.where(mask, share * told, 0.0).sum(-1)
        return Heard(combine(share, rows), mask.sum(-1), {"weight": weight})

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        return State(heard.vector, heard.extra["weight"], state.optimizer)

    def params(self, state: State) -> Vector:
        return state.mass / state.weight.to(state.mass.dtype).unsqueeze(-1)

    def report(self, state: State, spec: FlatSpec) -> dict[str, Tensor]:
        return {"weight": state.weight}
