"""Asynchronous federated averaging: a version for every work, weighted by how seldom it comes.

A client's work is the difference between its local model and the one that it was sent, so what
others did meanwhile is not undone. Fast clients return more often; with the same weight for all the
server minimises the losses weighted by speed. The weight `p_i * tau_i * sum_j 1/tau_j`, where
`tau_i` is how long client i takes, puts that right, and exceeds 1 for slow clients: their old work
makes large steps, which is fast and unsteady.

Fraboni et al. 2023, asynchronous FedAvg as a case of their framework (arXiv 2206.10189).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.lab.card import Source, System
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.buffered import weighted_sum
from shoal.parts.asynchronous.learning import Learning
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.rule import Action, Advance, Course, Delta, Moment, Send
from shoal.parts.asynchronous.schedule import shares_of
from shoal.parts.asynchronous.settings import ServerSettings
from shoal.parts.asynchronous.staleness import Staleness
from shoal.rounds.workload import Workload
from shoal.tensor.types import Index, Vector, Weight

WEIGHTINGS = ("unbiased", "identical")
_TICK_S = 1e-9


@dataclass(frozen=True)
class EachReturnRule:
    """A version per work, `lr` times its weight times the displacement.

    weighting: "unbiased", or "identical" (1 for everybody).
    """

    weighting: str = "unbiased"
    lr: float = 1.0
    importances: tuple[float, ...] = ()
    staleness: Staleness = field(default_factory=Staleness)

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise UsageError(
                f"async-fedavg: weighting={self.weighting!r}; need one of {', '.join(WEIGHTINGS)}"
            )
        if not 0.0 < self.lr < math.inf:
            raise UsageError(f"async-fedavg: server_lr={self.lr}; need a positive number")

    def init(self, params: Vector, clients: Sequence[int]) -> None:
        return None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        return params + self.lr * weighted_sum(vectors, weights), state

    def course(self, clients: Sequence[int]) -> EachReturnCourse:
        return EachReturnCourse(self, shares_of(self.importances, clients))


class _Saved(msgspec.Struct, frozen=True):
    given_s: dict[int, float]
    spans: dict[int, tuple[int, float]]


class EachReturnCourse(Course):
    """Measures how long clients take: the mean of their works, or the one under way if longer."""

    def __init__(self, rule: EachReturnRule, importances: dict[int, float]) -> None:
        self.rule = rule
        self.importances = importances
        self.given_s: dict[int, float] = {}
        """client -> when it was given the model that it works on"""
        self.spans: dict[int, tuple[int, float]] = {}
        """client -> how many works it has returned, and the seconds that all of them took"""

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        client = delta.client
        took_s = at.now_s - self.given_s.pop(client, at.now_s)
        count, whole_s = self.spans.get(client, (0, 0.0))
        self.spans[client] = count + 1, whole_s + max(took_s, _TICK_S)
        weight = self.rule.staleness.weight(at.version - delta.version)
        if self.rule.weighting == "unbiased":
            rate = math.fsum(1.0 / self.takes_s(each, at.now_s) for each in self.importances)
            weight *= self.importances[client] * self.takes_s(client, at.now_s) * rate
        return [Advance([delta], [weight])]

    def takes_s(self, client: int, now_s: float) -> float:
        """How long a client takes, as far as is known; inf for one that was never given a model."""
        under_way_s = now_s - self.given_s[client] if client in self.given_s else 0.0
        count, whole_s = self.spans.get(client, (0, 0.0))
        if count:
            return max(whole_s / count, under_way_s)
        return max(under_way_s, _TICK_S) if client in self.given_s else math.inf

    def asked(self, client: int, at: Moment) -> list[Action]:
        self.given_s[client] = at.now_s
        return [Send(client)]

    def save(self) -> bytes:
        return msgspec.json.encode(_Saved(self.given_s, self.spans))

    def load(self, data: bytes, kept: Sequence[Delta]) -> None:
        saved = msgspec.json.decode(data, type=_Saved)
        self.given_s, self.spans = saved.given_s, saved.spans


@dataclass(frozen=True)
class AsyncFedAvg(ServerSettings):
    """A client makes `steps` local steps of SGD, and its work is a version at once.

    server_lr multiplies the weights. The others: see `ServerSettings`.

    Assumes that the weights' large steps are stable: lower `server_lr` where slow clients make the
    loss jump. Raises UsageError for settings that no run could use.
    """

    weighting: str = "unbiased"
    server_lr: float = 1.0
    steps: int = 10

    def rule(self) -> EachReturnRule:
        return EachReturnRule(self.weighting, self.server_lr, self.importances)

    def bind(self, workload: Workload) -> Learning:
        """The program for a task."""
        return self.learning(workload, Habits(low=self.steps), ties=True)


INVARIANTS = audit.INVARIANTS

SYSTEM = System(
    name="async-fedavg",
    kind="program",
    title="A version of the model for every client that returns",
    make=AsyncFedAvg,
    source=Source(
        "Fraboni et al. 2023",
        "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients "
        "Updates",
        arxiv="2206.10189",
        venue="Journal of Machine Learning Research 24(110)",
    ),
    scenario="training.digits_clients",
    uses={"topology": None, "exchange": None},
)
