"""What the schemes of sequential coding ask of workers, and how a job is put together again.

A mini-task is a combination of the gradients of some chunks of the data for one job. `Record` says
which results have come; a rule is settings only. The rules: `_coded_rules`, `_multiplexed_rule`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from shoal.parts.coding._tolerance import Tolerance
from shoal.parts.coding.gradient_code import GradientCode


@dataclass(frozen=True)
class MiniTask:
    """`sum_k weights[k] * gradient(chunks[k])` for a job; `part` tells a worker's results for one
    job from each other."""

    job: int
    part: int
    chunks: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass
class Record:
    """Which results have come by the rounds before this one.

    came: (job, worker, part).
    """

    came: set[tuple[int, int, int]] = field(default_factory=set)

    def has(self, job: int, worker: int, part: int = 0) -> bool:
        return (job, worker, part) in self.came

    def of(self, job: int, part: int, workers: int) -> tuple[int, ...]:
        """Whose results of this part have come, ascending."""
        return tuple(w for w in range(workers) if (job, w, part) in self.came)


Recipe = list[tuple[int, int, float]]
"""A job's gradient as (worker, part, weight) of results."""
Tasks = list[list[MiniTask]]
Settled = list[tuple[GradientCode, tuple[int, ...]]]


class Rule(Protocol):
    """One scheme with its parameters; jobs and rounds count from 1."""

    @property
    def name(self) -> str: ...
    @property
    def workers(self) -> int: ...
    @property
    def delay(self) -> int:
        """Rounds that a job may take beyond its own (T)."""
        ...

    @property
    def load(self) -> float:
        """The fraction of the data that a worker processes in a round, in closed form."""
        ...

    @property
    def sizes(self) -> tuple[float, ...]:
        """Chunks as fractions of the data; they sum to 1."""
        ...

    def holds(self, worker: int) -> frozenset[int]: ...
    def task(self, worker: int, job: int, part: int) -> MiniTask:
        """What a worker does for a part of a job."""
        ...

    def tolerance(self, jobs: int) -> Tolerance: ...
    def tasks(self, round: int, jobs: int, record: Record) -> Tasks: ...
    def settled(self, round: int, jobs: int, record: Record, done: frozenset[int]) -> Settled:
        """Of whose results what will be decoded, once these are done with the round and if nobody
        is late after it; sets that are not enough are left out."""
        ...

    def recipe(self, job: int, record: Record) -> Recipe | None: ...


@lru_cache(maxsize=64)
def shared_code(workers: int, stragglers: int, kind: str = "cyclic") -> GradientCode:
    """One code for all schemes that use it: what it has solved, it keeps."""
    return GradientCode(workers, stragglers, kind)


def coded_task(code: GradientCode, job: int, worker: int) -> MiniTask:
    """A worker's whole combination."""
    return MiniTask(job, 0, code.plan(worker), code.coefficients(worker))


def enough(code: GradientCode, done: Collection[int]) -> Settled:
    """The workers of whom a code decodes, if they are enough."""
    known = tuple(sorted(done))
    return [(code, known)] if code.enough(known) else []


def combined(code: GradientCode, known: Sequence[int], part: int) -> Recipe | None:
    """What a code makes of the results of a part, None when they are too few."""
    if not code.enough(known):
        return None
    weights = code.weights(known)
    return [(w, part, float(by)) for w, by in zip(known, weights, strict=True)]
