"""Asynchronous federated optimisation: every local model is mixed into the server's at once.

A client pulls the newest model, makes local steps and pushes what it has become; the server goes a
part of the way to it, the smaller the more versions were made meanwhile. Nobody waits for anybody;
what others have learned since a slow client pulled is partly undone by its old model. The server is
peer 0, which does not train.

Xie et al. 2019, algorithm 1 (arXiv 1903.03934).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shoal.base.errors import UsageError
from shoal.lab.card import Source, System
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.buffered import BufferedCourse
from shoal.parts.asynchronous.learning import Learning, Terms
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.task import Shard, Task
from shoal.rounds.workload import Workload
from shoal.tensor.types import Index, Key, Scalar, Vector, Weight


@dataclass(frozen=True)
class LocalModel:
    """The local model itself, where `Displacement` is what changed."""

    displacement: Displacement

    def __call__(self, task: Task, params: Vector, shard: Shard, key: Key, steps: Scalar) -> Vector:
        return params + self.displacement(task, params, shard, key, steps)


@dataclass(frozen=True)
class Mixing:
    """A version per local model: `alpha` times its weight of the way to it."""

    alpha: float = 0.9
    staleness: Staleness = field(default_factory=Staleness)

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise UsageError(f"fedasync: alpha={self.alpha}; need more than 0, up to 1")

    def init(self, params: Vector, clients: Sequence[int]) -> None:
        return None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        part = self.alpha * weights[0].to(params.dtype)
        return params + part * (vectors[0] - params), state

    def course(self, clients: Sequence[int]) -> BufferedCourse:
        return BufferedCourse(1, self.staleness)


@dataclass(frozen=True)
class FedAsync:
    """Mixing at once; a run of `rounds` makes that many versions.

    alpha: how far the server goes to a local model that is not late; one of staleness s counts
    (s + 1) ** -exponent of it, and none if s is more than max_staleness (None = any). lr, momentum,
    steps, batch_size: local. patience_s, give_up_s: see `Terms`.

    >>> FedAsync(alpha=1.5)
    Traceback (most recent call last):
    ...
    shoal.base.errors.UsageError: fedasync: alpha=1.5; need more than 0, up to 1
    """

    alpha: float = 0.9
    exponent: float = 0.5
    max_staleness: int | None = None
    lr: float = 0.1
    steps: int = 5
    momentum: float = 0.0
    batch_size: int = 32
    patience_s: float = 5.0
    give_up_s: float = 120.0

    def __post_init__(self) -> None:
        _ = self.rule, Habits(self.steps)

    @property
    def rule(self) -> Mixing:
        """What the server does."""
        staleness = Staleness(self.max_staleness, decay="polynomial", exponent=self.exponent)
        return Mixing(self.alpha, staleness)

    def bind(self, workload: Workload) -> Learning:
        """The program for a task."""
        work = LocalModel(Displacement(SGD(self.lr, momentum=self.momentum), self.batch_size))
        terms = Terms(patience_s=self.patience_s, give_up_s=self.give_up_s)
        return Learning(workload, self.rule, work, Habits(self.steps), terms=terms)


INVARIANTS = audit.INVARIANTS
"""What every run keeps, whatever its faults: for fault fuzzing."""

SYSTEM = System(
    name="fedasync",
    kind="program",
    title="Every local model is mixed into the server's at once, the late ones less",
    make=FedAsync,
    source=Source(
        "Xie et al. 2019", "Asynchronous Federated Optimization", arxiv="1903.03934"
    ),
    scenario="baselines.digits_home",
    uses={"topology": None, "exchange": None},
)  # fmt: skip
