"""The server of FedCompass: a version for what arrives together, and one for what arrives alone.

`CompassCourse` keeps the buffers around the scheduler `Compass`: one for each arrival group, and
the general one for works that came after their group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.buffered import weighted_sum
from shoal.parts.asynchronous.compass import Arrival, Compass, CompassSettings
from shoal.parts.asynchronous.rule import Action, Advance, Course, Delta, Moment, Send
from shoal.parts.asynchronous.schedule import shares_of
from shoal.parts.asynchronous.staleness import Staleness
from shoal.tensor.types import Index, Vector, Weight


@dataclass(frozen=True)
class CompassRule:
    """Adds `alpha` times the weighted sum of the displacements of a version.

    A work counts with its client's importance (equal ones unless they are given), times what its
    staleness leaves of it. momentum: of the server, v <- momentum * v + sum (the variant +M).
    normalise: a work counts per local step, times the mean number of steps of its version (+N).
    """

    compass: CompassSettings = field(default_factory=CompassSettings)
    alpha: float = 0.9
    staleness: Staleness = field(default_factory=Staleness)
    importances: tuple[float, ...] = ()
    momentum: float = 0.0
    normalise: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < math.inf:
            raise UsageError(f"fedcompass: alpha={self.alpha}; need a positive number")
        if not 0.0 <= self.momentum < 1.0:
            raise UsageError(f"fedcompass: momentum={self.momentum}; need 0 <= momentum < 1")

    def init(self, params: Vector, clients: Sequence[int]) -> Tensor | None:
        return torch.zeros_like(params) if self.momentum else None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        move = weighted_sum(vectors, weights)
        if self.momentum:
            state = move = self.momentum * state + move
        return params + self.alpha * move, state

    def course(self, clients: Sequence[int]) -> CompassCourse:
        return CompassCourse(self, shares_of(self.importances, clients))


class _Saved(msgspec.Struct, frozen=True):
    """What must outlive a crash. held: client -> (its group, number of its work)."""

    compass: bytes
    held: dict[int, tuple[int, int]]


class CompassCourse(Course):
    """Buffers, and when they are emptied."""

    def __init__(self, rule: CompassRule, importances: dict[int, float]) -> None:
        self.rule = rule
        self.importances = importances
        self.compass = Compass(rule.compass)
        self.held: dict[int, tuple[int, Delta]] = {}
        """client -> the group that it arrived with, and its work"""
        self.general: list[Delta] = []
        """works that came after their group"""

    @property
    def due_s(self) -> float:
        return self.compass.due_s

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        client = delta.client
        made = self.compass.at_work.get(client)
        if made is None:
            # Of a server that has forgotten whom it told what: nobody waits for it.
            self.general.append(delta)
            return []
        what = self.compass.returned(client, at.now_s)
        if what is Arrival.SINGLE:
            return [self._advance([delta], at)]
        if what is Arrival.LATE:
            self.general.append(delta)
        else:
            assert made.group is not None
            self.held[client] = made.group, delta
        return self._close(self.compass.full(), at)

    def asked(self, client: int, at: Moment) -> list[Action]:
        if client in self.held:
            return []
        return [self._send(client, at), *self._close(self.compass.full(), at)]

    def timed(self, at: Moment) -> list[Action]:
        return self._close(self.compass.due(at.now_s), at)

    def _close(self, numbers: Sequence[int], at: Moment) -> list[Action]:
        """Make a version of each group and of what came late, and give it to the group."""
        actions: list[Action] = []
        for number in numbers:
            arrived = self.compass.close(number)
            deltas = self.general + [self.held.pop(client)[1] for client in arrived]
            self.general = []
            if deltas:
                actions.append(self._advance(deltas, at))
                at = Moment(at.now_s, at.version + 1)
            actions += [self._send(client, at) for client in arrived]
        return actions

    def _advance(self, deltas: Sequence[Delta], at: Moment) -> Advance:
        rule = self.rule
        mean_steps = math.fsum(delta.steps for delta in deltas) / len(deltas)
        weights = []
        for delta in deltas:
            weight = self.importances[delta.client] * rule.staleness.weight(
                at.version - delta.version
            )
            weights.append(weight * mean_steps / delta.steps if rule.normalise else weight)
        return Advance(deltas, weights)

    def _send(self, client: int, at: Moment) -> Send:
        return Send(client, self.compass.assign(client, at.now_s).steps)

    def save(self) -> bytes:
        held = {client: (group, delta.number) for client, (group, delta) in self.held.items()}
        return msgspec.json.encode(_Saved(self.compass.save(), held))

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        saved = msgspec.json.decode(data, type=_Saved)
        self.compass.load(saved.compass)
        for delta in kept:
            group, number = saved.held.get(delta.client, (-1, -1))
            if number == delta.number:
                self.held[delta.client] = group, delta
            else:
                self.general.append(delta)
