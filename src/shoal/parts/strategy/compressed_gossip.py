"""CHOCO-SGD: gossip of compressed differences that converges as gossip of the models would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]; public: what the neighbours hold for this peer's model; mixed: the mixing
    weights' mean of the neighbours' public models, the own one included."""

    params: Vector
    public: Vector
    mixed: Vector


@dataclass(frozen=True)
class CompressedGossip:
    """Local steps, then a step of size `gamma` towards the neighbours' public models.

    What goes out is the difference between a peer's model and its public copy, through the
    scenario's transform; everybody adds what the transform left of it to the public copy, so errors
    are sent later and not lost. With the identity and gamma = 1 this is D-PSGD (adapt, then
    combine). A transform that keeps a share omega of the energy wants gamma near omega.
    start: "common" public copies begin at the initial model, which all know; "zero" at zero, as
    peers with initial models of their own need.
    Breaks when a message is lost, a peer restarts or the graph changes: copies of one model then
    differ for good. It needs the topology's mixing weights.
    Source: Koloskova et al. 2019, algorithm 2 in the form of algorithm 5 (arXiv 1902.00340).

    >>> CompressedGossip(gamma=0.3, steps=5).start
    'common'
    """

    lr: float = 0.1
    gamma: float = 0.5
    steps: int = 1
    batch_size: int = 32
    start: Literal["common", "zero"] = "common"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 4, "gamma": 1.0}, {"steps": 2, "batch_size": 4, "start": "zero"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise UsageError(f"CompressedGossip: gamma={self.gamma}; need a step in (0, 1]")
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"CompressedGossip: steps={self.steps}, batch_size={self.batch_size}; need at "
                "least 1"
            )
        if self.start not in ("common", "zero"):
            raise UsageError(f"CompressedGossip: start={self.start!r}; use 'common' or 'zero'")

    def init(self, params: Vector) -> State:
        public = params if self.start == "common" else torch.zeros_like(params)
        return State(params, public, public)

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        optimizer = SGD(self.lr)
        params, _ = descend(
            step.task, optimizer, state.params, optimizer.init(state.params), step,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip
        return State(params, state.public, state.mixed), Parcel(params - state.public)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        assert step.sent is not None
        public, mixed = state.public + step.sent, state.mixed + heard.vector
        params = torch.add(state.params, mixed - public, alpha=self.gamma)
        return State(params, public, mixed)

    def params(self, state: State) -> Vector:
        return state.params
