"""Buffered aggregation: a version for every `size` works, whoever they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.rule import Action, Advance, Course, Delta, Moment, Send
from shoal.parts.asynchronous.staleness import Staleness
from shoal.tensor.types import Index, Vector, Weight


@dataclass(frozen=True)
class Buffered:
    """Collect `size` works, add `lr` times their mean, each weighted by its staleness.

    size 1 is asynchronous aggregation, one version per work. by_weight: the mean is weighted by the
    clients' data as well. momentum: of the server, v <- momentum * v + mean, and `lr * v` is added.
    hold: a client that asks gets a model only once its own work is in it, so that with `size` = the
    number of clients this is synchronous.

    Assumes that vectors are displacements (local model minus the one pulled). With `hold` and fewer
    clients alive than `size` nothing moves, until the server gives up.
    Source: Nguyen et al. 2022, algorithm 1 (arXiv 2106.06639).

    >>> rule = Buffered(size=2, lr=0.5)
    >>> vectors, half = torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5])
    >>> rule.step(torch.zeros(1), None, vectors, half, torch.tensor([1, 2]))
    (tensor([1.]), None)
    """

    size: int = 10
    lr: float = 1.0
    momentum: float = 0.0
    by_weight: bool = False
    hold: bool = False
    staleness: Staleness = field(default_factory=Staleness)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"buffered: size={self.size}; need at least 1 (raise it)")
        if not 0 < self.lr < float("inf") or not 0 <= self.momentum < 1:
            raise UsageError(
                f"buffered: lr={self.lr}, momentum={self.momentum}; need a rate above 0 and a "
                "momentum in [0, 1)"
            )

    def init(self, params: Vector, clients: Sequence[int]) -> Tensor | None:
        return torch.zeros_like(params) if self.momentum else None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        mean = weighted_sum(vectors, weights)
        if self.momentum:
            state = mean = self.momentum * state + mean
        return params + self.lr * mean, state

    def course(self, clients: Sequence[int]) -> BufferedCourse:
        if self.hold and self.size > len(clients):
            raise UsageError(
                f"buffered: size={self.size} of {len(clients)} clients who wait for each version "
                "(lower it, or set hold=False)"
            )
        return BufferedCourse(self.size, self.staleness, self.hold, self.by_weight)


def weighted_sum(vectors: Tensor, weights: Weight) -> Vector:
    """Sum over k of weights [k] times vectors [k, dim], in the vectors' dtype."""
    return (weights.to(vectors.dtype).unsqueeze(-1) * vectors).sum(-2)


class BufferedCourse(Course):
    """An `Advance` for every `size` works; weights sum to 1 when nothing is stale.

    >>> delta = Delta(0, client=1, number=1, version=0, steps=5, weight=1.0, arrived_s=0.0,
    ...               vector=torch.zeros(1))
    >>> BufferedCourse(1, Staleness()).arrived(delta, Moment(0.0, 0))[0].weights
    [1.0]
    """

    def __init__(
        self, size: int, staleness: Staleness, hold: bool = False, by_weight: bool = False
    ) -> None:
        self.size = size
        self.staleness = staleness
        self.hold = hold
        self.by_weight = by_weight
        self.buffer: list[Delta] = []
        self.waiting: list[int] = []
        """clients who asked and whose work is not in a version yet"""

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        self.buffer.append(delta)
        return self.advance(at) if len(self.buffer) >= self.size else []

    def advance(self, at: Moment) -> list[Action]:
        """A version from all that is here."""
        # In an order that does not depend on who was a moment faster.
        deltas = sorted(self.buffer, key=lambda each: (each.client, each.number))
        self.buffer = []
        late = [self.staleness.weight(at.version - each.version) for each in deltas]
        whole = [each.weight if self.by_weight else 1.0 for each in deltas]
        total = sum(whole) or 1.0
        weights = [a * b / total for a, b in zip(whole, late, strict=True)]
        actions: list[Action] = [Advance(deltas, weights)]
        if self.hold:
            actions += [Send(client) for client in sorted(self.waiting)]
            self.waiting = []
        return actions

    def asked(self, client: int, at: Moment) -> Iterable[Action]:
        if self.hold and any(delta.client == client for delta in self.buffer):
            if client not in self.waiting:
                self.waiting.append(client)
            return []
        return [Send(client)]

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        self.buffer = list(kept)
