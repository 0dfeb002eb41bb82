"""Tiers: clients of like speed wait for each other, and tiers for nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.buffered import weighted_sum
from shoal.parts.asynchronous.rule import Action, Advance, Course, Delta, Moment, Send
from shoal.parts.asynchronous.schedule import shares_of
from shoal.parts.asynchronous.staleness import Staleness
from shoal.tensor.types import Index, Vector, Weight

PROFILE = 10.0
"""The first round, in which speeds are measured, waits that many times its median work once half of
the clients are there, and the square of it as long as one is."""


@dataclass(frozen=True)
class Tiered:
    """A version for every tier's round: `lr` times the tier's mean displacement times its share.

    tiers: how many, of as many clients each as possible, by the time that their first work took.
    The first version is made of everybody's first work. A tier's share is what FedAT gives it: with
    T_m versions of the m-th fastest tier, (T_(M+1-m) + 1) / (sum of T + M), so that slow tiers, who
    are heard rarely, count for more. Within a tier clients count by importance (equal ones unless
    they are given). wait: a tier's round ends without those who are not there that many times its
    slowest member's usual time after its first work; theirs go into the tier's next version.

    Assumes vectors are displacements, and speeds that stay what they were in the first round.
    Source: Chai et al. 2021, section 4 (FedAT, arXiv 2010.05958), on displacements instead of
    models of the tiers.

    >>> Tiered(tiers=2).split({1: 3.0, 2: 1.0, 3: 2.0}, [1, 2, 3, 4])
    ((2, 3), (1, 4))
    """

    tiers: int = 3
    lr: float = 1.0
    wait: float = 2.0
    importances: tuple[float, ...] = ()
    staleness: Staleness = field(default_factory=Staleness)

    def __post_init__(self) -> None:
        if self.tiers < 1 or not 0.0 < self.lr < math.inf or not 1.0 <= self.wait < math.inf:
            raise UsageError(
                f"tiered: tiers={self.tiers}, lr={self.lr}, wait={self.wait}; need at least one "
                "tier, a rate above 0 and a wait of at least 1"
            )

    def init(self, params: Vector, clients: Sequence[int]) -> None:
        return None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        return params + self.lr * weighted_sum(vectors, weights), state

    def course(self, clients: Sequence[int]) -> TieredCourse:
        if self.tiers > len(clients):
            raise UsageError(
                f"tiered: tiers={self.tiers} for {len(clients)} clients; need a client for each "
                "(lower it)"
            )
        return TieredCourse(self, clients, shares_of(self.importances, clients))

    def split(
        self, took_s: dict[int, float], clients: Sequence[int]
    ) -> tuple[tuple[int, ...], ...]:
        """The tiers, the fastest first; clients whose time is not known are among the slowest."""
        order = sorted(clients, key=lambda client: (took_s.get(client, math.inf), client))
        ends = [round(len(order) * m / self.tiers) for m in range(self.tiers + 1)]
        return tuple(tuple(order[a:b]) for a, b in pairwise(ends))


class _Saved(msgspec.Struct, frozen=True):
    """What must outlive a crash. due_s: of each tier, None = never."""

    profiled: bool
    took_s: dict[int, float]
    tiers: tuple[tuple[int, ...], ...]
    made: list[int]
    due_s: list[float | None]


class TieredCourse(Course):
    """Everybody is one tier until all speeds are known, or long enough waited for."""

    def __init__(self, rule: Tiered, clients: Sequence[int], importances: dict[int, float]) -> None:
        self.rule = rule
        self.clients = tuple(clients)
        self.profiled = False
        """whether the first round is over"""
        self.importances = importances
        self.took_s: dict[int, float] = {}
        """seconds of each client's first work"""
        self.sent_s: dict[int, float] = {}
        self.tiers: tuple[tuple[int, ...], ...] = (self.clients,)
        self.made = [0]
        """versions of each tier"""
        self.due = [math.inf]
        self.held: dict[int, Delta] = {}
        """works that wait for their tier"""
        self.waiting: set[int] = set()

    @property
    def due_s(self) -> float:
        return min(self.due)

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        client = delta.client
        began_s = self.sent_s.pop(client, None)
        if began_s is not None:
            self.took_s.setdefault(client, at.now_s - began_s)
        actions: list[Action] = []
        if client in self.held:
            # Of the client's next life: its earlier work has waited for others in vain.
            actions = self._close(self._tier(client), at)
            at = Moment(at.now_s, at.version + 1)
        tier = self._tier(client)
        self.held[client] = delta
        self._hasten(tier, at.now_s)
        if all(member in self.held for member in self.tiers[tier]):
            actions += self._close(tier, at)
        return actions

    def asked(self, client: int, at: Moment) -> list[Action]:
        if client in self.held:
            self.waiting.add(client)
            return []
        return [self._send(client, at.now_s)]

    def timed(self, at: Moment) -> list[Action]:
        actions: list[Action] = []
        for tier in [t for t, due_s in enumerate(self.due) if due_s <= at.now_s]:
            made = self._close(tier, at)
            at = Moment(at.now_s, at.version + sum(isinstance(each, Advance) for each in made))
            actions += made
        return actions

    def _tier(self, client: int) -> int:
        return next(t for t, members in enumerate(self.tiers) if client in members)

    def _hasten(self, tier: int, now_s: float) -> None:
        """Say until when a tier of which a work is here waits for the others."""
        known = sorted(self.took_s[c] for c in self.tiers[tier] if c in self.took_s)
        if not known:
            wait_s = 0.0
        elif self.profiled:
            wait_s = self.rule.wait * known[-1]
        elif 2 * len(self.held) < len(self.clients):
            wait_s = PROFILE**2 * known[0]
        else:
            wait_s = PROFILE * known[len(known) // 2]
        if self.due[tier] == math.inf or not self.profiled:
            self.due[tier] = min(self.due[tier], now_s + wait_s)

    def _close(self, tier: int, at: Moment) -> list[Action]:
        """A version of a tier's works; those who wait for it get it."""
        members, self.due[tier] = self.tiers[tier], math.inf
        deltas = [self.held.pop(client) for client in members if client in self.held]
        if not deltas:
            return []
        whole = math.fsum(self.importances[delta.client] for delta in deltas)
        share = self._share(tier)
        weights = [
            share * self.importances[delta.client] / whole
            * self.rule.staleness.weight(at.version - delta.version)
            for delta in deltas
        ]  # fmt: skip
        if self.profiled:
            self.made[tier] += 1
        else:
            self.profiled = True
            self.tiers = self.rule.split(self.took_s, self.clients)
            self.made, self.due = [0] * len(self.tiers), [math.inf] * len(self.tiers)
        ready = sorted(self.waiting - set(self.held))
        self.waiting -= set(ready)
        return [Advance(deltas, weights), *(self._send(client, at.now_s) for client in ready)]

    def _share(self, tier: int) -> float:
        count = len(self.tiers)
        return (self.made[count - 1 - tier] + 1) / (sum(self.made) + count)

    def _send(self, client: int, now_s: float) -> Send:
        self.sent_s[client] = now_s
        return Send(client)

    def save(self) -> bytes:
        due = [each if each < math.inf else None for each in self.due]
        return msgspec.json.encode(_Saved(self.profiled, self.took_s, self.tiers, self.made, due))

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        saved = msgspec.json.decode(data, type=_Saved)
        self.profiled, self.took_s = saved.profiled, saved.took_s
        self.tiers, self.made = saved.tiers, saved.made
        self.due = [math.inf if each is None else each for each in saved.due_s]
        self.held = {delta.client: delta for delta in kept}
