"""What the schemes of sequential coding ask of workers, and how a job is put together again.

A mini-task is a combination of the gradients of some chunks of the data for one job. `Record` says
which results have come; a rule is settings only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

from shoal.parts.coding._tolerance import (
    AllButOne,
    AtMost,
    Bursty,
    Covered,
    Repeating,
    Tolerance,
)
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
    def recipe(self, job: int, record: Record) -> Recipe | None: ...


@dataclass(frozen=True)
class Coded:
    """Gradient coding in every round; without spare workers uncoded, with a fractional code
    replication."""

    code: GradientCode
    waits: bool = True

    @property
    def name(self) -> str:
        if not self.waits:
            return "ignoring"
        if not self.code.stragglers:
            return "uncoded"
        if self.code.kind == "fractional":
            return f"replicated({self.code.stragglers + 1} copies)"
        return f"gc(s={self.code.stragglers})"

    @property
    def workers(self) -> int:
        return self.code.workers

    @property
    def delay(self) -> int:
        return 0

    @property
    def load(self) -> float:
        return self.code.load

    @property
    def sizes(self) -> tuple[float, ...]:
        return (1.0 / self.workers,) * self.workers

    def holds(self, worker: int) -> frozenset[int]:
        return frozenset(self.code.plan(worker))

    def task(self, worker: int, job: int, part: int) -> MiniTask:
        return coded_task(self.code, job, worker)

    def tolerance(self, jobs: int) -> Tolerance:
        if not self.waits:
            return AllButOne(self.workers)
        if self.code.kind == "fractional":
            return Covered(self.workers, self.code.stragglers + 1)
        return AtMost(self.code.stragglers)

    def tasks(self, round: int, jobs: int, record: Record) -> Tasks:
        if round > jobs:
            return [[] for _ in range(self.workers)]
        return [[coded_task(self.code, round, worker)] for worker in range(self.workers)]

    def recipe(self, job: int, record: Record) -> Recipe | None:
        known = record.of(job, 0, self.workers)
        if self.waits:
            return combined(self.code, known, 0)
        # The mean of those who came stands for all: biased wherever lateness has to do with data.
        return [(worker, 0, self.workers / len(known)) for worker in known] or None


@dataclass(frozen=True)
class SelectiveRepeat:
    """SR-SGC: gradient coding whose missing results are made up for `burst` rounds later."""

    code: GradientCode
    burst: int
    window: int
    most: int

    @property
    def name(self) -> str:
        return f"sr_sgc(B={self.burst}, W={self.window}, lambda={self.most})"

    @property
    def workers(self) -> int:
        return self.code.workers

    @property
    def delay(self) -> int:
        return self.burst

    @property
    def load(self) -> float:
        return self.code.load

    @property
    def sizes(self) -> tuple[float, ...]:
        return (1.0 / self.workers,) * self.workers

    def holds(self, worker: int) -> frozenset[int]:
        return frozenset(self.code.plan(worker))

    def task(self, worker: int, job: int, part: int) -> MiniTask:
        return coded_task(self.code, job, worker)

    def tolerance(self, jobs: int) -> Tolerance:
        return Repeating(self.burst, self.window, self.most, self.code.stragglers, jobs)

    def tasks(self, round: int, jobs: int, record: Record) -> Tasks:
        again = self._repeats(round - self.burst, jobs, record)
        out: Tasks = []
        for worker in range(self.workers):
            job = round - self.burst if worker in again else round
            out.append([coded_task(self.code, job, worker)] if job <= jobs else [])
        return out

    def _repeats(self, job: int, jobs: int, record: Record) -> frozenset[int]:
        """Who repeats its task of an earlier job: as many as are missing beyond the spare ones."""
        if not 1 <= job <= jobs:
            return frozenset()
        missing = [w for w in range(self.workers) if not record.has(job, w)]
        beyond = len(missing) - self.code.stragglers
        return frozenset(missing[: max(0, beyond)])

    def recipe(self, job: int, record: Record) -> Recipe | None:
        return combined(self.code, record.of(job, 0, self.workers), 0)


@dataclass(frozen=True)
class Multiplexed:
    """M-SGC: every job is spread over W - 1 + B rounds; most of its data are not coded at all.

    Chunks: W - 1 private ones of each worker (D1), then B groups of n, one for each worker (D2),
    of which a worker holds lambda + 1 neighbouring ones. Parts 0 .. W - 2 are the private chunks,
    part W - 1 + g is the coded task of group g.
    """

    count: int
    burst: int
    window: int
    most: int

    @property
    def name(self) -> str:
        return f"m_sgc(B={self.burst}, W={self.window}, lambda={self.most})"

    @property
    def workers(self) -> int:
        return self.count

    @property
    def delay(self) -> int:
        return self.window - 2 + self.burst

    @property
    def private(self) -> int:
        """Private chunks per worker, W - 1."""
        return self.window - 1

    @property
    def groups(self) -> int:
        """Groups of coded chunks; where all workers may be late there is nothing to code over."""
        return 0 if self.most == self.count else self.burst

    @property
    def load(self) -> float:
        slots = self.private + self.burst
        if not self.groups:
            return slots / (self.count * self.private)
        return (self.most + 1) * slots / self._units

    @property
    def _units(self) -> int:
        """How many coded chunks all data amount to."""
        return self.count * (self.burst + self.private * (self.most + 1))

    @property
    def sizes(self) -> tuple[float, ...]:
        n, private = self.count, self.private
        if not self.groups:
            return (1.0 / (n * private),) * (n * private)
        own = ((self.most + 1) / self._units,) * (n * private)
        return own + (1.0 / self._units,) * (n * self.groups)

    @cached_property
    def code(self) -> GradientCode:
        """The code of each group."""
        return shared_code(self.count, self.most)

    def holds(self, worker: int) -> frozenset[int]:
        held = {worker * self.private + place for place in range(self.private)}
        for group in range(self.groups):
            held |= {self._first(group) + chunk for chunk in self.code.plan(worker)}
        return frozenset(held)

    def _first(self, group: int) -> int:
        return self.count * (self.private + group)

    def tolerance(self, jobs: int) -> Tolerance:
        return Bursty(self.burst, self.window, self.most)

    def tasks(self, round: int, jobs: int, record: Record) -> Tasks:
        out: Tasks = []
        for worker in range(self.count):
            slots = (
                self._slot(worker, round - slot, slot, record)
                for slot in range(self.private + self.burst)
                if 1 <= round - slot <= jobs
            )
            out.append([task for task in slots if task is not None])
        return out

    def _slot(self, worker: int, job: int, slot: int, record: Record) -> MiniTask | None:
        """Slot j of a round serves the job of j rounds ago, so that a job moves down the slots."""
        if slot < self.private:
            return self.task(worker, job, slot)
        for place in range(self.private):
            if not record.has(job, worker, place):
                return self.task(worker, job, place)
        return self.task(worker, job, slot) if self.groups else None

    def task(self, worker: int, job: int, part: int) -> MiniTask:
        if part < self.private:
            return MiniTask(job, part, (worker * self.private + part,), (1.0,))
        first = self._first(part - self.private)
        chunks = tuple(first + chunk for chunk in self.code.plan(worker))
        return MiniTask(job, part, chunks, self.code.coefficients(worker))

    def recipe(self, job: int, record: Record) -> Recipe | None:
        out: Recipe = []
        for worker in range(self.count):
            for place in range(self.private):
                if not record.has(job, worker, place):
                    return None
                out.append((worker, place, 1.0))
        for part in range(self.private, self.private + self.groups):
            group = combined(self.code, record.of(job, part, self.count), part)
            if group is None:
                return None
            out += group
        return out


@lru_cache(maxsize=64)
def shared_code(workers: int, stragglers: int, kind: str = "cyclic") -> GradientCode:
    """One code for all schemes that use it: what it has solved, it keeps."""
    return GradientCode(workers, stragglers, kind)


def coded_task(code: GradientCode, job: int, worker: int) -> MiniTask:
    """A worker's whole combination."""
    return MiniTask(job, 0, code.plan(worker), code.coefficients(worker))


def combined(code: GradientCode, known: Sequence[int], part: int) -> Recipe | None:
    """What a code makes of the results of a part, None when they are too few."""
    if not code.enough(known):
        return None
    weights = code.weights(known)
    return [(w, part, float(by)) for w, by in zip(known, weights, strict=True)]
