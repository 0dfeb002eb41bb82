"""One node's part of a tree of aggregators: who adds what to which sum, whoever dies meanwhile.

It holds no numbers and sends nothing. Whoever drives it (a gateway among peers, a pool of
processes) tells it what arrived, was added or failed, and asks what to do next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.base.errors import UsageError
from shoal.parts.serving.weighted_sum import check_weight, disjoint

LEAF, MIDDLE, TOP = 0, 1, 2


@dataclass(frozen=True)
class Addend:
    """An object that enters a sum as `factor` times its numbers.

    An update has its weight as factor; a sum, which is weighted already, 1. ids: the updates that
    are in it. Without any the object is nothing and has no key.
    """

    key: bytes
    factor: float
    weight: float
    ids: frozenset[int]


NOTHING = Addend(b"", 0.0, 0.0, frozenset())


@dataclass(eq=False)
class Job:
    """A sum in the slot `out`: the addends that it was given, and how many are in it.

    busy: somebody is adding to it; over: all is in it that will ever be.
    """

    level: int
    out: bytes
    given: list[Addend] = field(default_factory=list)
    added: int = 0
    busy: bool = False
    over: bool = False

    @property
    def name(self) -> str:
        return ("leaf", "middle", "top")[self.level]


@dataclass(frozen=True)
class Step:
    """One addition: `addend` goes into the job's sum, as its first one or not."""

    job: Job
    addend: Addend
    first: bool


