"""The server of FedFix: at fixed instants it takes what has come since the last one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.buffered import weighted_sum
from shoal.parts.asynchronous.rule import Action, Advance, Course, Delta, Moment, Send
from shoal.parts.asynchronous.schedule import shares_of
from shoal.parts.asynchronous.staleness import Staleness
from shoal.tensor.types import Index, Vector, Weight

_ROUNDING = 1e-9


@dataclass(frozen=True)
class FixedTimesRule:
    """Adds `lr` times the weighted sum of the displacements of a period of `period_s`.

    A work counts with its client's importance times the periods that it took, at most
    `most_periods`. So the weights that a client has had add up to its importance times the periods
    that have passed, however long each work took: no times need be known or estimated.
    """

    period_s: float
    lr: float = 1.0
    importances: tuple[float, ...] = ()
    most_periods: int = 100
    staleness: Staleness = field(default_factory=Staleness)

    def __post_init__(self) -> None:
        for name in ("period_s", "lr"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise UsageError(f"fedfix: {name}={value}; need a positive number (raise it)")
        if self.most_periods < 1:
            raise UsageError(f"fedfix: most_periods={self.most_periods}; need at least 1")

    def init(self, params: Vector, clients: Sequence[int]) -> None:
        return None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        return params + self.lr * weighted_sum(vectors, weights), state

    def course(self, clients: Sequence[int]) -> FixedTimesCourse:
        return FixedTimesCourse(self, shares_of(self.importances, clients))


class _Saved(msgspec.Struct, frozen=True):
    passed: int
    since: dict[int, int]


class FixedTimesCourse(Course):
    """Waits for the next instant. Instants are counted from the start of the run."""

    def __init__(self, rule: FixedTimesRule, importances: dict[int, float]) -> None:
        self.rule = rule
        self.importances = importances
        self.passed = 0
        """the number of the last instant"""
        self.since: dict[int, int] = {}
        """client -> the last instant when it was given its model"""
        self.buffer: list[Delta] = []
        self.waiting: set[int] = set()
        """clients who asked and whose work is in the buffer"""

    @property
    def due_s(self) -> float:
        return (self.passed + 1) * self.rule.period_s

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        self.buffer.append(delta)
        return []

    def asked(self, client: int, at: Moment) -> list[Action]:
        if any(delta.client == client for delta in self.buffer):
            self.waiting.add(client)
            return []
        self.since[client] = math.floor(at.now_s / self.rule.period_s + _ROUNDING)
        return [Send(client)]

    def timed(self, at: Moment) -> list[Action]:
        self.passed += 1
        # In the order of clients: sums of floats depend on their order.
        deltas = sorted(self.buffer, key=lambda delta: (delta.client, delta.number))
        waiting, self.buffer, self.waiting = sorted(self.waiting), [], set()
        actions: list[Action] = []
        if deltas:
            actions.append(Advance(deltas, [self._weight(delta, at) for delta in deltas]))
        for client in waiting:
            self.since[client] = self.passed
            actions.append(Send(client))
        return actions

    def _weight(self, delta: Delta, at: Moment) -> float:
        periods = max(1, self.passed - self.since.get(delta.client, self.passed))
        late = self.rule.staleness.weight(at.version - delta.version)
        return self.importances[delta.client] * min(periods, self.rule.most_periods) * late

    def save(self) -> bytes:
        return msgspec.json.encode(_Saved(self.passed, self.since))

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        saved = msgspec.json.decode(data, type=_Saved)
        self.passed, self.since = saved.passed, saved.since
        self.buffer = list(kept)
