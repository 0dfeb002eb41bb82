"""What training through failures takes: iterations executed, and virtual time, by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from shoal.base.errors import UsageError
from shoal.base.limits import check_positive
from shoal.parts.pipeline.failure_trace import FailureTrace

METHODS = ("check_free", "checkpoint", "redundant")


class Training(Protocol):
    """What can be driven through failures: a `Trainer`, or a `Replay` of one."""

    done: int

    def iterate(self) -> float: ...
    def loss(self) -> float: ...
    def lose(self, lost: Sequence[int]) -> None: ...
    def take_over(self, lost: Sequence[int]) -> None: ...
    def save(self) -> Any: ...
    def restore(self, saved: Any) -> None: ...


@dataclass(frozen=True)
class CostModel:
    """Times in units of a plain iteration, which takes `unit_s`.

    swapped: an iteration with swaps; redundant: one in which every stage is computed twice; stall:
    saving a checkpoint, every `every` iterations; restore: loading it; rebuild: making a stage of
    its neighbours.

    >>> CostModel.published().unit_s
    91.0
    """

    unit_s: float = 1.0
    swapped: float = 1.005
    redundant: float = 1.65
    every: int = 50
    stall: float = 0.5
    restore: float = 2.0
    rebuild: float = 0.3

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"every": 100})

    def __post_init__(self) -> None:
        check_positive("cost_model", self, "unit_s", "swapped", "redundant", "every")
        if min(self.stall, self.restore, self.rebuild) < 0:
            raise UsageError(
                f"cost_model: stall={self.stall}, restore={self.restore}, rebuild={self.rebuild}; "
                "need numbers from 0"
            )

    @classmethod
    def published(cls) -> CostModel:
        """The measured times of the paper: 91 s per iteration, 151 s with redundancy."""
        return cls(unit_s=91.0, redundant=151.0 / 91.0)

    def expected_iterations(self, probability: float) -> float:
        """Iterations that are executed for each checkpoint interval, on average.

        probability: that any stage fails in an iteration, which then comes to nothing.

        >>> round(CostModel(every=50).expected_iterations(0.028))
        112
        """
        if probability == 0:
            return float(self.every)
        return ((1 - probability) ** -self.every - 1) / probability


@dataclass(frozen=True)
class Moment:
    """After an executed iteration: how many were applied, and when."""

    done: int
    time_s: float


@dataclass(frozen=True)
class Failure:
    """What a failure did. executed: its number among all executed iterations; lost: the parts;
    repeated: applied iterations that are to be made again."""

    executed: int
    time_s: float
    lost: tuple[int, ...]
    repeated: int = 0


def drive(
    training: Training, method: str, trace: FailureTrace, iterations: int, costs: CostModel, *,
    swaps: bool = False, moment: Callable[[Moment], None], failure: Callable[[Failure], None],
) -> None:  # fmt: skip
    """Train until `iterations` are applied, through the failures of a trace.

    In an executed iteration in which parts fail, what was begun is dropped: "check_free" rebuilds
    them and goes on behind the last applied iteration; "checkpoint" rolls all parts back to the
    last multiple of `costs.every`; "redundant" goes on with the redundant states, and loses
    nothing. `moment` is called after every applied iteration, `failure` when parts were lost, and
    before they are rebuilt.
    """
    if method not in METHODS:
        raise UsageError(f"drive: method={method!r}; need one of {', '.join(METHODS)}")
    iteration = costs.redundant if method == "redundant" else costs.swapped if swaps else 1.0
    units = 0.0
    executed = 0
    saved = training.save()
    while training.done < iterations:
        lost = trace.at(executed)
        executed += 1
        units += iteration
        if lost and method == "checkpoint":
            repeated = training.done - training.done // costs.every * costs.every
            failure(Failure(executed - 1, units * costs.unit_s, lost, repeated))
            training.restore(saved)
            units += costs.restore
            continue
        if lost:
            failure(Failure(executed - 1, units * costs.unit_s, lost))
            if method == "check_free":
                training.lose(lost)
                units += costs.rebuild
                continue
            training.take_over(lost)
        training.iterate()
        if method == "checkpoint" and training.done % costs.every == 0:
            saved = training.save()
            units += costs.stall
        moment(Moment(training.done, units * costs.unit_s))


class Replay:
    """A training without failures, looked up: for methods that never leave its course.

    losses: its validation losses by the number of applied iterations.

    >>> replay = Replay({0: 3.0, 1: 2.5})
    >>> replay.iterate(), replay.loss()
    (0.0, 2.5)
    """

    def __init__(self, losses: Mapping[int, float]) -> None:
        self.done = 0
        self._losses = losses

    def iterate(self) -> float:
        self.done += 1
        return 0.0

    def loss(self) -> float:
        """UsageError where the training was not evaluated."""
        if self.done not in self._losses:
            raise UsageError(
                f"replay: no loss after {self.done} iterations (evaluate at these times, or run "
                "longer)"
            )
        return self._losses[self.done]

    def lose(self, lost: Sequence[int]) -> None:
        raise UsageError("replay: a rebuilt stage leaves the course (train instead)")

    def take_over(self, lost: Sequence[int]) -> None:
        """Nothing changes."""

    def save(self) -> int:
        return self.done

    def restore(self, saved: int) -> None:
        self.done = saved
