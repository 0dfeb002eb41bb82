"""Rules in which every worker has one coded task: gradient coding, and repeating what is late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.parts.coding._rules import (
    MiniTask,
    Recipe,
    Record,
    Settled,
    Tasks,
    coded_task,
    combined,
    enough,
)
from shoal.parts.coding._tolerance import AllButOne, AtMost, Covered, Repeating, Tolerance
from shoal.parts.coding.gradient_code import GradientCode


@dataclass(frozen=True)
class _InOneCode:
    """A job is one combination per worker."""

    code: GradientCode

    @property
    def workers(self) -> int:
        return self.code.workers

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


@dataclass(frozen=True)
class Coded(_InOneCode):
    """Gradient coding in every round; without spare workers uncoded, with a fractional code
    replication."""

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
    def delay(self) -> int:
        return 0

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

    def settled(self, round: int, jobs: int, record: Record, done: frozenset[int]) -> Settled:
        return enough(self.code, done) if self.waits and round <= jobs else []

    def recipe(self, job: int, record: Record) -> Recipe | None:
        known = record.of(job, 0, self.workers)
        if self.waits:
            return combined(self.code, known, 0)
        # The mean of those who came stands for all: biased wherever lateness has to do with data.
        return [(worker, 0, self.workers / len(known)) for worker in known] or None


@dataclass(frozen=True)
class SelectiveRepeat(_InOneCode):
    """SR-SGC: gradient coding whose missing results are made up for `burst` rounds later."""

    burst: int
    window: int
    most: int

    @property
    def name(self) -> str:
        return f"sr_sgc(B={self.burst}, W={self.window}, lambda={self.most})"

    @property
    def delay(self) -> int:
        return self.burst

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
        return frozenset(missing[: self._beyond(missing)])

    def _beyond(self, missing: Sequence[int]) -> int:
        return max(0, len(missing) - self.code.stragglers)

    def settled(self, round: int, jobs: int, record: Record, done: frozenset[int]) -> Settled:
        if round > jobs:
            return []
        first = done - self._repeats(round - self.burst, jobs, record)
        missing = [w for w in range(self.workers) if w not in first]
        # Who of them repeats it later is known; then they do nothing for the job of that round.
        repeating = missing[: self._beyond(missing)]
        out = enough(self.code, first.union(repeating))
        if round + self.burst <= jobs:
            out += enough(self.code, frozenset(range(self.workers)).difference(repeating))
        return out

    def recipe(self, job: int, record: Record) -> Recipe | None:
        return combined(self.code, record.of(job, 0, self.workers), 0)
