"""DiLoCo: many AdamW steps at each peer, then one step of Nesterov's momentum that all share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from shoal.base.errors import UsageError
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.optimise.sgd import SGD, SGDState
from shoal.rounds.local import Optimizer, descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.tensor import tree
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class State:
    """params [..., dim]: where the last outer step led, and where the inner steps start.

    inner: the inner optimiser's state, which never leaves its peer; outer: the outer momentum.
    """

    params: Vector
    inner: Any
    outer: SGDState


@dataclass(frozen=True)
class DiLoCo:
    """`steps` inner steps on own data, then an outer step along the mean pseudo-gradient.

    The pseudo-gradient is what the inner steps went, backwards: parameters before minus after. Its
    mean over peers is a gradient to SGD with Nesterov momentum (`outer_lr`, `outer_momentum`),
    whose result is where all begin the next round. The inner optimiser, AdamW or plain SGD
    (`inner`), keeps its state over the rounds. With one step of SGD, `outer_lr` 1 and no momentum
    this is plain averaging.

    send: "params" sends parameters and takes the pseudo-gradient from their mean; peers that lost
    a message or come back late are drawn to the others, so it works without a hub and on any
    topology. "update" sends pseudo-gradients, which is the same as long as all peers agree on
    the parameters, and survives compression, which parameters would not; without a hub a
    peer that missed one stays apart for good.
    Breaks when the inner steps go further than data of one's own can tell: differing shards want
    fewer steps or a smaller `outer_lr`.
    Source: Douillard et al. 2023, algorithm 1 and section 3 (arXiv 2311.08105).

    >>> DiLoCo(steps=100).outer_lr
    0.7
    """

    lr: float = 1e-3
    steps: int = 20
    batch_size: int = 32
    weight_decay: float = 0.01
    inner: str = "adamw"
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    send: str = "params"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"steps": 3, "batch_size": 4},
        {"steps": 2, "batch_size": 4, "send": "update", "outer_momentum": 0.0},
        {"steps": 1, "batch_size": 8, "inner": "sgd", "lr": 0.1, "weight_decay": 0.0},
    )

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"DiLoCo: steps={self.steps}, batch_size={self.batch_size}; need at least 1"
            )
        if self.inner not in ("adamw", "sgd"):
            raise UsageError(f"DiLoCo: inner={self.inner!r}; use 'adamw' or 'sgd'")
        if self.send not in ("params", "update"):
            raise UsageError(f"DiLoCo: send={self.send!r}; use 'params' or 'update'")
        _ = self.inner_optimizer, self.outer_optimizer

    @cached_property
    def inner_optimizer(self) -> Optimizer:
        """What makes the `steps` steps of a peer."""
        if self.inner == "sgd":
            return SGD(self.lr, weight_decay=self.weight_decay)
        return AdamW(self.lr, weight_decay=self.weight_decay)

    @cached_property
    def outer_optimizer(self) -> SGD:
        """What makes the one step that all peers share."""
        momentum = self.outer_momentum
        return SGD(self.outer_lr, momentum=momentum, nesterov=momentum > 0)

    def init(self, params: Vector) -> State:
        return State(params, self.inner_optimizer.init(params), self.outer_optimizer.init(params))

    def local(self, state: State, step: Step) -> tuple[State, Parcel]:
        after, inner = descend(
            step.task, self.inner_optimizer, state.params, state.inner, step,
            steps=self.steps, batch_size=self.batch_size,
        )  # fmt: skip
        sent = after if self.send == "params" else state.params - after
        return State(state.params, inner, state.outer), Parcel(sent)

    def apply(self, state: State, heard: Heard, step: Step) -> State:
        gradient = heard.vector
        if self.send == "params":
            gradient = state.params - heard.vector
        moved = self.outer_optimizer.step(state.params, gradient, state.outer)
        # Where nobody was heard, the peer itself included, the vector is no pseudo-gradient.
        params, outer = tree.where(heard.count > 0, moved, (state.params, state.outer))
        return State(params, state.inner, outer)

    def adopt(self, state: State, received: Vector, step: Step) -> State:
        return State(received, state.inner, state.outer)

    def params(self, state: State) -> Vector:
        return state.params
