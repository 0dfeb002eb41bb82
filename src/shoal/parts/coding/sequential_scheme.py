"""Sequential gradient coding: gradients that may come some rounds late, coded over rounds as well.

Job t begins in round t and is decoded at the end of round t + T at the latest. In every round
`plan` says what each worker does, `must_wait` whether all have to be waited for, and `observe` who
was in time; after that `decodable` jobs can be decoded. What makes late workers affordable differs:
SR-SGC repeats what is missing B rounds later, M-SGC spreads each job over W - 1 + B rounds and
codes only what may be needed.

Krishnan et al. 2023 (ICLR, arXiv 2211.13802), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fractions import Fraction

from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding._coded_rules import Coded, SelectiveRepeat
from shoal.parts.coding._multiplexed_rule import Multiplexed
from shoal.parts.coding._rules import MiniTask, Record, Rule, shared_code

__all__ = ["MiniTask", "SequentialScheme"]


class SequentialScheme:
    """What workers do in each round, and what can be decoded; made by one of the class methods.

    workers: n; jobs: J, there are J + T rounds, both count from 1; delay: T; load: the fraction of
    the data that a worker processes in a round when all slots of a round are in use; sizes: chunks
    as fractions of the data.

    Whatever the stragglers are, every job is decoded in time if `must_wait` is obeyed. The state
    is who gave what, so that an object serves one run; `again` makes another.

    >>> scheme = SequentialScheme.m_sgc(4, burst=1, window=2, most=1, jobs=2)
    >>> for round in (1, 2, 3):
    ...     planned = scheme.plan(round)
    ...     scheme.observe(round, finished={1, 2, 3} if round == 1 else {0, 1, 2, 3})
    >>> scheme.delay, [scheme.decodable(job) for job in (1, 2)], f"{scheme.load:.4f}"
    (1, [True, True], '0.3333')
    """

    def __init__(self, rule: Rule, jobs: int) -> None:
        if jobs < 1:
            raise UsageError(f"SequentialScheme: jobs={jobs}; need at least 1")
        self.rule = rule
        self.name = rule.name
        self.workers = rule.workers
        self.jobs = jobs
        self.delay = rule.delay
        self.load = rule.load
        self.sizes = rule.sizes
        self._record = Record()
        self._tolerance = rule.tolerance(jobs)
        self._round = 1
        self._planned: tuple[tuple[MiniTask, ...], ...] | None = None

    @classmethod
    def uncoded(cls, workers: int, *, jobs: int) -> SequentialScheme:
        """Every worker has 1/n of the data, and all are waited for."""
        return cls(Coded(shared_code(_several(workers), 0)), jobs)

    @classmethod
    def ignoring(cls, workers: int, *, jobs: int) -> SequentialScheme:
        """Uncoded, but the mean of who was in time stands for all: fast, and biased."""
        return cls(Coded(shared_code(_several(workers), 0), waits=False), jobs)

    @classmethod
    def replicated(cls, workers: int, copies: int, *, jobs: int) -> SequentialScheme:
        """Groups of `copies` workers do the same, one of each group is enough. L = copies / n.

        copies must divide the number of workers.

        >>> SequentialScheme.replicated(6, 2, jobs=1).must_wait(1, finished={0, 3, 4})
        False
        """
        return cls.gc(workers, copies - 1, jobs=jobs, kind="fractional")

    @classmethod
    def gc(
        cls, workers: int, stragglers: int, *, jobs: int, kind: str = "cyclic"
    ) -> SequentialScheme:
        """Gradient coding: any n - s workers are enough in every round. T = 0, L = (s + 1) / n."""
        return cls(Coded(shared_code(_several(workers), stragglers, kind)), jobs)

    @classmethod
    def sr_sgc(
        cls, workers: int, burst: int, window: int, most: int, *, jobs: int
    ) -> SequentialScheme:
        """Selective repeat for up to `most` (lambda) stragglers in any `window` (W) rounds, each of
        them in at most `burst` (B) rounds on end. T = B; B must divide W - 1.

        >>> SequentialScheme.sr_sgc(256, 2, 3, 23, jobs=480).load * 256
        13.0
        """
        check_model("sr_sgc", _several(workers), burst, window, most)
        if (window - 1) % burst:
            raise UsageError(
                f"SequentialScheme.sr_sgc: burst={burst}, window={window}; burst must divide "
                f"window - 1 (try window={burst * max(1, (window - 1) // burst) + 1})"
            )
        code = shared_code(workers, spare(burst, window, most))
        return cls(SelectiveRepeat(code, burst, window, most), jobs)

    @classmethod
    def m_sgc(
        cls, workers: int, burst: int, window: int, most: int, *, jobs: int
    ) -> SequentialScheme:
        """Multiplexed coding for the same stragglers as `sr_sgc`. T = W - 2 + B.

        >>> round(SequentialScheme.m_sgc(256, 1, 2, 27, jobs=480).load, 6)
        0.007543
        """
        check_model("m_sgc", _several(workers), burst, window, most)
        return cls(Multiplexed(workers, burst, window, most), jobs)

    def again(self) -> SequentialScheme:
        """The same scheme at its beginning."""
        return SequentialScheme(self.rule, self.jobs)

    @property
    def rounds(self) -> int:
        """J + T."""
        return self.jobs + self.delay

    @property
    def round(self) -> int:
        """The round that comes next, or is under way."""
        return self._round

    def holds(self, worker: int) -> frozenset[int]:
        """The chunks that a worker has."""
        return self.rule.holds(worker)

    def plan(self, round: int) -> tuple[tuple[MiniTask, ...], ...]:
        """Of each worker what it does in this round, in this order."""
        self._check_round(round)
        if self._planned is None:
            tasks = self.rule.tasks(round, self.jobs, self._record)
            self._planned = tuple(tuple(each) for each in tasks)
        return self._planned

    def planned_load(self, worker: int) -> float:
        """The fraction of the data that a worker goes through in this round, counted."""
        tasks = self.plan(self._round)[worker]
        return sum(self.sizes[chunk] for task in tasks for chunk in task.chunks)

    def must_wait(self, round: int, finished: Collection[int]) -> bool:
        """Whether a job could be lost if only these workers' results of the round were used.

        That is where the stragglers leave the scheme's model, and, hardly ever, where float64
        cannot decode what it admits.
        """
        return not self._affords(self._late(round, finished), finished)

    def observe(self, round: int, finished: Collection[int]) -> None:
        """The round is over, and these workers' results are there.

        Raises UsageError where `must_wait` says that it is not over.
        """
        late = self._late(round, finished)
        if not self._affords(late, finished):
            raise UsageError(
                f"SequentialScheme: round {round} of {self.name} ended without {late.bit_count()} "
                "workers, which would lose a job (wait for all when must_wait says so)"
            )
        for worker in finished:
            for task in self.plan(round)[worker]:
                self._record.came.add((task.job, worker, task.part))
        self._tolerance.advance(late)
        self._round += 1
        self._planned = None

    def decodable(self, job: int) -> bool:
        """Whether what has come is enough for this job."""
        return self.recipe(job) is not None

    def recipe(self, job: int) -> list[tuple[int, int, float]] | None:
        """The job's gradient as (worker, part, weight) of results, None while it is not there."""
        if not 1 <= job <= self.jobs:
            raise UsageError(f"SequentialScheme: job {job} of {self.jobs}; they count from 1")
        return self.rule.recipe(job, self._record)

    def decode(self, job: int, result: Callable[[int, int], Tensor]) -> Tensor:
        """The gradient over all data, from `result(worker, part)` of this job's mini-tasks."""
        recipe = self.recipe(job)
        if recipe is None:
            raise UsageError(
                f"SequentialScheme: job {job} is not decodable after round {self._round - 1} "
                f"(it is at the end of round {job + self.delay})"
            )
        worker, part, weight = recipe[0]
        total = weight * result(worker, part).double()
        for worker, part, weight in recipe[1:]:
            total.add_(result(worker, part), alpha=weight)
        return total

    def forget(self, job: int) -> None:
        """Drop what is known about a job, once round job + T is over."""
        came = self._record.came
        came.difference_update([key for key in came if key[0] == job])

    def _affords(self, late: int, finished: Collection[int]) -> bool:
        if not late:
            return True
        if not self._tolerance.admits(late):
            return False
        settled = self.rule.settled(self._round, self.jobs, self._record, frozenset(finished))
        return all(code.solvable(known) for code, known in settled)

    def _late(self, round: int, finished: Iterable[int]) -> int:
        planned, late = self.plan(round), 0
        done = set(finished)
        for worker in done:
            if not 0 <= worker < self.workers:
                raise UsageError(
                    f"SequentialScheme: worker {worker} of {self.workers}; they count from 0"
                )
        for worker, tasks in enumerate(planned):
            # Who has nothing to do is never late.
            if tasks and worker not in done:
                late |= 1 << worker
        return late

    def _check_round(self, round: int) -> None:
        if round != self._round or round > self.rounds:
            raise UsageError(
                f"SequentialScheme: round {round}; round {self._round} of {self.rounds} is next "
                "(plan and observe every round once, in order)"
            )


def spare(burst: int, window: int, most: int) -> int:
    """How many stragglers the base code of SR-SGC does without in each round.

    >>> spare(2, 3, 23)
    12
    """
    return -int(Fraction(-burst * most, window - 1 + burst) // 1)


def check_model(name: str, workers: int, burst: int, window: int, most: int) -> None:
    """Raise UsageError for parameters of the bursty model that make no sense."""
    if not 1 <= burst < window:
        raise UsageError(
            f"SequentialScheme.{name}: burst={burst}, window={window}; need 1 <= burst <= window - "
            "1 (raise the window)"
        )
    if not 0 <= most <= workers:
        raise UsageError(
            f"SequentialScheme.{name}: most={most} stragglers of {workers} workers; need 0 to "
            f"{workers}"
        )


def _several(workers: int) -> int:
    if workers < 1:
        raise UsageError(f"SequentialScheme: workers={workers}; need at least 1")
    return workers
