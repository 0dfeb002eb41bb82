"""DecAvg: local training, then a mean by amounts of data, with relays that have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]; taught [...]: whether they hold anything learned; size [...]: the mean
    amount of data per peer that was heard of, 0 = not yet."""

    params: Vector
    taught: Tensor
    size: Tensor


@dataclass(frozen=True)
class DecAvg:
    """SGD for `steps` batches (default 1) or `epochs` passes, then the mean by amounts of data.

    w_i <- sum over j in N(i) + {i} of b_ij w_j, b_ij proportional to |D_j|. A peer without data (a
    relay, or one whose data are lost) weighs nothing until it has received a model: untrained
    weights would poison every average they entered. From then on it forwards its average with the
    mean amount of data of those it last averaged (known from the inverse sizes that travel along,
    whose weighted mean is the inverse of that mean). While it is untaught it averages only what it
    received; a peer that hears nobody keeps its model. weights="uniform": everybody who has learned
    something weighs the same. The exchange's own mixing weights are not used.

    Repeated averaging without training does not converge to the mean by data in general: on a
    connected graph peer i counts |D_i| times the data in its closed neighbourhood (those weights
    are stationary, since b is reversible); on a complete graph that is the mean by data.
    Source: Palmieri et al. 2023, equation 2 (arXiv 2310.02986); the rule for relays is ours.

    >>> DecAvg(steps=6, weights="uniform").lr
    0.1
    """

    lr: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    momentum: float = 0.0
    weights: Literal["data", "uniform"] = "data"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 2, "batch_size": 4}, {"epochs": 1, "momentum": 0.9},
        {"steps": 1, "weights": "uniform"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"DecAvg: steps={self.steps} and epochs={self.epochs}; give one of them"
            )
        if self.weights not in ("data", "uniform"):
            raise UsageError(f"DecAvg: weights={self.weights!r}; need data or uniform")

    def init(self, params: Vector) -> State:
        nothing = torch.zeros_like(params[..., 0], dtype=torch.float64)
        return State(params, nothing > 0, nothing)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr, momentum=self.momentum)
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps or (None if self.epochs else 1), epochs=self.epochs,
            batch_size=self.batch_size,
        )  # fmt: skip
        own = step.shard.size.to(torch.float64)
        taught = state.taught | (own > 0)
        size = torch.where(own > 0, own, state.size)
        if self.weights == "uniform":
            return State(params, taught, size), Parcel(params, taught.to(torch.float64))
        weight = torch.where(taught, size, 0.0)
        inverse = torch.where(size > 0, 1.0 / size.clamp_min(1e-12), 0.0)
        return State(params, taught, size), Parcel(params, weight, {"inverse_size": inverse})

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        taught = state.taught | (heard.count > 0)
        if self.weights == "uniform":
            return State(heard.vector, taught, state.size)
        inverse = heard.extra["inverse_size"]
        size = torch.where(inverse > 0, 1.0 / inverse.clamp_min(1e-12), state.size)
        return State(heard.vector, taught, size)

    def params(self, state: State) -> Vector:
        return state.params
