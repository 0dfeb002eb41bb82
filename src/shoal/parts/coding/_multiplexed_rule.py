"""The rule of M-SGC: jobs move down the slots of rounds, and little of their data is coded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shoal.parts.coding._rules import (
    MiniTask,
    Recipe,
    Record,
    Settled,
    Tasks,
    combined,
    enough,
    shared_code,
)
from shoal.parts.coding._tolerance import Bursty, Tolerance
from shoal.parts.coding.gradient_code import GradientCode


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

    def settled(self, round: int, jobs: int, record: Record, done: frozenset[int]) -> Settled:
        if not self.groups:
            return []
        out: Settled = []
        for slot in range(self.private + self.burst):
            job = round - slot
            if not 1 <= job <= jobs:
                continue
            lacks = [self._lacking(job, w, record, slot) for w in range(self.count)]
            if slot >= self.private:
                out += enough(self.code, {w for w in done if not lacks[w]})
                lacks = [lack - (w in done) for w, lack in enumerate(lacks)]
            else:
                lacks = [lack + (w not in done) for w, lack in enumerate(lacks)]
            # A worker repeats for as many rounds as it lacks chunks, and gives the rest coded.
            for turn in range(1, min(max(lacks), self.private + self.burst - 1 - slot) + 1):
                out += enough(self.code, {w for w, lack in enumerate(lacks) if lack < turn})
        return out

    def _lacking(self, job: int, worker: int, record: Record, slot: int) -> int:
        """How many results of the private chunks that were due before this slot have not come."""
        due = range(min(slot, self.private))
        return sum(not record.has(job, worker, place) for place in due)

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