class _Level:
    """Addends of one level: those that wait, and the jobs that take up to `fan_in` of them.

    Leaves run side by side; what is above them is one job at a time, which has something to merge.
    """

    def __init__(self, fan_in: int, expected: int | None, leaf: bool = False) -> None:
        self.fan_in = fan_in
        self.expected = expected
        self.leaf = leaf
        self.waiting: deque[Addend] = deque()
        self.jobs: list[Job] = []
        self.arrived = 0
        self.empty = True
        self.closed = expected == 0

    def take(self, addend: Addend) -> None:
        self.arrived += 1
        if addend.ids:
            self.empty = False
            self.waiting.append(addend)
        if self.arrived == self.expected:
            self.closed = True

    @property
    def over(self) -> bool:
        return self.closed and not self.waiting and not self.jobs

    @property
    def sole(self) -> bool:
        """Nothing is left but this addend, and nothing will come: it goes up as it is."""
        return self.closed and len(self.waiting) == 1 and not self.jobs

    def ready(self, job: Job) -> bool:
        """Whether the job could go on now."""
        if job.busy:
            return False
        more = bool(self.waiting) and len(job.given) < self.fan_in
        return job.added < len(job.given) or more

    def complete(self, job: Job) -> bool:
        if job.busy or not job.added or job.added < len(job.given):
            return False
        return len(job.given) == self.fan_in or (self.closed and not self.waiting)

    def openable(self, eager: bool) -> int:
        """How many more jobs there is work for."""
        now = eager or self.closed
        if not self.leaf:
            return int(now and not self.jobs and len(self.waiting) > 1)
        spare = len(self.waiting) - sum(self.fan_in - len(job.given) for job in self.jobs)
        if self.sole or spare <= 0:
            return 0
        return -(-spare // self.fan_in) if now else spare // self.fan_in

    def open(self, out: bytes, level: int, eager: bool) -> Job:
        job = Job(level, out)
        self.jobs.append(job)
        # With one addend at least, so that no other job takes what this one is for.
        most = 1 if eager else self.fan_in
        while self.waiting and len(job.given) < most:
            job.given.append(self.waiting.popleft())
        return job


class AggregationTree:
    """A round's sums on one node: leaves of `fan_in` updates, a middle, and on one node the top.

    eager: add as soon as something arrives; otherwise a job starts when all its addends are there.
    expected: how many updates will come (None = until `close`); nodes: from how many nodes the top
    gets a sum, this one included; 0 = the top is elsewhere, and `result` is this node's sum. merge:
    of more sums than this the middle makes one before it goes on, so that their slots are freed.

    Each update is in the result once, whatever fails: a job that failed is undone as a whole, and
    its addends, which are not freed before it is over, go to another one. A middle or top with one
    addend only is left out. Whoever makes a step needs nothing but its keys, so a job that waits
    holds nobody.
    Source: LIFL (Qi et al. 2024), sections on hierarchical and eager aggregation.

    >>> tree = AggregationTree(fan_in=2, expected=2)
    >>> for id in (4, 5):
    ...     tree.arrived(Addend(bytes([id]), 1.0, 1.0, frozenset((id,))))
    >>> while (step := tree.step(lambda: b"sum")) is not None:
    ...     tree.added(step.job)
    >>> tree.result.key, sorted(tree.result.ids), tree.freed()
    (b'sum', [4, 5], [b'\\x04', b'\\x05'])
    """

    def __init__(
        self, fan_in: int = 2, *, eager: bool = True, expected: int | None = None, nodes: int = 1,
        merge: int = 16,
    ) -> None:  # fmt: skip
        if fan_in < 1 or merge < 2 or nodes < 0 or (expected is not None and expected < 0):
            raise UsageError(
                f"AggregationTree: fan_in={fan_in}, merge={merge}, expected={expected}, "
                f"nodes={nodes}; need at least 1 update per leaf, 2 sums to merge, and counts of 0 "
                "or more"
            )
        self.eager = eager
        self._levels = [_Level(fan_in, expected, leaf=True), _Level(merge, None)]
        if nodes:
            self._levels.append(_Level(merge, nodes))
        self._seen: frozenset[int] = frozenset()
        self._freed: list[bytes] = []
        self.result: Addend | None = None
        self._settle()

    @property
    def closed(self) -> bool:
        """Whether all updates of this node are there."""
        return self._levels[LEAF].closed

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that are not over."""
        return tuple(job for level in self._levels for job in level.jobs)

    @property
    def wanted(self) -> int:
        """How many additions could be made at once now."""
        ready = sum(level.ready(job) for level in self._levels for job in level.jobs)
        return ready + self.openable

    @property
    def openable(self) -> int:
        """How many jobs could be begun now."""
        return sum(level.openable(self.eager) for level in self._levels)

    def arrived(self, update: Addend) -> None:
        """An update of this node; UsageError when it is there already, or none is expected."""
        check_weight(update.weight)
        level = self._levels[LEAF]
        if level.closed:
            raise UsageError("an update after the last one (open another round)")
        self._seen = disjoint((self._seen, update.ids))
        level.take(update)
        self._settle()

    def merge(self, addend: Addend) -> None:
        """Another node's sum, for the top."""
        if len(self._levels) <= TOP or self._levels[TOP].closed:
            raise UsageError("a sum for a top that is elsewhere or has all (send it to the top)")
        self._seen = disjoint((self._seen, addend.ids))
        self._levels[TOP].take(addend)
        self._settle()

    def close(self) -> None:
        """No more updates will come to this node."""
        self._levels[LEAF].closed = True
        self._settle()

    def step(
        self, reserve: Callable[[], bytes], job: Job | None = None, *, begin: bool = False,
        upper: bool = True,
    ) -> Step | None:  # fmt: skip
        """The next addition to make, or None when there is none; the highest level first.

        reserve: gives the slot of a new sum. job: go on with this one only; begin: only begin one;
        upper: whether a middle or top may be begun while what is below it still runs.
        """
        for number in reversed(range(len(self._levels))):
            level = self._levels[number]
            for each in () if begin else level.jobs:
                if level.ready(each) and job in (None, each):
                    return self._on(level, each)
            below = upper or all(each.over for each in self._levels[:number])
            if job is None and below and level.openable(self.eager):
                return self._on(level, level.open(reserve(), number, self.eager))
        return None

    def _on(self, level: _Level, job: Job) -> Step:
        if job.added == len(job.given):
            job.given.append(level.waiting.popleft())
        job.busy = True
        return Step(job, job.given[job.added], not job.added)

    def added(self, job: Job) -> None:
        """The addend of the step is in the sum."""
        job.busy = False
        job.added += 1
        self._settle()

    def failed(self, job: Job) -> None:
        """The job came to nothing, and its slot with it: its addends wait again, in their order."""
        level = self._levels[job.level]
        level.jobs.remove(job)
        level.waiting.extendleft(reversed(job.given))
        self._settle()

    def freed(self) -> list[bytes]:
        """Keys of what went into sums that are over, since the last call: free their slots."""
        freed, self._freed = self._freed, []
        return freed

    def held(self) -> list[bytes]:
        """Keys of all that was not freed: what waits or is in jobs, and the result.

        The slots that jobs write into are not among them.
        """
        addends = [a for level in self._levels for a in level.waiting]
        addends += [a for job in self.jobs for a in job.given]
        if self.result is not None:
            addends.append(self.result)
        return [*self.freed(), *(addend.key for addend in addends if addend.key)]

    def _up(self, number: int, addend: Addend) -> None:
        if number + 1 < len(self._levels):
            self._levels[number + 1].take(addend)
        else:
            self.result = addend

    def _settle(self) -> None:
        """What is over closes what is above it, and what is alone goes up as it is."""
        for number, level in enumerate(self._levels):
            if number == MIDDLE and self._levels[LEAF].over:
                level.closed = True
            for job in [job for job in level.jobs if level.complete(job)]:
                level.jobs.remove(job)
                job.over = True
                self._freed += [addend.key for addend in job.given]
                ids = disjoint(addend.ids for addend in job.given)
                weight = math.fsum(addend.weight for addend in job.given)
                made = Addend(job.out, 1.0, weight, ids)
                if level.leaf:
                    self._up(number, made)
                else:
                    level.waiting.append(made)
            if level.sole:
                self._up(number, level.waiting.popleft())
            elif number > LEAF and level.over and level.empty:
                # Nothing came at all; said once.
                level.empty = False
                self._up(number, NOTHING)
